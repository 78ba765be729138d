"""Files that are there whole or not at all, their checksums, and the messages of a disk that is full or read-only."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
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


def check_outputs(outputs: Mapping[str, str | Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Before long work: can the files that options name be written, and without loss?

    outputs: names by option. inputs: files and folders that the work reads. None: not given. A file may be replaced,
    but not by two options, and not one that is read. Raises NibbleError naming the option.
    """
    read = [Path(name) for name in inputs if name is not None]
    kept = {where for path in read for where in (path.resolve(), path.parent.resolve() / path.name)}
    folders = {path.resolve() for path in read if path.is_dir()}
    taken: dict[Path, str] = {}
    for option, name in outputs.items():
        if name is None:
            continue
        path = Path(name)
        with disk_errors(path):
            if path.is_dir() or not path.absolute().parent.is_dir():
                what = "is a folder" if path.is_dir() else "is in a folder that is not there"
                raise NibbleError(f"{option}: {path} {what}.")
            if path.exists() and not path.is_file():
                raise NibbleError(f"{option}: {path} is no regular file, and would be replaced by one.")
            place, partial = (path.parent.resolve() / (path.name + mark) for mark in ("", PARTIAL))
            if path.exists() and not folders.isdisjoint(place.parents):
                raise NibbleError(f"{option}: {path} is in a folder that this command reads, and isn't replaced.")
            for written in (place, partial):
                if written in kept:
                    raise NibbleError(f"{option}: {path} would replace {written}, which this command reads.")
                if written in taken:
                    raise NibbleError(f"{taken[written]} and {option} can't both be {path}. Choose another name.")
                taken[written] = option
            _try_to_write(partial)


def _try_to_write(path: Path) -> None:
    there = path.exists()
    with path.open("ab"):
        pass
    if not there:
        path.unlink(missing_ok=True)  # by another process of the same command


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
