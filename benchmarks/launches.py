"""`python -m benchmarks.launches`: what one training step launches and keeps on an accelerator, counted without one."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import run_command
from benchmarks.launches_cases import ADAPTER_DTYPES, FULL, KERNELS, STORAGES, LaunchCase, full_config, targets_of
from benchmarks.report import table
from quant.common.errors import NibbleError

if TYPE_CHECKING:
    from benchmarks.launches_step import Step

GiB = 1 << 30


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.launches",
        description="One training step (forward, loss, backward, with recomputation) of a full-size model on meta\n"
        "tensors, which have shapes and no values and take the accelerator's way. Counts the operations that would\n"
        "launch a kernel, follows the memory that is live, and adds up the least time of each operation. The\n"
        "optimiser's update is counted apart. Every combination of the options is a case; one takes 10 to 60 s\n"
        "of one CPU. Needs no GPU.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--arch", nargs="+", choices=tuple(FULL), default=["glm4_moe_lite"], help="default: glm4_moe_lite")
    add("--all", action="store_true", help="every architecture")
    add("--storage", nargs="+", choices=STORAGES, default=["nf4"], help="of the frozen weights (default: nf4)")
    add("--adapter-dtype", nargs="+", choices=ADAPTER_DTYPES, default=["bfloat16"], help="default: bfloat16")
    add("--kernels", nargs="+", choices=KERNELS, default=["triton"], help="our own (default), or torch's forms")
    add("--targets", nargs="+", metavar="GROUP", help="of LoRA (default: what mixes tokens, and the experts)")
    add("--rank", type=int, default=LaunchCase.rank, help="of LoRA (default: %(default)s)")
    add("--layers", type=int, help="fewer layers than the model has")
    add("--length", type=int, default=LaunchCase.length, help="tokens of a sequence (default: %(default)s)")
    add("--sequences", type=int, default=LaunchCase.sequences, help="packed into a step (default: %(default)s)")
    add("--processes", type=int, default=1, help="that FSDP2 cuts the model over; one of them is counted")
    add("--expert", type=int, default=1, help="of them, how many the experts are distributed over")
    add("--json", type=Path, metavar="FILE", help="write everything counted to FILE")
    return made


def _cut(case: LaunchCase) -> str:
    return f", one of {case.processes} processes, expert {case.expert}" if case.processes > 1 else ""


def case_row(name: str, case: LaunchCase, step: Step) -> list[str]:
    layers = len(step.layers)
    return [
        f"{name}, {layers} layers, {case.storage}, {case.adapter_dtype} LoRA, {case.kernels}" + _cut(case),
        f"{step.per_moe_layer:,.0f}",
        f"{step.total.launches / layers:,.0f}",
        f"{step.total.launches:,}",
        f"{step.update:,}" if case.processes == 1 else "–",
        f"{step.waits:,}",
        f"{step.weights / GiB:.2f}",
        f"{step.peak / GiB:.2f}" if case.processes == 1 else "–",  # FSDP2 empties storages, which isn't followed
        f"{step.total.seconds:.2f}",
        f"{step.cpu_seconds:.0f}",
    ]


HEAD = ("case", "per MoE layer", "all / layers", "step", "update", "waits", "weights", "peak", "device s", "CPU s")


def kinds_table(name: str, step: Step) -> str:
    rows = []
    for kind, total in step.kinds.items():
        per_layer = step.moe_kinds[kind].launches / max(len(step.moe), 1)
        cells = (f"{per_layer:,.1f}", f"{total.launches:,}", f"{total.bytes / GiB:,.1f}", f"{1e3 * total.seconds:,.1f}")
        rows.append([kind, *cells])
    return table([name, "per MoE layer", "step", "GiB moved", "device ms"], rows)


def cases(arguments: argparse.Namespace) -> list[tuple[str, LaunchCase]]:
    found = []
    chosen = list(FULL) if arguments.all else arguments.arch
    options = (chosen, arguments.storage, arguments.adapter_dtype, arguments.kernels)
    for arch, storage, dtype, kernels in itertools.product(*options):
        targets = tuple(arguments.targets or targets_of(arch))
        case = LaunchCase(
            full_config(arch, arguments.layers), storage, dtype, targets, arguments.rank, kernels=kernels,
            sequences=arguments.sequences, length=arguments.length,
            processes=arguments.processes, expert=arguments.expert,
        )  # fmt: skip
        found.append((FULL[arch][0], case))
    return found


def run(arguments: argparse.Namespace) -> int:
    counted = (arguments.length, arguments.sequences, arguments.rank, arguments.layers or 1, arguments.expert)
    if min(counted) < 1 or arguments.processes % arguments.expert:
        raise NibbleError("all numbers are from 1 on, and --processes is a multiple of --expert.")
    if arguments.processes > 1 and "torch" in arguments.kernels and "nf4" in arguments.storage:
        raise NibbleError("bitsandbytes' operators take no fake tensors; count --kernels torch with --storage int8.")
    from benchmarks.launches_step import measure  # imports torch

    rows, kept = [], []
    for name, case in cases(arguments):
        step = measure(case)
        rows.append(case_row(name, case, step))
        kept.append({"model": name, **asdict(case), **asdict(step), "total": asdict(step.total)})
        print(kinds_table(rows[-1][0], step) + "\n", flush=True)
    tokens = f"{arguments.sequences} × {arguments.length} tokens"
    print(f"{tokens}, bfloat16, recomputation, adamw_8bit, LoRA r{arguments.rank}; memory in GiB; device s: at least")
    print(table(HEAD, rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
