"""Rows to tokenised examples: ids, and for every token whether it carries loss (train/data/labels.py).

Rows longer than data.sequence_length. A conversation or a prompt and its completion is cut: what would follow has lost
what it answers. A text is split into documents that fill the sequence, so that all of it is learnt: each begins with
the last token of the one before, which is learnt there and here is what the next token is predicted from.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quant.common.errors import NibbleError
from quant.common.words import some
from train.config.sections import Format
from train.data.chat import ChatTemplate, RenderError, Rendering
from train.data.labels import Labels, Plain
from train.data.packing import shuffled
from train.data.template_files import missing_template
from train.data.template_process import TemplateProcess
from train.data.tokenizer import Tokenizer
from train.rows.bad_rows import BadRow, RowLog, SkippedRow
from train.rows.columns import Columns
from train.rows.files import Row, read_rows
from train.rows.parse import Chat, Completion, Text, parse_row

_CHUNK = 512  # rows tokenised at a time: enough for the library's threads, little memory


@dataclass(frozen=True)
class Examples:
    """n tokenised examples over shared storage; subsets copy no tokens.

    tokens: int32 and mask: bool, all examples one after another; mask is True where a token carries loss.
    starts: int64 [n]; lengths: int32 [n]; rows: int64 [n], the row each is made from (a row of messages or a long text
    may make several); labelled: int32 [n], tokens that carry loss. The first token of an example has nothing before it
    to be predicted from, so it never does.
    """

    tokens: NDArray[np.int32]
    mask: NDArray[np.bool_]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]
    rows: NDArray[np.int64]
    labelled: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start = int(self.starts[index])
        stop = start + int(self.lengths[index])
        return self.tokens[start:stop], self.mask[start:stop]

    def subset(self, indices: NDArray[np.int64]) -> Examples:
        return replace(
            self,
            starts=self.starts[indices],
            lengths=self.lengths[indices],
            rows=self.rows[indices],
            labelled=self.labelled[indices],
        )

    @property
    def total_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def total_labelled(self) -> int:
        return int(self.labelled.sum(dtype=np.int64))

    @property
    def total_rows(self) -> int:
        return len(np.unique(self.rows))

    def fingerprint(self) -> str:
        """Changes when any token, mask or the choice of examples does; a resumed run compares it."""
        digest = hashlib.sha256()
        for values in (self.tokens, self.mask, self.starts, self.lengths):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class DataReport:
    """What became of the rows.

    rows: read, usable or not. cut: examples cut to sequence_length. split: texts longer than sequence_length, made into
    several examples. lost: examples of usable rows dropped because nothing to learn was left after cutting. file_rows:
    rows read of each file. lines: of each row read, its line in its file.
    """

    rows: int
    cut: int
    split: int
    lost: int
    skipped_rows: list[SkippedRow]
    file_rows: list[int]
    lines: Sequence[int]


def build_examples(
    files: str | Path | Sequence[str | Path],
    *,
    form: Format,
    tokenizer: Tokenizer,
    template: ChatTemplate | TemplateProcess | None,
    sequence_length: int,
    fields: Mapping[str, str] | None = None,
    key: str = "data.train",
    on_bad_row: Literal["skip", "error"] = "skip",
    warn: Callable[[str], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Examples, DataReport]:
    """Read, check and tokenise all rows of a file, or of several in their order; the same files give the same arrays.

    An example longer than sequence_length is cut to it if something to learn is left, else dropped; a text is split.
    warn: receives a line for a bad or cut row (see RowLog), one for all columns that no field reads, and one where the
    training rows don't teach to stop. progress: receives the share done, 0 to 1.
    Raises NibbleError for a file that can't be read, for the first bad row with on_bad_row "error", and when no row
    is usable, and for messages when there is no template.
    """
    if form == "messages" and template is None:
        raise missing_template(tokenizer.where)
    builder = _Builder(tokenizer, template, sequence_length, RowLog(on_bad_row, warn), form, fields)
    if warn is not None and key == "data.train" and not builder.labels.teach_stopping(form):
        templated = ", and the chat template ends a turn with none" if template is not None and form != "text" else ""
        warn(
            f"{tokenizer.where}: the model won't learn to stop. No token that ends a text is known: "
            "tokenizer_config.json has no eos_token, generation_config.json and config.json have no eos_token_id"
            f"{templated}."
        )
    files = [files] if isinstance(files, str | Path) else files
    columns, pending = Columns(form, fields or {}), list[Row]()
    for number, file in enumerate(files):
        count = 0
        for row in read_rows(file, form=form, fields=fields or {}, key=key, columns=columns):
            count += 1
            if row.values is not None:
                columns.add(row.values)
            pending.append(row)
            if len(pending) == _CHUNK:
                builder.add(pending)
                pending = []
                if progress is not None:
                    progress((number + row.done) / len(files))
        builder.file_rows.append(count)
    builder.add(pending)
    for file, count in zip(files, builder.file_rows, strict=True):
        if not count and warn is not None and builder.rows:  # without any it is an error
            warn(f"{key}: {file} holds no rows.")
    if progress is not None:
        progress(1.0)
    names = some([str(file) for file in files], 3)
    columns.require_joined(key, names)
    unused = columns.unused_text(builder.rows)
    if warn is not None and unused:
        warn(f"{key}: {unused}")
    return builder.finish(key, names)


def split_examples(examples: Examples, eval_fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Train and held-out examples: whole rows, drawn by seed, each part in file order.

    eval_fraction of the rows, at least one when it is above 0, are held out. Raises NibbleError when no row would
    be left to train on.
    """
    rows = np.unique(examples.rows)
    wanted = max(1, round(eval_fraction * len(rows))) if eval_fraction > 0 else 0
    if wanted >= len(rows):
        raise NibbleError(
            f"data.eval_fraction: {eval_fraction:g} of {len(rows)} usable {'row' if len(rows) == 1 else 'rows'} leaves "
            "none to train on. Set it to null, or give held-out rows in data.eval."
        )
    held_out = np.isin(examples.rows, rows[shuffled(len(rows), seed, _SPLIT)[:wanted]])
    return examples.subset(np.flatnonzero(~held_out)), examples.subset(np.flatnonzero(held_out))


