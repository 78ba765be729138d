"""The folder of a run's checkpoints: their names, what is moved aside and deleted, and whether files are as written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quant.common.errors import NibbleError
from quant.common.files import is_file_name, sha256_file
from quant.common.jsonfile import integer, mapping, read_json, text
from quant.common.words import printable, shown

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights", "optimizer", "state.json", "manifest.json"
# Read are also 1, in which one process wrote weights.safetensors and optimizer.safetensors in place of the folders, and
# 2, which has in state.json the states of random number generators that nothing drew from.
FORMAT, READABLE = 3, (1, 2, 3)

_NAME = re.compile(r"step-(\d{6,})")
# Folders on their way in or out. A replaced one comes back when the process died before its successor was in place.
UNFINISHED, REPLACED, DELETED = ".partial-", ".replaced-", ".deleted-"


def is_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint that was finished."""
    return _NAME.fullmatch(name) is not None


def folders(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, newest first; none where there is no such folder."""
    found = [path for path in directory.iterdir() if is_name(path.name)] if directory.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def recover(directory: Path) -> None:
    """Put back a checkpoint that was moved aside for a successor that never came."""
    for path in directory.glob(f"{REPLACED}*"):
        final = directory / path.name.removeprefix(REPLACED)
        if not final.exists():
            path.rename(final)


def tidy(directory: Path) -> None:
    """Recover, and delete what is left of checkpoints that were never finished or are no longer wanted."""
    recover(directory)
    for prefix in (UNFINISHED, REPLACED, DELETED):
        for path in directory.glob(f"{prefix}*"):
            shutil.rmtree(path)


def prune(directory: Path, newest: int, keep: int, report: Callable[[str], None]) -> None:
    """Delete all checkpoints but those of the step `newest` and the `keep` - 1 before it."""
    kept = 0
    for path in folders(directory):
        # Of earlier ones only the complete count: the promise is to have `keep` to go back to.
        if step_of(path) == newest or (step_of(path) < newest and kept < keep and problem(path, hashes=False) is None):
            kept += 1
            continue
        try:
            # Under another name first, so that no half-deleted checkpoint looks like one.
            path.rename(directory / f"{DELETED}{path.name}")
        except OSError as error:
            report(f"{path}: this old checkpoint can't be deleted ({error.strerror}).")
    for prefix in (REPLACED, DELETED):
        for path in directory.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)  # what stays is tried again at the next save


def problem(path: Path, hashes: bool, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint's files; with `hashes` False only what is quickly seen.

    share: (i, n) looks at every n-th file only, from the i-th on, so that n processes look at all of them together.
    """
    if not (path / MANIFEST).exists():
        return f"{MANIFEST} is missing"
    try:
        manifest = read_json(path / MANIFEST, dict)
        found = integer(manifest, "format", 0, MANIFEST, least=0)
        if found not in READABLE:
            return f"it has format {found}, this version of nibble reads {READABLE[0]} to {READABLE[-1]}"
        entries = mapping(manifest, "files", MANIFEST)
        files = [(name, *_size_and_hash(entries, name)) for name in entries]
        if STATE not in entries:
            return f"{MANIFEST} lacks {STATE}"
    except NibbleError as error:
        return str(error).removeprefix(f"{path}/").removesuffix(".")
    first, every = share
    for name, size, digest in files[first::every]:
        try:
            actual = (path / name).stat().st_size
            if actual != size:
                return f"{name} has {actual:,} bytes instead of {size:,}"
            if hashes and sha256_file(path / name) != digest:
                return f"{name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
    return None


def _size_and_hash(entries: dict[str, Any], name: str) -> tuple[int, str]:
    if not is_file_name(name):
        raise NibbleError(f"{MANIFEST}: {shown(name)} can't be a file in the checkpoint")
    where, entry = f"{MANIFEST}: {printable(name, 80)}", mapping(entries, name, MANIFEST)
    return integer(entry, "size", -1, where, least=0, most=2**62), text(entry, "sha256", "x", where)
