"""What became of the tokens in the experts: a record for metrics.jsonl, and the last ones of a run as a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from models.blocks.usage import Usage
from models.inspect.heatmap import Panel, heat_map
from train.output.metrics import Record

TRAINING, HELD_OUT = "train_usage", "eval_usage"  # kinds of records


def usage_record(usage: Usage, kind: str, step: int) -> Record:
    """router_entropy: mean over layers, in nats. dead_experts: share of all layers' experts. The lists are by layer."""
    return {
        "kind": kind,
        "step": step,
        "tokens": usage.tokens,
        "router_entropy": fmean(usage.entropy),
        "dead_experts": fmean(usage.dead),
        "layers": usage.layers,
        "entropy": usage.entropy,
        "dead": usage.dead,
        "counts": usage.counts,
    }


def usage_map(records: Sequence[Record], path: Path, title: str) -> None:
    """Write a heat map of the first and the last evaluation and the last training step that were counted, as a PNG;
    without any, nothing. Raises NibbleError when the disk is full or not writable.
    """
    held_out, training = ([r for r in records if r["kind"] == kind] for kind in (HELD_OUT, TRAINING))
    first = held_out[:1] if len(held_out) > 1 else []
    panels = [_panel(record) for record in (*first, *held_out[-1:], *training[-1:])]
    if panels:
        heat_map(panels, path, title, zero="no token")


def _panel(record: Record) -> Panel:
    """Relative to an even load, so that 1 is even for every number of experts."""
    counts, step = record["counts"], record["step"]
    rows = "held-out rows after" if record["kind"] == HELD_OUT else "training,"
    return Panel(
        f"{rows} step {step:,}: {record['tokens']:,} tokens, entropy {record['router_entropy']:.2f} of "
        f"{math.log(len(counts[0])):.2f}, {record['dead_experts']:.1%} of the experts without a token",
        [str(layer) for layer in record["layers"]],
        [[count * len(row) / max(1, sum(row)) for count in row] for row in counts],
        unit="tokens / even load",
    )
