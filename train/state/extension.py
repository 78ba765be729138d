"""More steps for a finished run: --extend-to. The config stays; checkpoints and run.json have the extension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quant.common.errors import NibbleError
from quant.common.jsonfile import integer, mapping
from train.config.sections import TrainConfig
from train.schedule import warmup_steps
from train.state.fingerprint import Record


@dataclass(frozen=True)
class Extension:
    """The run had `start` steps and has `end` now. The schedule of the added ones: `train.schedule.rate_of`."""

    start: int
    end: int

    def text(self, train: TrainConfig) -> str:
        """What happens to the learning rate."""
        rate = f"{train.learning_rate:g}"
        if train.schedule == "constant":
            rates = f"stays at {rate} (constant)"
        else:
            rise = warmup_steps(self.end - self.start, train.warmup_ratio)
            begins = f"rises from 0 to {rate} over {rise} of the added steps" if rise else f"starts at {rate} once more"
            rates = f"{begins} and falls to 0 at the new end ({train.schedule})"
        return f"extended from step {self.start:,} to {self.end:,}: the learning rate {rates}"


def extension_of(records: Sequence[Record], planned: int, asked: int | None, folder: Path) -> Extension | None:
    """The extension of the run in `folder`, as `records` hold it (its run.json, its checkpoint) or --extend-to asks.

    planned: the steps by the config. Raises NibbleError where there is no finished run to be extended to `asked` steps.
    """
    recorded = recorded_extension(records[0]) if records else None
    if recorded is not None and recorded.end <= planned:
        recorded = None  # a constant schedule, and train.max_steps raised since
    end = recorded.end if recorded is not None else planned
    if asked is None:
        return recorded
    if not records:
        raise NibbleError(
            f"--extend-to {asked}: there is no run in {folder} to be extended.\nSet train.max_steps for a new one."
        )
    if asked < end:
        raise NibbleError(f"--extend-to {asked}: the run in {folder} has {end} steps already.\nName a larger number.")
    if asked == end:
        return recorded
    if records[-1].step < end:
        raise NibbleError(
            f"--extend-to {asked}: the run in {folder} is at step {records[-1].step} of {end}, and only one that is\n"
            "through can be extended. Without --extend-to it goes on to there (train.patience: null where that ended "
            "it)."
        )
    return Extension(end, asked)


def recorded_extension(record: Record) -> Extension | None:
    where = f"{record.path}: extended"
    found = mapping(record.state, "extended", str(record.path))
    if not found:
        return None
    start, end = (integer(found, key, -1, where, least=1, most=2**48) for key in ("start", "end"))
    if start >= end:
        raise NibbleError(f"{where}: from step {start} to {end} is no extension.")
    return Extension(start, end)
