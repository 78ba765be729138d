"""Multiple choice by log-likelihood: {"question": …, "choices": […], "answer": …} as lines of JSON.

Each choice is read as the completion of its question, with the tokens that carry loss in a training (a chat template's,
or joined as they are). The token that ends an answer is among them, so that a choice isn't preferred for being the
beginning of another one. What the model would answer is the choice with the largest sum of log-probabilities
(accuracy), or with the largest mean per token (accuracy_normalized); the first of equal ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.common.errors import NibbleError
from quant.common.jsonfile import kind_of
from quant.common.words import counted, printable, shown
from train.config.row_paths import row_files
from train.data.chat import RenderError, Rendering
from train.data.labels import Labels, Plain
from train.data.load import Texts
from train.evaluate.request import CHOICES, Request
from train.evaluate.scores import Scores
from train.rows.bad_rows import BadRow, RowLog
from train.rows.files import Row, read_rows

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_Document = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class Question:
    """text, choices: as in the row. answer: number of the right choice, from 0."""

    file: str
    line: int
    text: str
    choices: list[str]
    answer: int


def parse_question(values: Mapping[str, Any], file: str = "", line: int = 0) -> Question:
    """Check one row. answer: the number of the choice (from 0), its text, or its letter. Raises BadRow."""
    for name in CHOICES:
        if name not in values:
            has = printable(", ".join(values), 200) or "nothing"
            raise BadRow("missing_field", f"no field '{name}'; the row has {has}")
    text, choices, answer = (values[name] for name in CHOICES)
    if not isinstance(text, str):
        raise BadRow("wrong_type", f"question must be text, got {kind_of(text)}")
    if not text.strip():
        raise BadRow("empty", "question is empty")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise BadRow("wrong_type", f"choices must be a list of two or more texts, got {shown(choices)}")
    if len(set(choices)) < len(choices):
        raise BadRow("equal_choices", f"two choices are the same: {shown(choices)}")
    number = answer
    if isinstance(answer, str):
        number = choices.index(answer) if answer in choices else _LETTERS.find(answer) if len(answer) == 1 else -1
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(choices):
        raise BadRow("wrong_answer", f"answer must be a choice's number (from 0), text or letter, got {shown(answer)}")
    return Question(file, line, text, choices, number)


class Questions:
    """documents: those of all choices of all questions, one after another; starts: where each question's begin."""

    def __init__(
        self, questions: list[Question], documents: list[_Document], rows: int, skipped: Counter[str], length: int
    ) -> None:
        self.questions, self.documents = questions, documents
        self.starts = np.cumsum([0, *(len(question.choices) for question in questions)])
        self._tokens = np.array([sum(mask[1:]) for _, mask in documents])
        files = list(dict.fromkeys(question.file for question in questions))
        self.about = {"data": files, "skipped_rows": dict(skipped), "sequence_length": length}
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
        self.unused = f"{counted(skipped.total(), 'row')} of {rows:,} not used: {reasons}" if skipped else ""

    @staticmethod
    def read(texts: Texts, request: Request, note: Callable[[str], None]) -> Questions:
        """A row that can't be used, or with a choice longer than data.sequence_length, is left out, and counted."""
        if request.rows is None or texts.settings.fields:
            raise NibbleError(
                f"multiple choice is read from --data FILE, whose columns are {', '.join(CHOICES)}: "
                "data.fields and data.eval_fraction have no meaning for it."
            )
        labels = Labels(texts.tokenizer, texts.template)
        log, rows = RowLog(texts.settings.on_bad_row, note), 0
        questions, documents = list[Question](), list[_Document]()
        for file in row_files(request.rows, request.key):
            for row in _json_rows(file.path, request.key):
                rows += 1
                try:
                    question, found = _documents_of(row, texts, labels)
                except BadRow as problem:
                    log.bad(row.file, row.line, problem)
                    continue
                questions.append(question)
                documents += found
        if not questions:
            first = f" The first: {log.skipped[0].detail}" if log.skipped else ""
            raise NibbleError(f"{request.key}: none of {counted(rows, 'row')} is a question that can be used.{first}")
        skipped = Counter(row.reason for row in log.skipped)
        return Questions(questions, documents, rows, skipped, texts.settings.sequence_length)

    def figures(self, scores: Scores) -> dict[str, float | int]:
        """accuracy, accuracy_normalized: share of the questions, by sums and by means per token."""
        right = np.array([question.answer for question in self.questions])
        by_sum, by_mean = (np.array([int(values.argmax()) for values in found]) for found in self._likelihoods(scores))
        return {
            "accuracy": float((by_sum == right).mean()),
            "accuracy_normalized": float((by_mean == right).mean()),
            "rows": len(self.questions),
            "choices": len(self.documents),
        }

    def shown(self, figures: dict[str, float | int]) -> dict[str, str]:
        """The figures as the terminal shows them, by the names of their lines."""
        return {
            "accuracy": f"{figures['accuracy']:.1%}",
            "by mean per token": f"{figures['accuracy_normalized']:.1%}",
            "questions": f"{figures['rows']:,}",
            "choices": f"{figures['choices']:,}",
        }

    def by_row(self, scores: Scores, base: Scores | None) -> list[dict[str, Any]]:
        """A record per question, first those whose answer is furthest below the best of the other choices."""
        sums, _ = self._likelihoods(scores)
        base_sums = self._likelihoods(base)[0] if base is not None else [None] * len(sums)
        found = []
        for question, values, before in zip(self.questions, sums, base_sums, strict=True):
            margin = float(values[question.answer] - np.delete(values, question.answer).max())
            record: dict[str, Any] = {"file": question.file, "line": question.line, "answer": question.answer}
            record |= {"chosen": int(values.argmax()), "margin": margin, "log_likelihoods": values.tolist()}
            if before is not None:
                record["base_log_likelihoods"] = before.tolist()
            found.append(record)
        return sorted(found, key=lambda record: record["margin"])

    def _likelihoods(self, scores: Scores) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
        """Of each question the choices' log-likelihoods, and their means per token."""
        bad = np.flatnonzero(~np.isfinite(scores.losses))
        if len(bad):
            question = self.questions[int(np.searchsorted(self.starts, bad[0], side="right")) - 1]
            raise NibbleError(
                f"{question.file}:{question.line}: a log-likelihood is {-scores.losses[bad[0]]}: the weights give "
                "numbers that are not finite.\nAre checkpoint and adapter whole, and of the same model?"
            )
        parts = self.starts[1:-1]
        return np.split(-scores.losses, parts), np.split(-scores.losses / self._tokens, parts)


