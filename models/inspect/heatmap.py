"""Heat maps as a PNG: rows of numbers, in which zeros stand out."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.common.files import write_atomically
from quant.common.words import printable


@dataclass(frozen=True)
class Panel:
    """One map. rows: their labels; values: a row of numbers for each, None where there is nothing, all as long as the
    others. columns: labels, or empty, for numbers. unit: of the values.
    """

    title: str
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    columns: Sequence[str] = ()
    unit: str = ""


def heat_map(panels: Sequence[Panel], path: Path, title: str, across: str = "expert", zero: str = "zero") -> None:
    """Write the panels, one below the other, to `path` as a PNG. across: what the numbered columns count; zero: what a
    zero means. Zeros are red, what isn't there is grey.

    Raises NibbleError when the disk is full or not writable; an existing file is then unchanged.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    heights = [0.8 + 0.16 * max(6, len(panel.rows)) + 0.6 * bool(panel.columns) for panel in panels]
    # Figure rather than pyplot: pyplot keeps every figure in a global list and picks a backend for the process.
    figure = Figure(figsize=(9.6, 0.8 + sum(heights)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, axes in zip(
        panels, figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0], strict=True
    ):
        values = np.array([[np.nan if value is None else value for value in row] for row in panel.values], dtype=float)
        axes.set_facecolor("lightgrey")
        shown = axes.imshow(np.ma.masked_where(~(values > 0), values), aspect="auto", interpolation="none", vmin=0)
        figure.colorbar(shown, ax=axes, label=panel.unit)
        axes.imshow(
            np.ma.masked_where(values != 0, values), cmap=ListedColormap(["red"]), aspect="auto", interpolation="none"
        )
        every = max(1, -(-len(panel.rows) // 24))
        axes.set_yticks(range(0, len(panel.rows), every), list(panel.rows)[::every], fontsize=7)
        if panel.columns:
            axes.set_xticks(range(len(panel.columns)), panel.columns, rotation=30, ha="right", fontsize=7)
        else:
            axes.set_xlabel(across)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("layer")
        axes.set_title(_plain(panel.title), fontsize=9)
        if (values == 0).any():
            axes.legend(handles=[Patch(color="red", label=zero)], loc="upper right", fontsize=7)
    figure.suptitle(_plain(title))
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_atomically(path, data.getvalue())


def _plain(text: str) -> str:
    return printable(text, 90).replace("$", r"\$")  # between two $ matplotlib reads a formula
