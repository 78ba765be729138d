"""A process among several that a launcher has started: how it reports an error, and how it exits.

When one has failed torchrun ends the others, and reports the first failure with its rank. An error that
follows from another process's exit is a consequence, and all processes find an error in the config: neither needs a
second message. So a process gives torchrun some seconds to end it where its error may not be the first.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from parallel.world import ProcessLostError, World
from quant.common.terminal import flush_streams, say

_GRACE = 5.0  # seconds; torchrun looks for failures ten times a second

Describe = Callable[[BaseException], tuple[str, int]]


def run_launched(world: World, body: Callable[[], int], describe: Describe) -> int:
    """body(), which returns an exit code, in one process of `world`; the exit code.

    describe(error) is the message for the user, and the exit code. An error ends the process here: in the
    ordinary way out it might wait for others that wait for it.
    """

    def reporting() -> int:
        try:
            return body()
        except (Exception, KeyboardInterrupt) as error:
            _print_error(world, error, describe(error)[0])
            raise

    try:
        return record(reporting, _ErrorFile(describe))() or 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  it is printed, and ends the process
        flush_streams()
        os._exit(describe(error)[1])


def _print_error(world: World, error: BaseException, text: str) -> None:
    """Print `text`: at once as the first process of a machine, otherwise unless torchrun ends this one before."""
    if isinstance(error, KeyboardInterrupt) and not world.first:
        return
    if not world.first:
        text = f"rank {world.rank} on {platform.node()}: {text}"
    if world.local_rank == 0:
        say(text, sys.stderr)
        if not isinstance(error, ProcessLostError):
            return
    time.sleep(_GRACE)
    if world.local_rank > 0:
        say(text, sys.stderr)


class _ErrorFile(ErrorHandler):
    """Writes the message for torchrun's report, without the traceback: the log has that."""

    def __init__(self, describe: Describe) -> None:
        self._describe = describe

    def record_exception(self, e: BaseException) -> None:
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path:
            text = self._describe(e)[0].removeprefix("error: ")
            more = {"py_callstack": text, "timestamp": str(int(time.time()))}
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}), encoding="utf-8")
