"""From the files that a config names to the batches of a run."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from models.progress import Bar
from train.batches import EvalBatches, StepBatches
from train.chat import load_chat_template
from train.config import Config
from train.examples import DataReport, Examples, build_examples, split_examples
from train.packing import Packing, pack
from train.report import Report
from train.rows import write_skipped_rows
from train.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Data:
    """reports: what became of the rows, training rows first. train, held_out: what is learnt from and measured on."""

    reports: list[DataReport]
    examples: Examples
    packing: Packing
    train: StepBatches
    held_out: EvalBatches | None
    held_out_rows: int

    @property
    def skipped(self) -> int:
        return sum(len(report.skipped_rows) for report in self.reports)


def load_data(config: Config, folder: Path, skipped_path: Path, report: Report, now: datetime) -> Data:
    """Read, tokenise, split and pack the rows of `config.data` with the tokenizer and template in `folder`.

    Rows that could not be used are written to `skipped_path` (which is removed when there are none). `now` is what a
    chat template that writes the date takes for today; a resumed run passes the day on which it began.
    """
    settings, train = config.data, config.train
    tokenizer = load_tokenizer(folder)
    template = load_chat_template(folder, tokenizer.special_tokens, now=now)

    def read(file: str, key: str) -> tuple[Examples, DataReport]:
        with Bar(f"reading {Path(file).name}") as bar:
            return build_examples(
                file,
                form=settings.format,
                tokenizer=tokenizer,
                template=template,
                sequence_length=settings.sequence_length,
                fields=settings.fields,
                key=key,
                on_bad_row=settings.on_bad_row,
                warn=report.note,
                progress=lambda share: bar.update(round(1000 * share), 1000),
            )

    examples, rows = read(settings.train, "data.train")
    reports, held_out = [rows], None
    if settings.eval is not None:
        held_out, rows = read(settings.eval, "data.eval")
        reports.append(rows)
    elif settings.eval_fraction is not None:
        examples, held_out = split_examples(examples, settings.eval_fraction, train.seed)

    skipped = [row for one in reports for row in one.skipped_rows]
    skipped_path.unlink(missing_ok=True)
    if skipped:
        write_skipped_rows(skipped_path, skipped)

    packing = pack(examples.lengths, settings.sequence_length, train.seed, settings.packing)
    batches = StepBatches(
        examples,
        packing,
        micro_batch_size=train.micro_batch_size,
        gradient_accumulation=train.gradient_accumulation,
        seed=train.seed,
    )
    held_out_batches = None
    if held_out is not None:
        held_out_packing = pack(held_out.lengths, settings.sequence_length, train.seed, settings.packing)
        held_out_batches = EvalBatches(held_out, held_out_packing, micro_batch_size=train.micro_batch_size)
    return Data(
        reports, examples, packing, batches, held_out_batches, held_out.total_rows if held_out is not None else 0
    )
