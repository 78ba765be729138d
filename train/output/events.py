"""TensorBoard's event files, for scalars.

TensorBoard's own writer does its work in a thread: on a full disk that thread dies with a traceback on the terminal,
and the run hears of it at some later write. Scalars are few and small, so here they are written at once.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path


class ScalarEvents:
    """One event file in `folder`, which TensorBoard shows together with those that are there.

    purge_step: TensorBoard never rewrites its files, so this tells it to hide what earlier files have from there on.
    Every method raises OSError where the file can't be written.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._summary, self.folder = event_pb2.Event, summary_pb2.Summary, folder
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        # TensorBoard reads files in the order of their names, and takes those with "tfevents" in them.
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now % 10**9:09d}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._write(step=purge_step, file_version="brain.Event:2")
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=purge_step, session_log=started)

    def add(self, name: str, value: float, step: int) -> None:
        scalar = self._summary.Value(tag=name, simple_value=value)
        self._write(step=step, summary=self._summary(value=[scalar]))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: object) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