_SPLIT = 1  # keeps this shuffle apart from the others made with the same seed


@dataclass(frozen=True)
class _Piece:
    """The texts of one row. index: number of the row among all rows read."""

    row: Row
    index: int
    texts: Sequence[Plain | Rendering]


def _texts(row: list[Rendering] | RenderError | Completion | Text | BadRow) -> Sequence[Plain | Rendering]:
    """What is to be tokenised of a row. Raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    if isinstance(row, RenderError):
        raise BadRow("template_error", f"the chat template refuses the row: {row}") from row
    if row == []:
        raise BadRow("nothing_to_learn", "the chat template writes nothing for the assistant's turns")
    texts: Sequence[Plain | Rendering]
    if isinstance(row, Completion):
        texts = [Plain(row.prompt + row.completion, len(row.prompt))]
    elif isinstance(row, Text):
        texts = [Plain(row.text, 0)]
    else:
        texts = row
    for text in texts:
        try:
            text.text.encode()
        except UnicodeEncodeError as error:
            raise BadRow("not_utf8", f"half of a surrogate pair ({error.object[error.start]!a}) in the text") from error
    return texts


class _Builder:
    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | TemplateProcess | None,
        sequence_length: int,
        log: RowLog,
        form: Format,
        fields: Mapping[str, str] | None,
    ):
        self.tokenizer, self.template, self.sequence_length, self.log = tokenizer, template, sequence_length, log
        self.form, self.fields, self.splits = form, fields, form == "text"
        self.rows = self.cut = self.split = self.lost = 0
        self.file_rows: list[int] = []
        self.lines = array("q")
        self._ids: list[NDArray[np.int32]] = []
        self._masks: list[NDArray[np.bool_]] = []
        self._rows: list[int] = []
        self.labels = Labels(tokenizer, template)

    def add(self, rows: list[Row]) -> None:
        parsed = [self._parsed(row) for row in rows]
        chats = [(one.messages, one.trained, one.tools) for one in parsed if isinstance(one, Chat)]
        rendered = iter(self.template.renderings_of(chats) if self.template is not None else ())
        pieces = []
        for row, one in zip(rows, parsed, strict=True):
            self.rows += 1
            self.lines.append(row.line)
            try:
                pieces.append(_Piece(row, self.rows - 1, _texts(next(rendered) if isinstance(one, Chat) else one)))
            except BadRow as problem:
                self.log.bad(row.file, row.line, problem)
        encoded = iter(self.tokenizer.encode_batch([text.text for piece in pieces for text in piece.texts]))
        for piece in pieces:
            examples = [self.labels.of(text, next(encoded)) for text in piece.texts]
            self._keep(piece, examples)

    def _parsed(self, row: Row) -> Chat | Completion | Text | BadRow:
        if row.problem is not None:
            return row.problem
        assert row.values is not None
        try:
            parsed = parse_row(row.values, self.form, self.fields)
        except BadRow as problem:
            return problem
        if isinstance(parsed, Chat) and self.template is None:  # a prompt and completion of messages
            return BadRow("no_template", "messages need a chat template, which the checkpoint doesn't have")
        if isinstance(parsed, Completion) and self.template is not None:
            messages = [{"role": "user", "content": parsed.prompt}, {"role": "assistant", "content": parsed.completion}]
            parsed = Chat(messages, [False, True])
        return parsed

    def _keep(self, piece: _Piece, examples: list[tuple[list[int], NDArray[np.bool_]]]) -> None:
        limit, row, kept = self.sequence_length, piece.row, 0
        longest = max(len(ids) for ids, _ in examples)
        for ids, mask in examples:
            mask[:1] = False
            if not (mask if self.splits else mask[:limit]).any():
                continue
            kept += 1
            # Neighbours share a token: the first of a document is not predicted there.
            starts = range(0, len(ids) - 1, limit - 1) if self.splits else (0,)
            if len(starts) > 1:
                self.split += 1
                what = f"{len(ids):,} tokens, split into {len(starts):,} documents of at most data.sequence_length"
                self.log.note("split", f"{row.file}:{row.line}: {what} {limit:,}")
            elif len(ids) > limit:
                self.cut += 1
                what = f"{len(ids):,} tokens, cut to data.sequence_length {limit:,}"
                self.log.note("cut", f"{row.file}:{row.line}: {what}")
            for start in starts:
                self._ids.append(np.array(ids[start : start + limit], np.int32))
                part = mask[start : start + limit].copy()
                part[:1] = False
                self._masks.append(part)
                self._rows.append(piece.index)
        if kept:
            self.lost += len(examples) - kept
            if kept < len(examples):
                what = f"{len(examples) - kept} of its {len(examples)} examples have nothing to learn within"
                self.log.note("lost", f"{row.file}:{row.line}: {what} data.sequence_length {limit:,}")
        elif longest > limit:
            what = f"nothing to learn within data.sequence_length {limit:,} (the row has {longest:,} tokens)"
            self.log.bad(row.file, row.line, BadRow("too_long", what))
        else:
            self.log.bad(row.file, row.line, BadRow("nothing_to_learn", "no token is left to learn"))

    def finish(self, key: str, files: str) -> tuple[Examples, DataReport]:
        skipped = self.log.skipped
        if not self.rows:
            raise NibbleError(f"{key}: {files} holds no rows.")
        if not self._ids:
            first = skipped[0]
            raise NibbleError(
                f"{key}: none of the {self.rows:,} rows of {files} can be used (data.format, data.fields). The first:\n"
                f"{first.file}:{first.line}: {first.detail}"
            )
        lengths = np.array([len(ids) for ids in self._ids], np.int32)
        examples = Examples(
            tokens=np.concatenate(self._ids),
            mask=np.concatenate(self._masks),
            starts=np.cumsum(lengths, dtype=np.int64) - lengths,
            lengths=lengths,
            rows=np.array(self._rows, np.int64),
            labelled=np.array([mask.sum() for mask in self._masks], np.int32),
        )
        return examples, DataReport(self.rows, self.cut, self.split, self.lost, skipped, self.file_rows, self.lines)
