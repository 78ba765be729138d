"""`python -m benchmarks.generate`: generation on CPU beside transformers' `generate`, in the same run.

Both sides continue the same random prompts greedily. Prompts of a batch are of one length, since transformers pads
others. Two runs of a process, for one new token and for more, tell the prompt's time from that of the tokens after it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import ensure_checkpoint, parameters_of
from benchmarks.report import MiB, Result, table
from benchmarks.setting import DEFAULT, SETTINGS
from benchmarks.step import ROOT, default_threads, measured_apart
from quant.common.errors import NibbleError
from quant.common.terminal import print_error

PEER = "transformers"
SIDES = ("nibble none", "nibble nf4", PEER)
PASSED_ON = ("arch", "dtype", "prompt", "new", "batch", "threads")
Generate = Callable[[list[list[int]], int], list[list[int]]]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.generate",
        description="Tokens per second and memory of generation on CPU, dense and nf4, beside transformers (dense).\n"
        "Every measurement is a process of its own; repetitions of the sides alternate. Run it on an idle machine.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--arch", choices=sorted(SETTINGS), default=DEFAULT, help="default: %(default)s")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="default: %(default)s")
    made.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt (default: %(default)s)")
    made.add_argument("--new", type=int, default=64, help="tokens after it (default: %(default)s)")
    made.add_argument("--batch", type=int, default=1, help="prompts at a time (default: %(default)s)")
    made.add_argument("--repetitions", type=int, default=3, help="processes of each side (default: %(default)s)")
    made.add_argument("--threads", type=int, default=default_threads(), help="default: the physical cores")
    made.add_argument("--native-only", action="store_true", help="measure this side alone")
    made.add_argument("--work", type=Path, default=ROOT / "outputs" / "benchmarks", help="for the random checkpoint")
    made.add_argument("--tiny", action="store_true", help="a model of half a million parameters, to try the command")
    made.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # what a measuring process does
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return made


def load(side: str, arguments: argparse.Namespace) -> Generate:
    """A side's function of prompts and the number of new tokens."""
    import torch

    dtype = getattr(torch, arguments.dtype)
    if side == PEER:
        from transformers import AutoModelForCausalLM

        peer = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=dtype).eval()

        def theirs(prompts: list[list[int]], new: int) -> list[list[int]]:
            tokens = torch.tensor(prompts)
            options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            with torch.no_grad():
                out = peer.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, **options)
            found: list[list[int]] = out[:, tokens.shape[1] :].tolist()
            return found

        return theirs

    from models.load import load_model

    model = load_model(arguments.folder, side.split()[1], dtype)
    return lambda prompts, new: [row.tokens for row in model.generate(prompts, new)]


def measure_here(side: str, arguments: argparse.Namespace) -> Result:
    """Seconds of the prompt and of a token after it, of the whole batch; resident bytes of the model, peak above."""
    import torch

    from benchmarks.measure import CPU, reset_peak_memory, resident_bytes
    from parallel.device import peak_memory_bytes

    torch.set_num_threads(arguments.threads)
    if side == PEER:
        import transformers  # noqa: F401
    else:
        import models.load  # noqa: F401
    imports = resident_bytes()
    generate = load(side, arguments)
    vocabulary = json.loads((arguments.folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    shape, generator = (arguments.batch, arguments.prompt), torch.Generator().manual_seed(0)
    prompts = torch.randint(1, vocabulary, shape, generator=generator).tolist()
    generate([prompt[:8] for prompt in prompts], 2)  # libraries start their threads, and weights are read
    model = resident_bytes() - imports
    reset_peak_memory(CPU)
    start = time.perf_counter()
    generate(prompts, 1)
    middle = time.perf_counter()
    tokens = generate(prompts, arguments.new + 1)
    end = time.perf_counter()
    peak = peak_memory_bytes(CPU) - imports - model
    first = middle - start
    return {
        "prompt": first,
        "token": (end - middle - first) / arguments.new,
        "model": model,
        "peak": peak,
        "tokens": tokens,
    }


def worker(side: str, arguments: argparse.Namespace, folder: Path) -> Result:
    """One measurement of a side; see `measured_apart`."""
    command = [sys.executable, "-m", "benchmarks.generate", "--side", side, "--folder", str(folder.resolve())]
    for name in PASSED_ON:
        command += [f"--{name}", str(getattr(arguments, name))]
    return measured_apart(command, f"the measurement of {side}", arguments.threads, os.environ)


def check_equal_tokens(native: Result, peer: Result) -> None:
    """Raises NibbleError where dense models in float32 don't choose the same tokens."""
    if native["tokens"] != peer["tokens"]:
        raise NibbleError("the sides do not generate the same tokens")


def report(sides: dict[str, list[Result]], prompt: int, batch: int) -> str:
    """Medians over the repetitions."""
    head = ("", "prompt tokens/s", "new tokens/s", "model MiB", "peak MiB above the model")
    rows = []
    for name, results in sides.items():
        m = {key: statistics.median(r[key] for r in results) for key in ("prompt", "token", "model", "peak")}
        speeds = (batch * prompt / m["prompt"], batch / m["token"])
        rows.append(
            [name, *(f"{speed:,.1f}" for speed in speeds), *(f"{m[key] / MiB:,.0f}" for key in ("model", "peak"))]
        )
    return table(head, rows)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.side:
        print(json.dumps(measure_here(arguments.side, arguments)))
        return 0
    config = SETTINGS[arguments.arch].sized(arguments.tiny)
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(
        f"cpu      {arguments.threads} threads; load average {loads}\n"
        f"model    {arguments.arch}, {parameters_of(config):,} parameters, {arguments.dtype}\n"
        f"work     {arguments.batch} prompts of {arguments.prompt} tokens, {arguments.new} new ones, "
        f"{arguments.repetitions} repetitions"
    )
    if os.getloadavg()[0] > 0.25 * arguments.threads:
        print("note     THE MACHINE IS BUSY: the figures are too low and uneven.")
    names = SIDES[:-1] if arguments.native_only else SIDES
    sides: dict[str, list[Result]] = {name: [] for name in names}
    try:
        folder = ensure_checkpoint(config, arguments.work)
        for repetition in range(arguments.repetitions):
            for name in names[:: -1 if repetition % 2 else 1]:
                sides[name].append(worker(name, arguments, folder))
                text = f"repetition {repetition + 1}/{arguments.repetitions}  {name}: done"
                print(text, file=sys.stderr, flush=True)
        if PEER in sides and arguments.dtype == "float32":
            check_equal_tokens(sides[SIDES[0]][0], sides[PEER][0])
    except NibbleError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print("\n" + report(sides, arguments.prompt, arguments.batch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
