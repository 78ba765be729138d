"""The loss curve of a run: training and held-out loss over the steps."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

from quant.common.files import write_atomically
from quant.common.words import printable
from train.output.metrics import Record


def loss_curve(records: Sequence[Record], path: Path, title: str) -> None:
    """Write the loss curve of these records (metrics.jsonl's) to `path` as a PNG of 960 × 540 pixels.

    A training loss of 40 records or more is drawn faintly, with its running mean above it.
    Raises NibbleError when the disk is full or not writable; an existing file is then unchanged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [(int(r["step"]), float(r["loss"])) for r in records if r["kind"] == "train"]
    held_out = [(int(r["step"]), float(r["loss"])) for r in records if r["kind"] == "eval"]

    # Figure rather than pyplot: pyplot keeps every figure in a global list and picks a backend for the process.
    figure = Figure(figsize=(9.6, 5.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        noisy = len(losses) >= 40
        smooth = _running_mean(losses, reach=len(losses) // 40) if noisy else losses
        axes.plot(steps, losses, color="tab:blue", alpha=0.3 if noisy else 1.0, label=None if noisy else "training")
        if noisy:
            axes.plot(steps, smooth, color="tab:blue", label="training (running mean)")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, color="tab:orange", marker="o", label="held-out")
        for step, loss in (held_out[0], held_out[-1]) if len(held_out) > 1 else (held_out[0],):
            axes.annotate(f"{loss:.3f}", (step, loss), xytext=(0, 8), textcoords="offset points", ha="center")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per labelled token (nats)")
    axes.set_title(printable(title, 80).replace("$", r"\$"))  # between two $ matplotlib reads a formula
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.12)  # room for the annotations
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend(frameon=False)

    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_atomically(path, data.getvalue())


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Centred running mean over up to `reach` values on either side; a trailing mean would lag."""
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]
