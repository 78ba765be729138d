"""From the files that a config names to the batches of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel.world import ALONE, World
from quant.common.files import disk_errors
from quant.common.progress import Bar
from train.config.load import Config
from train.config.row_paths import row_files
from train.config.sections import DataConfig, RowFiles
from train.data.batches import EvalBatches, StepBatches
from train.data.examples import DataReport, Examples, build_examples, split_examples
from train.data.mixture import copies_of_rows, repeated
from train.data.packing import Packing, pack
from train.data.template_files import load_chat_template
from train.data.template_process import TemplateProcess
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.rows.bad_rows import write_skipped_rows

_ARRAYS = [field.name for field in fields(Examples)]
_Read = tuple[Examples, NDArray[np.int32] | None]  # and how often each row is learnt
SHARED_ROWS = ".rows.npz"  # in output.dir, while several processes start


@dataclass(frozen=True)
class Data:
    """reports: what became of the rows, training rows first; empty on a process that hasn't read them. train, held_out:
    what is learnt from and measured on; this process's share of it. All else is the same on every process.
    """

    reports: list[DataReport]
    examples: Examples
    packing: Packing
    train: StepBatches
    held_out: EvalBatches | None
    held_out_rows: int

    @property
    def skipped(self) -> int:
        return sum(len(report.skipped_rows) for report in self.reports)


def load_data(
    config: Config, folder: Path, skipped_path: Path, note: Callable[[str], None], now: datetime, world: World = ALONE
) -> Data:
    """Read, tokenise, split and pack the rows of `config.data` with the tokenizer and template in `folder`.

    Rows that could not be used are written to `skipped_path` (which is removed when there are none). `now` is what a
    chat template that writes the date takes for today; a resumed run passes the day on which it began. `note` gets
    a line for each problem of a row.

    Of several processes the first reads, writes and reports; the others need neither files nor tokenizer and read its
    tokens from a file beside `skipped_path`, which all of them see and which is deleted afterwards. What is made of
    these (split, packing, order) each process makes for itself, the same.
    """
    settings, train = config.data, config.train
    reports: list[DataReport] = []
    read: list[_Read] = []
    shared = skipped_path.with_name(SHARED_ROWS)
    try:
        if world.first:
            read, reports = _read(config, folder, note, now)
            skipped = [row for one in reports for row in one.skipped_rows]
            skipped_path.unlink(missing_ok=True)
            if skipped:
                write_skipped_rows(skipped_path, skipped)
            if world.size > 1:
                with disk_errors(shared):
                    np.savez(shared, *(array for one in read for array in _arrays(one)))
        world.wait(note, "read the rows")
        if not world.first:
            with np.load(shared) as file:  # of arrays alone: no pickle
                arrays = [file[name] for name in file.files]
            count = len(_ARRAYS) + 1
            read = [
                (Examples(*arrays[i : i + count - 1]), arrays[i + count - 1] if len(arrays[i + count - 1]) else None)
                for i in range(0, len(arrays), count)
            ]
        world.wait(note, "read the tokens of the rows")
    finally:
        if world.first:
            shared.unlink(missing_ok=True)
    first, *others = read
    held_out = repeated(*others[0]) if others else None
    if held_out is None and settings.eval_fraction is not None:
        examples, held_out = held_out_part(first, settings.eval_fraction, train.seed)
    else:
        examples = repeated(*first)

    packing = pack(examples.lengths, settings.sequence_length, train.seed, settings.packing)
    batches = StepBatches(
        examples,
        packing,
        micro_batch_size=train.micro_batch_size,
        gradient_accumulation=train.gradient_accumulation,
        seed=train.seed,
        rank=world.rank,
        ranks=world.size,
    )
    held_out_batches = None
    if held_out is not None:
        held_out_packing = pack(held_out.lengths, settings.sequence_length, train.seed, settings.packing)
        held_out_batches = EvalBatches(
            held_out, held_out_packing, micro_batch_size=train.micro_batch_size, rank=world.rank, ranks=world.size
        )
    return Data(
        reports, examples, packing, batches, held_out_batches, held_out.total_rows if held_out is not None else 0
    )


def _arrays(read: _Read) -> list[NDArray[np.generic]]:
    examples, copies = read
    return [*(getattr(examples, name) for name in _ARRAYS), np.zeros(0, np.int32) if copies is None else copies]


def _read(
    config: Config, folder: Path, note: Callable[[str], None], now: datetime
) -> tuple[list[_Read], list[DataReport]]:
    """The rows of data.train and, where it is given, of data.eval."""
    settings, seed = config.data, config.train.seed
    tokenizer = load_tokenizer(folder)
    template = load_chat_template(folder, tokenizer.special_tokens, now=now, variables=settings.template_variables)
    texts = Texts(settings, tokenizer, template, seed)
    made = [texts.read(settings.train, "data.train", note)]
    if settings.eval is not None:
        made.append(texts.read(settings.eval, "data.eval", note))
    return [examples for examples, _ in made], [rows for _, rows in made]


@dataclass(frozen=True)
class Texts:
    """How rows become examples: `settings`, of which files and packing aren't read, with a checkpoint's tokenizer and
    template. seed: draws the rows of files with a weight.
    """

    settings: DataConfig
    tokenizer: Tokenizer
    template: TemplateProcess | None
    seed: int

    def read(self, value: RowFiles, key: str, note: Callable[[str], None]) -> tuple[_Read, DataReport]:
        """The rows of the files `value`, which `key` names in messages; note: as for `load_data`."""
        files, settings = row_files(value, key), self.settings
        what = Path(files[0].path).name if len(files) == 1 else f"{len(files)} files"
        with Bar(f"reading {what}") as bar:
            examples, report = build_examples(
                [file.path for file in files],
                form=settings.format,
                tokenizer=self.tokenizer,
                template=self.template,
                sequence_length=settings.sequence_length,
                fields=settings.fields,
                key=key,
                on_bad_row=settings.on_bad_row,
                warn=note,
                progress=lambda share: bar.update(round(1000 * share), 1000),
            )
        return (examples, copies_of_rows(examples, files, report.file_rows, self.seed)), report


def held_out_part(read: _Read, share: float, seed: int) -> tuple[Examples, Examples]:
    """The examples to learn from, as often as they are learnt, and those of the share of the rows that is held out."""
    examples, copies = read
    # Of the rows that are learnt at all, and before they are repeated: none is on both sides.
    examples = repeated(examples, None if copies is None else np.minimum(copies, 1))
    examples, held_out = split_examples(examples, share, seed)
    return repeated(examples, copies), held_out
