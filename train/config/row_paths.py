"""The files that `data.train` and `data.eval` name: one, a glob, or a list of these with weights."""

from __future__ import annotations

import glob
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from quant.common.errors import NibbleError
from quant.common.words import shown
from train.config.sections import RowFiles


@dataclass(frozen=True)
class RowFile:
    """weight: how often its rows are learnt; 0.5 is every other one."""

    path: str
    weight: float = 1.0


def row_files(value: RowFiles, key: str) -> list[RowFile]:
    """The files in the order in which they are named, those of a glob by name.

    Raises NibbleError, naming `key`, for one that isn't there or no file, a glob without files, and a file named twice.
    """
    found: list[RowFile] = []
    for entry in [value] if isinstance(value, str) else value:
        path, weight = (entry, 1.0) if isinstance(entry, str) else (entry.path, entry.weight)
        found += [RowFile(one, weight) for one in _matches(path, key)]
    paths = [os.path.realpath(file.path) for file in found]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise NibbleError(f"{key}: {found[number].path} is named twice; a weight repeats its rows.")
    return found


def _matches(path: str, key: str) -> list[str]:
    # A file may be called like a pattern.
    if not glob.has_magic(path) or "\0" in path or os.path.lexists(path):
        require_file(path, key)
        return [path]
    files = sorted(one for one in glob.glob(path, recursive=True) if not os.path.isdir(one))
    if not files:
        raise NibbleError(f"{key}: {path}: no file matches. {_here()}")
    for file in files:
        require_file(file, key)
    return files


def require_file(path: str, key: str) -> None:
    """Raises NibbleError, naming `key`, where `path` isn't a file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise NibbleError(f"{key}: {path}: no such file. {_here()}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise NibbleError(f"{key}: {shown(path)} can't be a file: {reason}.") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise NibbleError(f"{key}: {path} is no regular file.")
    if stat.S_ISDIR(mode):
        raise NibbleError(f"{key}: {path} is a folder; name its files, e.g. {os.path.join(path, '*.jsonl')}.")


def _here() -> str:
    return f"Relative paths start at the current directory ({Path.cwd()})."
