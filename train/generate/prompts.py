"""A file of prompts, answered in batches of like lengths, into a file of rows in the same order."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quant.common.errors import NibbleError
from quant.common.files import PARTIAL, check_outputs, disk_errors, write_atomically
from quant.common.jsonfile import kind_of
from quant.common.progress import Bar
from quant.common.terminal import say
from quant.common.words import counted, printable
from train.generate.answers import Answer, Answerer
from train.generate.batches import Batches
from train.rows.bad_rows import BadRow
from train.rows.files import Row, read_rows
from train.rows.parse import parse_unanswered

ADDED = ("text", "tokens", "finish")
_SHOWN = 10  # bad rows


@dataclass(frozen=True)
class Prompt:
    """A row with the tokens that ask for its answer."""

    values: dict[str, Any]
    tokens: list[int]


def check_names(prompts: str, out: str, inputs: Sequence[str | None]) -> None:
    """Before a model is loaded: can `out` be written? inputs: what else is read. Raises NibbleError with the option."""
    if Path(prompts).name.lower().endswith(".parquet"):
        raise NibbleError(f"--prompts: {prompts} is a parquet file; rows are read from .jsonl, .json or .csv.")
    check_outputs({"--out": out}, [prompts, *inputs])
    if Path(out).exists():
        raise NibbleError(f"--out: {out} is there already. Choose another name, or remove it.")


def answer_file(answerer: Answerer, prompts: str, out: str, batch_size: int) -> None:
    """Write to `out` every row of `prompts` with `text`, `tokens` and `finish`; whole, or not at all.

    Batches that are done are kept beside it until then, and a call with the same arguments goes on after them. Raises
    NibbleError, before anything is answered, where a row can't be (each is named on standard error), and where what is
    kept is of other arguments.
    """
    asked = read_prompts(answerer, prompts)
    path = Path(out)
    done = Batches(path.with_name(path.name + PARTIAL), _identity(answerer, asked, batch_size))
    answers = _answers(answerer, [prompt.tokens for prompt in asked], batch_size, done)
    rows = [
        prompt.values | {"text": answer.text, "tokens": answer.tokens, "finish": answer.finish}
        for prompt, answer in zip(asked, answers, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    whole = path.with_name(path.name + ".whole")  # `done` has the name that write_atomically would take
    write_atomically(whole, lines.encode("utf-8", "backslashreplace"))
    with disk_errors(path):
        whole.replace(path)
        done.path.unlink(missing_ok=True)


def _identity(answerer: Answerer, asked: Sequence[Prompt], batch_size: int) -> str:
    """The same for the same answers, but for what is drawn without a seed."""
    settings = replace(answerer.settings, stop_ids=frozenset())
    parts = [answerer.made_of, repr(settings), sorted(answerer.settings.stop_ids), answerer.longest, batch_size]
    rows = [[prompt.values, prompt.tokens] for prompt in asked]
    return hashlib.sha256(json.dumps([*parts, rows]).encode()).hexdigest()


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
        if not {"messages", "conversations"} & values.keys():
            has = printable(", ".join(values), 200) or "nothing"
            raise BadRow("missing_field", f"no field 'prompt' or 'messages'; the row has {has}")
        messages, tools = parse_unanswered(values)
        return Prompt(values, answerer.tokens_of_messages(messages, tools))
    prompt = values["prompt"]
    if not isinstance(prompt, str):
        raise BadRow("wrong_type", f"prompt is {kind_of(prompt)}, expected text")
    if "messages" in values:
        raise BadRow("both", "the row has prompt and messages; it is not clear which to answer")
    return Prompt(values, answerer.tokens_of_prompt(prompt))


def _answers(answerer: Answerer, prompts: Sequence[Sequence[int]], batch_size: int, done: Batches) -> list[Answer]:
    """The answers, in the order of the prompts. The longest are computed first: memory runs out soon or never."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: dict[int, Answer] = {}
    starts = []
    for start in range(0, len(order), batch_size):
        if start in done.found:
            answers |= dict(zip(order[start : start + batch_size], done.found[start], strict=True))
        else:
            starts.append(start)
    if answers:
        say(f"{done.path}: {counted(len(answers), 'row')} of {len(order):,} are done already", sys.stderr)
    if starts:
        _ = answerer.model  # which takes its own time
    began, tokens = time.monotonic(), 0
    with Bar("generating") as bar:
        for start in starts:
            batch = order[start : start + batch_size]
            # What is drawn depends on the seed and `start` alone, so not on what was done before.
            found = answerer.answer([prompts[i] for i in batch], turn=start)
            done.add(start, found)
            answers |= dict(zip(batch, found, strict=True))
            tokens += sum(len(answer.tokens) for answer in found)
            bar.update(len(answers), len(order))
    speed = f", {tokens / (time.monotonic() - began):,.1f} a second" if starts else ""
    say(f"{counted(len(answers), 'row')}, {counted(tokens, 'new token')}{speed}", sys.stderr)
    return [answers[index] for index in range(len(prompts))]
