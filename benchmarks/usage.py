"""What counting the experts' tokens costs of a training step: `python -m benchmarks.usage`

The model and the step of benchmarks.step (the native side alone). In every second step everything is counted, and the
seconds inside the counting are summed where they pass; beside it stand the steps without. CPU seconds of the process,
as other work on the machine would count in seconds by the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.setting import ALPHA, EXPERTS, LEARNING_RATE, MAX_GRAD_NORM, RANK, SETTINGS


def measure(arch: str, tokens: int, pairs: int, folder: Path, *, tiny: bool = False) -> dict[str, Any]:
    """CPU seconds, medians over pairs of steps: `off`, `on`, and of the latter `counting`."""
    import torch
    from torch import Tensor

    from benchmarks.checkpoint import ensure_checkpoint
    from benchmarks.documents import one_document
    from models import AdapterSpec, add_lora, load_model
    from models.blocks.usage import ExpertUsage
    from parallel.shards import Shards
    from train.loop import training_step
    from train.optim import build_optimizer

    setting, cpu = SETTINGS[arch], torch.device("cpu")
    model = load_model(ensure_checkpoint(setting.sized(tiny), folder), storage="nf4", dtype=torch.float32)
    model.activation_checkpointing = True
    add_lora(model, AdapterSpec((*setting.attention, *EXPERTS), RANK, ALPHA))
    usage = model.usage = ExpertUsage(model.train())
    shards = Shards(model)
    optimizer = build_optimizer("adamw", shards.parameters, LEARNING_RATE)
    inside: list[float] = []

    def timed(function: Callable[..., Any], *inputs: Any) -> Any:
        begun = time.process_time()
        result = function(*inputs)
        inside.append(time.process_time() - begun)
        return result

    for router in usage.routers.values():
        (counting,) = router.observers

        def observe(chosen: Tensor, scores: Tensor, counting: Any = counting) -> None:
            timed(counting, chosen, scores)

        router.observers = [observe]
    found: dict[str, list[float]] = {"off": [], "on": [], "counting": []}
    for number in range(2 * pairs + 2):
        counted = number % 2 == 1
        inside.clear()
        batch = one_document(torch.randint(model.vocabulary, (tokens,)))
        begun = time.process_time()
        if counted:
            timed(usage.start)
        training_step(shards, optimizer, [batch], step=number, max_grad_norm=MAX_GRAD_NORM, device=cpu)
        if counted:
            timed(usage.stop)
        if number > 1:  # the first two warm up
            found["on" if counted else "off"].append(time.process_time() - begun)
            if counted:
                found["counting"].append(sum(inside))
    return {name: statistics.median(values) for name, values in found.items()}


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m benchmarks.usage", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    add = arguments.add_argument
    add("--arch", choices=sorted(SETTINGS), default="glm4_moe_lite")
    add("--tokens", type=int, default=1024)
    add("--pairs", type=int, default=5, help="of steps, without and with counting")
    add("--folder", type=Path, default=Path("outputs/benchmark"), help="for the random checkpoint")
    add("--tiny", action="store_true", help="a tiny model, for trying the script itself")
    return arguments


def main(argv: list[str] | None = None) -> int:
    given = parser().parse_args(argv)
    found = measure(given.arch, given.tokens, given.pairs, given.folder, tiny=given.tiny)
    share = f"{1e3 * found['counting']:.2f} ms, {found['counting'] / found['on']:.3%}"
    print(f"{given.arch}, {given.tokens} tokens; CPU seconds of a step: {found['off']:.3f} without counting, ", end="")
    print(f"{found['on']:.3f} with, of which counting is {share}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
