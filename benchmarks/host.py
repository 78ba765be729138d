"""`python -m benchmarks.host`: the host's own time for a training step on an accelerator, measured without one."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.command import run_command
from benchmarks.launches_cases import FULL, full_config, targets_of
from benchmarks.report import table
from quant.common.errors import NibbleError

if TYPE_CHECKING:
    from models.decoder import CausalLM

HIDDEN, WIDTH, RANK = 64, 64, 8
# So narrow that computing takes no time beside the host's; numbers of layers, heads, experts and choices are the real.
NARROW = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "vocab_size": 512,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.host",
        description="Training steps of a model with the real numbers of layers, experts and choices, and narrow,\n"
        "on a CPU that takes the accelerator's way (float32, int8 experts, recomputation): in torch's forms, where\n"
        "the CPU computes too, and with our own kernels, which are prepared and not launched. What is left is the\n"
        "host's work: Python, autograd and torch's dispatcher, without the driver's share of a launch.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--arch", nargs="+", choices=tuple(FULL), default=["glm4_moe_lite"], help="default: glm4_moe_lite")
    add("--layers", type=int, help="fewer layers than the model has")
    add("--steps", type=int, default=5, help="timed; the least counts (default: %(default)s)")
    add("--tokens", type=int, default=256, help="of a step; of 32 computing takes the least (default: %(default)s)")
    return made


def seconds_of(model: CausalLM, steps: int, length: int, kernels: bool) -> tuple[float, int]:
    """The least of a step's CPU seconds, and how many kernels of our own it launches."""
    import torch

    from benchmarks.gpu_train import loss_of
    from models.blocks.documents import Documents
    from quant.common.devices import cpu_as_accelerator
    from quant.kernels.choice import KERNELS, using
    from quant.kernels.language import recording

    documents = Documents.from_lengths([length // 2] * 2, torch.device("cpu"))
    tokens = torch.randint(512, (length // 2 * 2,), generator=torch.Generator().manual_seed(0))
    taken, launched = [], 0
    with cpu_as_accelerator(), using(KERNELS if kernels else ()):
        for _ in range(steps + 2):
            with recording((9, 0)) as launches:
                began = time.process_time()
                loss_of(model, tokens, documents).backward()
                taken.append(time.process_time() - began)
            launched = len(launches)
            model.zero_grad()
    return min(taken[2:]), launched


def built(arch: str, layers: int | None) -> CausalLM:
    import torch

    from models.adapters.lora import add_lora
    from models.adapters.targets import AdapterSpec
    from models.registry import ARCHITECTURES
    from quant.storage import StorageSpec

    architecture = ARCHITECTURES[full_config(arch)["model_type"]]
    config = architecture.parse_config(full_config(arch, layers) | NARROW, "config.json")
    model = architecture.build(config, StorageSpec("int8"), torch.float32, torch.device("cpu"))
    spread = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        with torch.no_grad():
            if name.endswith(("embed_tokens.weight", "mlp.gate.weight.value")):  # tokens choose different experts
                tensor.normal_(generator=spread)
            else:
                tensor.fill_(1 if "norm" in name or "scale" in name else 0)
    model.requires_grad_(False)
    model.train()
    model.activation_checkpointing = True
    add_lora(model, AdapterSpec(targets_of(arch), RANK, RANK))
    return model


def run(arguments: argparse.Namespace) -> int:
    if min(arguments.steps, arguments.layers or 1, arguments.tokens // 2) < 1:
        raise NibbleError("--steps and --layers are numbers from 1 on, --tokens from 2 on.")
    import torch

    torch.set_num_threads(1)
    rows = []
    for arch in arguments.arch:
        model = built(arch, arguments.layers)
        before, _ = seconds_of(model, arguments.steps, arguments.tokens, kernels=False)
        after, launched = seconds_of(model, arguments.steps, arguments.tokens, kernels=True)
        layers = len(model.model.layers)
        rows.append(
            [
                FULL[arch][0], f"{layers}", f"{before:.2f}", f"{after:.2f}",
                f"{before / after:.1f}", f"{launched / layers:.0f}",
            ]
        )  # fmt: skip
    print(
        table(("model", "layers", "torch's forms, CPU s", "our kernels, CPU s", "ratio", "our kernels per layer"), rows)
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
