"""Tables of `benchmarks.gpu`: text only, no measuring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.gpu_cases import OUT_OF_MEMORY, Case
from benchmarks.gpu_process import Outcome
from benchmarks.report import different_work, table

GiB = 1 << 30


def timing_table(found: Sequence[dict[str, Any]]) -> str:
    rows = []
    for timing in found:
        if timing["note"]:
            rows.append([timing["name"], "", "", timing["note"]])
        else:
            peak = f"{timing['peak'] / (1 << 20):,.0f}" if timing["peak"] else ""
            rows.append([timing["name"], f"{timing['forward']:.2f}", f"{timing['backward']:.2f}", peak])
    return table(["operation", "forward ms", "backward ms", "peak MiB above the inputs"], rows)


def check_line(check: dict[str, Any]) -> str:
    word = {True: "pass", False: "FAIL", None: "skip"}[check["passed"]]
    return f"{word}  {check['name']}: {check['figure']}"


def case_table(outcomes: Sequence[Outcome]) -> str:
    """Of one group."""
    rows = []
    for outcome in outcomes:
        found, published = outcome.result, outcome.case.published
        if found is None:
            short = "out of memory" if outcome.reason == OUT_OF_MEMORY else "no result"
            rows.append([outcome.case.name, "", short, "", published, "", "", "", ""])
            continue
        rows.append(
            [
                outcome.case.name,
                f"{found['trainable'] / 1e6:,.1f}",
                f"{found['peak'] / GiB:.2f}",
                f"{found['reserved'] / GiB:.2f}",
                published,
                f"{found['tokens_per_second']:,.0f}",
                f"{min(found['seconds']):.2f} to {max(found['seconds']):.2f}",
                f"{found['update_ms']:.0f}",
                f"{found['busiest_expert']:.1f}" if "busiest_expert" in found else "",
            ]
        )
    head = ["", "trained M", "peak", "reserved", "published", "tokens/s", "s per step", "update ms", "busiest"]
    head[0] = outcomes[0].group
    built = next((outcome.result for outcome in outcomes if outcome.result), None)
    made = f"weights {built['weights'] / GiB:.2f} GiB, made in {built['build_seconds']:.0f} s\n" if built else ""
    said = ((o.case.name, o.reason or (o.result or {}).get("graph")) for o in outcomes)
    reasons = [f"{name}: {text}\n" for name, text in said if text]
    return made + "".join(reasons) + table(head, rows)


def work_of(case: Case) -> Case:
    """What both sides are asked to do in it."""
    return replace(case, words=(), published="", kernels="auto", graph=False)


def peer_table(outcomes: Sequence[Outcome]) -> tuple[str, list[str]]:
    """The peer's cases beside ours that do the same work, and a line for each that doesn't."""
    ours = {
        (outcome.group, work_of(outcome.case)): outcome.result
        for outcome in reversed(outcomes)  # the first of two counts: with our kernels
        if outcome.result and not outcome.peer
    }
    rows, unequal = [], []
    for outcome in outcomes:
        theirs = outcome.result
        own = ours.get((outcome.group.removesuffix(", the peer"), work_of(outcome.case)))
        if not outcome.peer or theirs is None or own is None:
            continue
        if different := different_work(own, theirs):
            unequal.append(f"{outcome.name} doesn't do the same work: {different}.")
        speeds = (own["tokens_per_second"], theirs["tokens_per_second"])
        peaks = (own["peak"] / GiB, theirs["peak"] / GiB)
        rows.append(
            [
                outcome.case.name,
                *(f"{speed:,.0f}" for speed in speeds),
                f"{speeds[0] / speeds[1]:.2f}",
                *(f"{peak:.2f}" for peak in peaks),
                f"{peaks[0] / peaks[1]:.2f}",
                f"{theirs['learning']} of {theirs['tensors']}",
            ]
        )
    head = ["", "tokens/s", "peer's", "ratio", "peak GiB", "peer's", "ratio", "peer's tensors that learn"]
    return table(head, rows) if rows else "", unequal


def kernels_text(outcomes: Sequence[Outcome]) -> str:
    blocks = []
    for outcome in outcomes:
        kernels = (outcome.result or {}).get("kernels")
        if kernels:
            rows = [[name[:90], f"{ms:,.1f}", f"{calls:,}"] for name, ms, calls in kernels]
            blocks.append(table([outcome.name, "ms", "calls"], rows))
    return "\n\n".join(blocks)
