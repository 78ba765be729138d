"""`python -m train` in a forked process, on a disk that is full or read-only."""

from __future__ import annotations

import errno
import os
import resource
import sys
from typing import Any

from train.__main__ import main


def full(arguments: list[str], limit: int) -> int:
    """No file may become larger than `limit` bytes: writing past it fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return main(arguments)


def read_only(arguments: list[str], folder: str, writes: int) -> int:
    """After `writes` files have been opened for writing below `folder`, the disk there is read-only, as a file system
    becomes after an error of its device. (The system's own read-only mounts need rights that a test doesn't have.)
    """
    left = writes

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal left
        if event != "open" or not isinstance(details[0], str) or not details[0].startswith(folder):
            return
        mode, flags = details[1], details[2]
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags & (os.O_WRONLY | os.O_RDWR)):
            left -= 1
            if left < 0:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), details[0])

    sys.addaudithook(watch)
    return main(arguments)
