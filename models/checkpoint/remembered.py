"""What was once found out about a folder's files by reading all of them, remembered as long as they stay as they are.

Files stay as they are while size, dates and inode do. A date of modification can be set back; that of the last change
of the file's entry (ctime) can't. Remembered in the user's cache folder, one small file per folder and purpose.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quant.common.errors import NibbleError
from quant.common.files import write_atomically
from quant.common.jsonfile import parse_json

log = logging.getLogger("nibble")

# A file that is changed twice within a tick of its file system's clock keeps its date: so young a one isn't remembered.
_MIN_AGE = 2.0  # seconds

State = list[Any]


def state_of(folder: Path, names: Iterable[str]) -> State:
    """Sizes, dates and inodes of the files. Raises NibbleError where one can't be looked at."""
    try:
        found = [(name, (folder / name).stat()) for name in sorted(names)]
    except OSError as error:
        raise NibbleError(f"{error.filename} can't be read: {error.strerror}.") from error
    return [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for name, s in found]


def recall(purpose: str, folder: Path, state: State) -> dict[str, Any] | None:
    """What was remembered of this folder while its files were in this state; None if nothing."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        record = parse_json(_path(purpose, folder).read_bytes())
        if record["state"] == state and isinstance(record["found"], dict):
            return record["found"]
    return None


def remember(purpose: str, folder: Path, state: State, found: dict[str, Any]) -> None:
    """Warns where the cache folder can't be written."""
    if time.time() - max((entry[2] for entry in state), default=0) / 1e9 <= _MIN_AGE:
        return
    path = _path(purpose, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"folder": str(folder.resolve()), "state": state, "found": found}).encode())
    except (OSError, NibbleError) as error:
        log.warning("%s will be read whole again the next time, as that can't be remembered: %s", folder, error)


def _path(purpose: str, folder: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nibble"
    return cache / purpose / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()}.json"
