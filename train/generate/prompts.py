"""A file of prompts, answered in batches of like lengths, into a file of rows in the same order."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.common.errors import NibbleError
from quant.common.files import disk_errors, write_atomically
from quant.common.jsonfile import kind_of
from quant.common.progress import Bar
from quant.common.terminal import say
from quant.common.words import counted, printable
from train.generate.answers import Answer, Answerer
from train.rows.bad_rows import BadRow
from train.rows.files import Row, read_rows
from train.rows.parse import parse_question

ADDED = ("text", "tokens", "finish")
_SHOWN = 10  # bad rows


@dataclass(frozen=True)
class Prompt:
    """A row with the tokens that ask for its answer."""

    values: dict[str, Any]
    tokens: list[int]


def check_names(prompts: str, out: str) -> None:
    """Before a model is loaded: can `out` be written? Raises NibbleError naming the option."""
    path = Path(out)
    if Path(prompts).name.lower().endswith(".parquet"):
        raise NibbleError(f"--prompts: {prompts} is a parquet file; rows are read from .jsonl, .json or .csv.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise NibbleError(f"--out: {path} {'is a folder' if path.is_dir() else 'is in a folder that is not there'}.")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise NibbleError(f"--out: {path} can't be written: you may not write in its folder.")
    if path.exists():
        raise NibbleError(f"--out: {path} is there already. Choose another name, or remove it.")


def answer_file(answerer: Answerer, prompts: str, out: str, batch_size: int) -> None:
    """Write to `out` every row of `prompts` with `text`, `tokens` and `finish`; whole, or not at all.

    Raises NibbleError, before anything is answered, where a row can't be: each is named on standard error.
    """
    asked = read_prompts(answerer, prompts)
    answers = _answers(answerer, [prompt.tokens for prompt in asked], batch_size)
    rows = [
        prompt.values | {"text": answer.text, "tokens": answer.tokens, "finish": answer.finish}
        for prompt, answer in zip(asked, answers, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with disk_errors(Path(out)):
        write_atomically(Path(out), lines.encode("utf-8", "backslashreplace"))


def read_prompts(answerer: Answerer, file: str) -> list[Prompt]:
    """The rows of a file. Raises NibbleError for one that can't be answered, after all of them were looked at."""
    found: list[Prompt] = []
    bad = 0
    for row in read_rows(file, form="messages", key="--prompts"):
        try:
            found.append(_prompt(answerer, row))
        except (BadRow, NibbleError) as problem:
            bad += 1
            if bad <= _SHOWN:
                say(f"{printable(row.file)}:{row.line}: {str(problem).splitlines()[0]}", sys.stderr)
    if bad:
        raise NibbleError(
            f"{file}: {counted(bad, 'row')} can't be answered; nothing was generated.\nRepair or remove them."
        )
    if not found:
        raise NibbleError(f"--prompts: {file} has no rows.")
    return found


def _prompt(answerer: Answerer, row: Row) -> Prompt:
    if row.problem is not None:
        raise row.problem
    values = row.values or {}
    taken = next((name for name in ADDED if name in values), None)
    if taken is not None:
        raise BadRow("taken", f"the row has a field {taken!r}, which the answer would replace; rename it")
    if "prompt" not in values:
        messages, tools = parse_question(values)
        return Prompt(values, answerer.tokens_of_messages(messages, tools))
    prompt = values["prompt"]
    if not isinstance(prompt, str):
        raise BadRow("wrong_type", f"prompt is {kind_of(prompt)}, expected text")
    if "messages" in values:
        raise BadRow("both", "the row has prompt and messages; it is not clear which to answer")
    return Prompt(values, answerer.tokens_of_prompt(prompt))


def _answers(answerer: Answerer, prompts: Sequence[Sequence[int]], batch_size: int) -> list[Answer]:
    """The answers, in the order of the prompts. The longest are computed first: memory runs out soon or never."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: dict[int, Answer] = {}
    _ = answerer.model  # which takes its own time
    began = time.monotonic()
    with Bar("generating") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            answers |= dict(zip(batch, answerer.answer([prompts[i] for i in batch], turn=start), strict=True))
            bar.update(len(answers), len(order))
    tokens, seconds = sum(len(answer.tokens) for answer in answers.values()), time.monotonic() - began
    say(f"{counted(len(answers), 'row')}, {counted(tokens, 'new token')}, {tokens / seconds:,.1f} a second", sys.stderr)
    return [answers[index] for index in range(len(prompts))]