def _json_rows(file: str, key: str) -> Sequence[Row]:
    if not file.lower().removesuffix(".gz").endswith((".json", ".jsonl")):
        raise NibbleError(f"{key}: {file}: questions with choices are read from .jsonl or .json (also with .gz).")
    return list(read_rows(file, form="text", key=key))


def _documents_of(row: Row, texts: Texts, labels: Labels) -> tuple[Question, list[_Document]]:
    """A question, and of each of its choices the tokens and which of them carry loss. Raises BadRow."""
    if row.problem is not None:
        raise row.problem
    assert row.values is not None
    question = parse_question(row.values, row.file, row.line)
    made: list[Plain | Rendering] = []
    if texts.template is None:
        made += [Plain(question.text + choice, len(question.text)) for choice in question.choices]
    else:
        asked = {"role": "user", "content": question.text}
        turns = [([asked, {"role": "assistant", "content": one}], [False, True], None) for one in question.choices]
        for found in texts.template.renderings_of(turns):
            if isinstance(found, RenderError):
                raise BadRow("template_error", f"the chat template refuses the row: {found}")
            if not found:
                raise BadRow("nothing_to_learn", "the chat template writes nothing for a choice")
            made.append(found[0])
    encoded = texts.tokenizer.encode_batch([one.text for one in made])
    documents = []
    for text, one in zip(made, encoded, strict=True):
        ids, mask = labels.of(text, one)
        documents.append((ids, mask.tolist()))
    longest, limit = max(len(ids) for ids, _ in documents), texts.settings.sequence_length
    if longest > limit:
        raise BadRow("too_long", f"{longest:,} tokens with a choice, more than data.sequence_length {limit:,}")
    if not all(any(mask[1:]) for _, mask in documents):
        raise BadRow("nothing_to_learn", "a choice has no token of its own")
    return question, documents
