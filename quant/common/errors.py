"""The exception whose message users read, a message that several places share, and errors of others in a line."""

from __future__ import annotations

FLOAT16 = "float16 needs loss scaling, which is not supported; use bfloat16 or float32"


class NibbleError(Exception):
    """Something the user can fix: bad input, a missing file, a combination that can't work.

    The message is one to three lines: what is wrong, where, and what to do about it. Commands print it
    as `error: …` on standard error and exit with code 2; no traceback is shown.
    """

    exit_code = 2


def in_one_line(error: BaseException) -> str:
    """Its kind and the first line of what it says: for an error that costs a message and nothing else."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
