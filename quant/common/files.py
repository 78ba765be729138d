"""Files that are there whole or not at all, their checksums, and the messages of a disk that is full or read-only."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant.common.errors import NibbleError

PARTIAL = ".partial"  # what is being written; renamed when it is whole
_LONGEST = 255, 1024  # bytes of a file's name (the system's limit), and of a path below a folder


def is_file_name(name: str) -> bool:
    """Whether a name out of somebody's file can be that of a file below the folder that it is looked up in."""
    try:
        sizes = [len(part.encode()) for part in name.split("/")]
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    inside = all(part not in ("", ".", "..") for part in name.split("/"))
    return inside and "\0" not in name and max(sizes) <= _LONGEST[0] and sum(sizes) < _LONGEST[1]


def user_path(path: str | Path) -> Path:
    """The path with its leading ~ or ~user replaced by that user's folder. Raises NibbleError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise NibbleError(
            f"{path}: this machine has no user {Path(path).parts[0][1:]}, whose folder ~ means."
        ) from error


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk and the like into a NibbleError that names the file."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> NibbleError:
    """What to tell the user when writing `path` failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NibbleError(f"the disk is full: {path} can't be written ({error.strerror}).\nMake room and run again.")
    return NibbleError(f"{path} can't be written: {error.strerror}.")


def moved_error(path: Path) -> NibbleError:
    """What to tell the user when `path` is no longer the file or folder that a run has been writing to."""
    return NibbleError(
        f"{path} was moved, deleted or replaced while this run was writing to it. The run stops here.\n"
        "Put it back, and the same command goes on from the last checkpoint in it."
    )


def identity(status: os.stat_result) -> tuple[int, int]:
    """What stays the same when a file is renamed, and differs between two files of one name."""
    return status.st_dev, status.st_ino


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees either the old one or the new one, also after a crash."""
    partial = path.with_name(path.name + PARTIAL)
    with disk_errors(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)  # it would keep a full disk full
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
