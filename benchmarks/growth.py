"""`python -m benchmarks.growth`: how a step's launches, memory and device time grow, counted without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import run_command
from benchmarks.launches_cases import KERNELS, LaunchCase, full_config
from benchmarks.report import table
from quant.common.errors import NibbleError
from quant.common.files import check_outputs

ARCHITECTURE, MODEL = "glm4_moe_lite", "GLM-4.7-Flash"
# What grows: its words on the axis, and its values.
GROWTHS: dict[str, tuple[str, tuple[int, ...]]] = {
    "tokens": ("tokens, in sequences of 1024", (1024, 2048, 4096, 8192, 16384, 32768)),
    "length": ("tokens of one sequence", (1024, 2048, 4096, 8192, 16384, 32768)),
    "experts": ("experts of a layer, 4 of them chosen", (8, 16, 32, 64, 128, 256)),
    "rank": ("rank of LoRA", (4, 8, 16, 32, 64, 128)),
}
FIGURES = {"launches": "launches of a step", "peak": "peak memory, GiB", "seconds": "device, at least, s"}
FORMS = {"triton": "our kernels", "torch": "torch's forms"}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description=f"One training step of {MODEL} (nf4, bfloat16 LoRA on attention and all experts, 2 × 2048 tokens,\n"
        "rank 32, but for what grows) on meta tensors as in benchmarks.launches, with our kernels and in torch's\n"
        "forms. Needs no GPU; a point takes 10 to 20 s of one CPU.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("what", choices=tuple(GROWTHS), help="what grows")
    made.add_argument("--plot", type=Path, metavar="FILE", help="a plot, .png or .svg")
    made.add_argument("--json", type=Path, metavar="FILE", help="the figures")
    made.add_argument("--values", type=int, nargs="+", metavar="N", help="in place of the usual ones")
    made.add_argument("--layers", type=int, help="fewer layers than the model has")
    return made


def case_of(what: str, value: int, kernels: str, layers: int | None) -> LaunchCase:
    config = full_config(ARCHITECTURE, layers)
    if what == "experts":
        return LaunchCase(config | {"n_routed_experts": value}, kernels=kernels)
    if what == "rank":
        return LaunchCase(config, rank=value, kernels=kernels)
    sequences, length = (1, value) if what == "length" else (max(1, value // 1024), min(value, 1024))
    return LaunchCase(config, sequences=sequences, length=length, kernels=kernels)


def points(what: str, values: Sequence[int], layers: int | None) -> list[dict[str, Any]]:
    from benchmarks.launches_step import measure  # imports torch

    found = []
    for kernels in KERNELS:
        for value in values:
            step = measure(case_of(what, value, kernels, layers))
            total = step.total
            figures = {"launches": total.launches, "peak": step.peak / 2**30, "seconds": total.seconds}
            found.append({"value": value, "kernels": kernels, **figures})
            print(f"{what} {value}, {FORMS[kernels]}: {total.launches:,}", file=sys.stderr, flush=True)
    return found


def plot(what: str, found: Sequence[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(FIGURES)), FIGURES.items(), strict=True):
        for kernels, style in zip(KERNELS, ("o-", "s--"), strict=True):
            own = [point for point in found if point["kernels"] == kernels]
            axes.plot([p["value"] for p in own], [p[name] for p in own], style, markersize=4, label=FORMS[kernels])
        axes.set_xlabel(GROWTHS[what][0])
        axes.set_title(label, fontsize="medium")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=80)


def run(arguments: argparse.Namespace) -> int:
    check_outputs({"--json": arguments.json, "--plot": arguments.plot}, [])
    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        raise NibbleError(f"--plot {arguments.plot}: the name of a plot ends in .png or .svg.")
    values = arguments.values or GROWTHS[arguments.what][1]
    if min(*values, arguments.layers or 1, 1) < 1:
        raise NibbleError("--values and --layers are numbers from 1 on.")
    found = points(arguments.what, values, arguments.layers)
    rows = [
        [f"{p['value']:,}, {FORMS[p['kernels']]}", f"{p['launches']:,}", f"{p['peak']:.2f}", f"{p['seconds']:.2f}"]
        for p in found
    ]
    print(table([GROWTHS[arguments.what][0], *FIGURES.values()], rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        plot(arguments.what, found, arguments.plot)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
