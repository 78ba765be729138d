"""TensorBoard event files with scalars, written through TensorBoard's own record writer.

Not by SummaryWriter: it writes in a thread, which on a full disk prints a traceback beside the error message.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path


class ScalarEvents:
    """One new event file in `folder`; TensorBoard shows all files of a folder together.

    purge_step: TensorBoard hides what earlier files have of this step and of later ones.
    Every method raises OSError when the file can't be written.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._event, self._summary, self.folder = event_pb2.Event, summary_pb2.Summary, folder
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        # TensorBoard reads files whose names contain "tfevents", in the order of the names.
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
