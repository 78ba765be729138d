"""Tables and verdicts from measurements: text only, no measuring."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from quant.common.errors import NibbleError

MiB = 1 << 20

SPEED_TARGET = 3.0  # times the better backend's tokens per second
MEMORY_TARGET = 0.5  # of the more frugal backend's peak above the imports
# Both sides start from the same weights and tokens. The peer quantises the scales of a whole stack of experts with
# one offset where this project has one per expert, so their first losses differ by some 1e-5 in float32 already.
LOSS_TOLERANCE = {"float32": 3e-4, "bfloat16": 1e-3}

Result = dict[str, Any]  # benchmarks.measure.Measured as JSON


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        first, *rest = (
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def tokens_per_second(result: Result, tokens: int) -> float:
    return tokens / statistics.median(result["seconds"])


def above_imports(result: Result) -> int:
    """Peak resident bytes of the whole run, loading included, above those after the imports."""
    return max(result["load_peak"], result["step_peak"]) - result["imports"]


def summary(results: Sequence[Result], tokens: int) -> dict[str, float]:
    """One side over its repetitions: medians, and the slowest and fastest repetition."""
    speeds = [tokens_per_second(result, tokens) for result in results]
    return {
        "tokens_per_second": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "peak": statistics.median(above_imports(result) for result in results),
        "load_peak": statistics.median(result["load_peak"] - result["imports"] for result in results),
        "step_peak": statistics.median(result["step_peak"] - result["imports"] for result in results),
        "load_seconds": statistics.median(result["load_seconds"] for result in results),
        "imports": statistics.median(result["imports"] for result in results),
    }


def different_work(native: Result, peer: Result) -> str:
    """What the peer holds or trains otherwise, or ""."""
    different = [
        f"{what} is {peer[what]}, here {native[what]}"
        for what in ("parameters", "trainable", "tensors", "trainable_dtype")
        if native[what] != peer[what]
    ]
    return "; ".join(different)


def check_equal_work(native: Result, peer: Result, name: str, dtype: str) -> None:
    """Raises NibbleError unless both sides held and trained as many parameters and started from the same loss."""
    if different := different_work(native, peer):
        raise NibbleError(f"{name} doesn't do the same work: {different}.")
    ours, theirs = native["losses"][0], peer["losses"][0]
    if not abs(ours - theirs) <= LOSS_TOLERANCE[dtype] * abs(ours):
        raise NibbleError(f"{name} doesn't compute the same: its first loss is {theirs:.5f}, here it is {ours:.5f}.")
    # B starts at zero, so the first step gives A no gradient.
    if native["moved"] != native["tensors"] and len(native["losses"]) > 1:
        raise NibbleError(f"only {native['moved']} of {native['tensors']} trained tensors changed in the native steps.")


def step_table(sides: dict[str, list[Result]], tokens: int) -> str:
    """`sides` maps a name to its repetitions; the first is the native side, to which the ratios refer."""
    names = list(sides)
    ours = summary(sides[names[0]], tokens)
    rows = []
    for name in names:
        s = summary(sides[name], tokens)
        own = name == names[0]
        rows.append(
            [
                name,
                f"{s['tokens_per_second']:,.0f}",
                f"{s['slowest']:,.0f} to {s['fastest']:,.0f}",
                "" if own else f"{ours['tokens_per_second'] / s['tokens_per_second']:.2f}",
                f"{s['peak'] / MiB:,.0f}",
                "" if own else f"{ours['peak'] / s['peak']:.2f}",
                f"{s['load_peak'] / MiB:,.0f}",
                f"{s['step_peak'] / MiB:,.0f}",
                "" if own else f"{ours['step_peak'] / s['step_peak']:.2f}",
                f"{s['load_seconds']:.1f}",
            ]
        )
    head = ["", "tokens/s", "repetitions", "ratio", "peak MiB", "ratio", "loading", "steps", "ratio", "load s"]
    return table(head, rows)


def verdict(sides: dict[str, list[Result]], tokens: int) -> list[str]:
    """The targets and whether they are met. Needs at least one peer."""
    native, *peers = ((name, summary(results, tokens)) for name, results in sides.items())
    ours = native[1]
    fastest, fast = max(peers, key=lambda pair: pair[1]["tokens_per_second"])
    frugal_name, frugal = min(peers, key=lambda pair: pair[1]["peak"])
    speed = ours["tokens_per_second"] / fast["tokens_per_second"]
    memory = ours["peak"] / frugal["peak"]
    return [
        f"speed   {speed:.2f} times {fastest}, the fastest; "
        f"target {SPEED_TARGET:g} times: {_met(speed >= SPEED_TARGET)}",
        f"memory  {memory:.2f} of {frugal_name}'s peak above the imports, the smallest; "
        f"target {MEMORY_TARGET:g} at most: {_met(memory <= MEMORY_TARGET)}",
    ]


def _met(reached: bool) -> str:
    return "met" if reached else "MISSED"


def profile_text(found: dict[str, Any]) -> str:
    """What benchmarks.profile measured, as three tables."""
    phases = found["phases"]
    total = sum(phases.values())
    blocks = [table(["phase", "ms", "share"], [[name, f"{ms:,.0f}", _share(ms, total)] for name, ms in phases.items()])]
    parts = sorted(found["parts"].items(), key=lambda item: -item[1]["step"])
    blocks.append(
        table(
            ["part, alone", "forward ms", "backward ms", "in a step", "share"],
            [
                [name, *(f"{ms[key]:,.0f}" for key in ("forward", "backward", "step")), _share(ms["step"], total)]
                for name, ms in parts
            ],
        )
    )
    operations = found["operations"]
    inside = sum(operations.values())
    blocks.append(
        table(["operation", "ms", "share"], [[n, f"{ms:,.0f}", _share(ms, inside)] for n, ms in operations.items()])
    )
    return "\n\n".join(blocks)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"
