"""What a run measures: metrics.jsonl (the record) and TensorBoard events (a view of it)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from quant.common.errors import NibbleError
from quant.common.files import disk_error
from train.output.events import ScalarEvents

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file, in order; a last line torn by a kill is left out. No file: no records.

    Raises NibbleError naming the line that is not a record.
    """
    if not path.exists():
        return []
    # Every record ends with a newline, so whatever follows the last newline was not written to its end.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            complete = isinstance(record["step"], int) and isinstance(record["kind"], str)
        except (ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            raise NibbleError(f"{path}:{number}: not a metrics record.\nRemove that line and run again.")
        records.append(record)
    return records


class MetricsLog:
    """Writes one JSON object per line, and the same numbers as TensorBoard scalars.

    Records of training steps have kind "train", evaluations kind "eval"; the fields are those that `train.loop` gives.
    `resume_step` is the step of the checkpoint that the run goes on from: records of later steps, which the run is
    about to make again, are dropped, so that the file holds each step once. None starts an empty file.

    Every method but `close` raises NibbleError naming the file when the disk is full or not writable.
    """

    def __init__(self, path: Path, tensorboard_dir: Path | None, resume_step: int | None) -> None:
        self.path = path
        kept = [] if resume_step is None else [r for r in read_metrics(path) if r["step"] <= resume_step]
        self._evaluated = {int(record["step"]) for record in kept if record["kind"] == "eval"}
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(_line(record) for record in kept), encoding="utf-8")
            os.replace(partial, path)
            self._file = path.open("a", encoding="utf-8")
        self._events: ScalarEvents | None = None
        if tensorboard_dir is not None:
            with _disk_errors(tensorboard_dir):
                self._events = ScalarEvents(tensorboard_dir, 0 if resume_step is None else resume_step + 1)

    def write(self, record: Record) -> None:
        """Append a record; it must have `kind` and `step`."""
        with _disk_errors(self.path):
            self._file.write(_line(record))
            self._file.flush()  # to the system: a killed process loses nothing
        if record["kind"] == "eval":
            self._evaluated.add(int(record["step"]))
        if self._events is not None:
            with _disk_errors(self._events.folder):
                for name, value in record.items():
                    if name not in ("kind", "step") and isinstance(value, int | float):
                        self._events.add(f"{record['kind']}/{name}", value, record["step"])
                self._events.flush()

    def evaluated(self, step: int) -> bool:
        """Whether the held-out loss after `step` is already on record."""
        return step in self._evaluated

    def sync(self) -> None:
        """Bring everything to the disk. To be called before a checkpoint is written, which counts on these records."""
        with _disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._events is not None:
            with _disk_errors(self._events.folder):
                self._events.flush()

    def close(self) -> None:
        # Whatever could not be written was an error when it was written: here it would only hide that one.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
