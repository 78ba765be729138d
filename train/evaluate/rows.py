"""Loss, perplexity and token accuracy on rows of text, for all of them together and for each."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from quant.common.errors import NibbleError
from quant.common.words import counted
from train.config.row_paths import row_files
from train.data.examples import DataReport, Examples
from train.data.load import Texts, held_out_part
from train.data.mixture import repeated
from train.evaluate.request import Request
from train.evaluate.scores import Scores

_LARGEST = 700.0  # nats: e to the power of more is no number in JSON


@dataclass(frozen=True)
class Place:
    """Where a row is."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class HeldOutRows:
    """Rows that a training would read, as a training reads them."""

    def __init__(self, examples: Examples, report: DataReport, files: list[str], length: int) -> None:
        self.documents, self._report, self._files = examples, report, files
        self._ends = list(accumulate(report.file_rows))
        skipped = Counter(row.reason for row in report.skipped_rows)
        self.about: dict[str, Any] = {
            "data": files,
            "skipped_rows": dict(skipped),
            "cut": report.cut,
            "split": report.split,
            "lost": report.lost,
            "sequence_length": length,
        }
        self.unused = _unused(report, skipped, length)

    @staticmethod
    def read(texts: Texts, request: Request, note: Callable[[str], None]) -> HeldOutRows:
        settings = texts.settings
        value, key = (settings.train, "data.train") if request.rows is None else (request.rows, request.key)
        found, report = texts.read(value, key, note)
        if request.rows is None:
            assert settings.eval_fraction is not None
            _, examples = held_out_part(found, settings.eval_fraction, texts.seed)
        else:
            examples = repeated(*found)
        return HeldOutRows(examples, report, [file.path for file in row_files(value, key)], settings.sequence_length)

    def figures(self, scores: Scores) -> dict[str, float | int | None]:
        """Means over all tokens that carry loss; loss in nats. perplexity: None where it is no number any more.

        Raises NibbleError, naming a row, where the loss isn't finite.
        """
        examples = self.documents
        bad = np.flatnonzero(~np.isfinite(scores.losses))
        if len(bad):
            raise NibbleError(
                f"the loss of {self._place(int(examples.rows[bad[0]]))} is {scores.losses[bad[0]]}, and that of "
                f"{counted(len(bad), 'document')} of {len(examples):,} is no finite number.\nThe weights give numbers "
                "that are not finite: are checkpoint and adapter whole, and of the same model?"
            )
        loss = float(scores.losses.sum()) / examples.total_labelled
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < _LARGEST else None,
            "token_accuracy": int(scores.correct.sum()) / examples.total_labelled,
            "tokens": examples.total_labelled,
            "rows": examples.total_rows,
        }

    def shown(self, figures: dict[str, float | int | None]) -> dict[str, str]:
        """The figures as the terminal shows them, by the names of their lines."""
        perplexity = figures["perplexity"]
        return {
            "loss": f"{figures['loss']:.4f}",
            "perplexity": "–" if perplexity is None else f"{perplexity:.3f}",
            "token accuracy": f"{figures['token_accuracy']:.1%}",
            "tokens with loss": f"{figures['tokens']:,}",
            "rows": f"{figures['rows']:,}",
        }

    def by_row(self, scores: Scores, base: Scores | None) -> list[dict[str, Any]]:
        """A record per row, the largest mean loss first; a row that is read several times (a weight) is one."""
        examples = self.documents
        rows, owner = np.unique(examples.rows, return_inverse=True)
        tokens = np.bincount(owner, examples.labelled)
        columns = {"loss": np.bincount(owner, scores.losses) / tokens}
        columns["token_accuracy"] = np.bincount(owner, scores.correct) / tokens
        if base is not None:
            columns["base_loss"] = np.bincount(owner, base.losses) / tokens
        found = []
        for index in np.argsort(-columns["loss"], kind="stable"):
            place = self._place(int(rows[index]))
            record = {"file": place.file, "line": place.line, "tokens": int(tokens[index])}
            found.append({**record, **{name: float(column[index]) for name, column in columns.items()}})
        return found

    def _place(self, row: int) -> Place:
        return Place(self._files[bisect_right(self._ends, row)], self._report.lines[row])


def _unused(report: DataReport, skipped: Counter[str], length: int) -> str:
    """What isn't in the figures, or only in part."""
    parts = []
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
        parts.append(f"{counted(sum(skipped.values()), 'row')} of {report.rows:,} not used: {reasons}")
    for count, what in (
        (report.cut, f"cut to {length:,} tokens (data.sequence_length)"),
        (report.split, f"split into documents of at most {length:,} tokens (data.sequence_length)"),
        (report.lost, f"with nothing to learn within {length:,} tokens (data.sequence_length) left out"),
    ):
        if count:
            parts.append(f"{counted(count, 'example')} {what}")
    return "\n".join(parts)
