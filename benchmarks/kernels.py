"""`python -m benchmarks.kernels`: what the Triton kernels of a training step compile to, for cards that aren't here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.command import run_command
from benchmarks.launches_cases import FULL, STORAGES
from benchmarks.report import table
from quant.common.errors import NibbleError

if TYPE_CHECKING:
    from benchmarks.compiled import Built
    from benchmarks.launches_step import Step

CARDS = {"80": "A100", "86": "RTX 3090", "89": "RTX 4090", "90": "H100", "100": "B200", "120": "RTX 5090"}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description="Takes a training step of a full-size model on meta tensors, compiles every kernel that it would\n"
        "launch, as it would be launched, and shows what that uses on each card. Exit code 1 where registers spill,\n"
        "where shared memory is larger than the card's, or where a product doesn't use the tensor cores. Then, for\n"
        "each operator, the work of one launch: bytes, operations and the time that an H100 needs for them at\n"
        "least. A kernel takes 1 to 2 s of one CPU. Needs Triton and no GPU.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--arch", nargs="+", choices=tuple(FULL), default=["glm4_moe_lite"], help="default: glm4_moe_lite")
    add("--all", action="store_true", help="every architecture")
    add("--storage", nargs="+", choices=STORAGES, default=["nf4"], help="of the frozen weights (default: nf4)")
    cards = ", ".join(f"{number} ({name})" for number, name in CARDS.items())
    add("--target", nargs="+", choices=tuple(CARDS), default=list(CARDS), help=f"compute capabilities: {cards}")
    add("--only", nargs="+", metavar="KERNEL", help="kernels whose names begin so")
    return made


HEAD = ("kernel", "card", "launches", "registers", "spills", "shared KiB", "widest load", "tensor cores", "")


def row_of(built: Built) -> list[str]:
    code = built.code
    products = ", ".join(sorted({name.split(".")[0] for name in code.products})) if code.products else ""
    return [
        built.name,
        f"{10 * built.capability[0] + built.capability[1]}",
        f"{built.launches:,}",
        f"{code.registers}",
        f"{code.spills}",
        f"{code.shared / 1024:.0f}",
        f"{code.widest}",
        products,
        built.fault or "",
    ]


def work_table(name: str, step: Step) -> str:
    """Of our operators: the mean launch."""
    from quant.kernels.choice import KERNELS

    rows = []
    for operator, total in step.operators.items():
        if operator in KERNELS:
            each = (total.bytes / 2**20, total.operations / 1e9, 1e6 * total.seconds)
            rows.append([operator, f"{total.launches:,}", *(f"{value / total.launches:,.1f}" for value in each)])
    return table([f"{name}: two layers", "launches", "MiB each", "GFLOP each", "µs each, at least"], rows)


def run(arguments: argparse.Namespace) -> int:
    try:
        import triton  # noqa: F401  before the kernels, which then are Triton's
    except ImportError as error:
        raise NibbleError("Triton is not installed.\nInstall it: pip install triton") from error
    from benchmarks.compiled import build_all, step_of

    archs = list(FULL) if arguments.all else arguments.arch
    targets = [(int(number[:-1]), int(number[-1])) for number in arguments.target]
    rows, faults = [], 0
    for built in build_all(archs, arguments.storage, targets, tuple(arguments.only or ("",))):
        rows.append(row_of(built))
        faults += built.fault is not None
        print(f"{len(rows)} compiled: {built.name}", end="\r", file=sys.stderr, flush=True)
    print(table(HEAD, rows))
    print(f"{len(rows)} compiled, {faults} with a fault")
    for arch in archs:
        for storage in arguments.storage:
            print(f"\n{work_table(f'{FULL[arch][0]}, {storage}', step_of(arch, storage))}")
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
