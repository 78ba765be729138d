"""The metrics of a run: metrics.jsonl, and the same numbers as TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from quant.common.errors import NibbleError
from quant.common.files import disk_errors, identity, moved_error, write_atomically
from quant.common.jsonfile import JsonError, parse_json
from train.output.events import ScalarEvents

Record = dict[str, Any]


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file, in order, without an incomplete last line (of a killed run). No file: no records.

    Raises NibbleError naming the line that is not a record.
    """
    if not path.exists():
        return []
    # Every record ends with a newline, so what follows the last newline is incomplete.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except JsonError:
            record = None
        if not _is_record(record):
            raise NibbleError(f"{path}:{number}: not a metrics record.\nRemove that line and run again.")
        records.append(record)
    return records


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        return False
    step, loss = value.get("step"), value.get("loss")
    measured = isinstance(loss, int | float) and not isinstance(loss, bool) and abs(loss) < 1e300
    return type(step) is int and 0 <= step < 2**48 and (measured or value["kind"] not in ("train", "eval"))


class MetricsLog:
    """Writes one JSON object per line, and the same numbers as TensorBoard scalars.

    Records of training steps have kind "train", evaluations kind "eval"; the fields are those that `train.loop` gives.
    `resume_step` is the step of the checkpoint that the run resumes from: records of later steps, which will be written
    again, are removed, so that the file holds each step once. None starts an empty file.

    Every method but `close` raises NibbleError naming the file when the disk is full or not writable, and when the file
    is no longer there.
    """

    def __init__(self, path: Path, tensorboard_dir: Path | None, resume_step: int | None) -> None:
        self.path = path
        kept = [] if resume_step is None else [r for r in read_metrics(path) if r["step"] <= resume_step]
        self._held_out = {int(r["step"]): float(r["loss"]) for r in kept if r["kind"] == "eval"}
        with disk_errors(path):
            write_atomically(path, "".join(map(_line, kept)).encode())
            self._file = path.open("a", encoding="utf-8")
        self._events: ScalarEvents | None = None
        if tensorboard_dir is not None:
            with disk_errors(tensorboard_dir):
                self._events = ScalarEvents(tensorboard_dir, 0 if resume_step is None else resume_step + 1)

    def write(self, record: Record) -> None:
        """Append a record; it must have `kind` and `step`."""
        self._require_in_place()
        with disk_errors(self.path):
            self._file.write(_line(record))
            self._file.flush()  # to the operating system, so that a killed process loses nothing
        if record["kind"] == "eval":
            self._held_out[int(record["step"])] = float(record["loss"])
        if self._events is not None:
            with disk_errors(self._events.folder):
                for name, value in record.items():
                    if name not in ("kind", "step") and isinstance(value, int | float):
                        self._events.add(f"{record['kind']}/{name}", value, record["step"])
                self._events.flush()

    def evaluated(self, step: int) -> bool:
        """Whether the file already holds the held-out loss after `step`."""
        return step in self._held_out

    def held_out(self) -> list[float]:
        """The held-out losses in the file, in the order of their steps."""
        return [self._held_out[step] for step in sorted(self._held_out)]

    def sync(self) -> None:
        """Flush to the disk. To be called before a checkpoint is written: resuming from it needs these records."""
        self._require_in_place()
        with disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._events is not None:
            with disk_errors(self._events.folder):
                self._events.flush()

    def _require_in_place(self) -> None:
        """A file that was moved or deleted can be written to as before, but what is written is lost to the run."""
        try:
            same = identity(self.path.stat()) == identity(os.fstat(self._file.fileno()))
        except OSError:
            same = False
        if not same:
            raise moved_error(self.path if self.path.parent.is_dir() else self.path.parent)

    def close(self) -> None:
        # An error at closing was raised by the write already; raised again it would hide the first one.
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


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
