"""A merged checkpoint as a folder in the hub's layout: the base's files, with other data for what was merged.

Every shard keeps its name, its header to the byte, and the bytes of every tensor that isn't merged. The folder is made
under another name, shard by shard; a shard that is finished is kept when the work is taken up again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.adapters.peft_config import CONFIG as ADAPTER_CONFIG
from models.adapters.peft_config import WEIGHTS
from models.checkpoint.conversion import check_space, locked
from models.checkpoint.hub import INDEX
from models.checkpoint.remembered import state_of
from models.checkpoint.tensorfile import TensorInfo
from models.merge.content import Merged, data_of
from quant.common.errors import NibbleError
from quant.common.files import PARTIAL, disk_errors, sync_folder, write_atomically
from quant.common.jsonfile import mapping, read_json, text, texts

# What is being merged, and which shards are finished: in the unfinished folder.
STATE = "merge.json"
_AT_ONCE = 4 * 2**20  # bytes


def write_folder(merged: Merged, out: Path, force: bool, progress: Callable[[int, int, str], None]) -> None:
    """Write `merged` to `out`, or finish doing so. progress(done, total, shard): bytes.

    force: throw away another unfinished merge. Raises NibbleError where `out` exists, where another merge of other
    files is unfinished there, and for a full disk; what is finished then stays for the next time.
    """
    if out.exists():
        _finish(merged, out)
        return
    partial = out.with_name(out.name + PARTIAL)
    with locked(partial):
        state = _begin(merged, partial, force)
        headers, base = merged.checkpoint.headers, merged.checkpoint.path
        sizes = {shard: (base / shard).stat().st_size for shard in headers}
        finished = {shard for shard in state["finished"] if _is_whole(partial / shard, sizes)}
        check_space(partial, sum(size for shard, size in sizes.items() if shard not in finished))
        done, total = 0, sum(sizes.values())
        for shard in headers:
            progress(done, total, shard)
            if shard not in finished:
                _write_shard(merged, shard, partial)
                finished.add(shard)
                _save(partial, state | {"finished": sorted(finished), "norms": merged.norms.state()})
            done += sizes[shard]
            progress(done, total, shard)
        _write_other_files(merged, partial)
        with disk_errors(out):
            partial.rename(out)
        sync_folder(out.parent)
    (out / STATE).unlink()


def _finish(merged: Merged, out: Path) -> None:
    """The last step of this merge, where it was killed before that. Raises NibbleError for anything else in `out`."""
    try:
        found = read_json(out / STATE, dict)
        same = found.get("identity") == _identity(merged)
        merged.norms.restore(found.get("norms", {}) if same else {})
    except (NibbleError, OSError, ValueError, TypeError, AttributeError):
        same = False
    if not same:
        raise NibbleError(f"{out} exists already. Name a folder that doesn't.")
    (out / STATE).unlink()


def _begin(merged: Merged, partial: Path, force: bool) -> dict[str, Any]:
    """The state to go on with: that of the folder, where it is of the same merge."""
    new = {"identity": _identity(merged), "finished": [], "norms": {}}
    if force and (partial / STATE).is_file():
        _discard(merged, partial)
    if (partial / STATE).is_file():
        found = read_json(partial / STATE, dict, "Add --force to begin anew.")
        if text(found, "identity", "", str(partial / STATE)) != new["identity"]:
            raise NibbleError(
                f"{partial} is an unfinished merge of other files, or with other options.\n"
                "Name another folder, or add --force to begin anew."
            )
        try:
            merged.norms.restore(mapping(found, "norms", str(partial / STATE)))
            return found | {"finished": texts(found, "finished", str(partial / STATE))}
        except (ValueError, TypeError, AttributeError) as error:
            raise NibbleError(f"{partial / STATE} is damaged. Add --force to begin anew.") from error
    others = sorted(path.name for path in partial.iterdir() if path.name != STATE + PARTIAL)  # killed at the beginning
    if others:
        raise NibbleError(f"{partial} isn't empty, and no merge has begun there (it holds {others[0]}). Move it away.")
    _save(partial, new)
    return new


def _discard(merged: Merged, partial: Path) -> None:
    """Delete what a merge writes, the state last: killed here, it is deleted the next time."""
    names = [*merged.checkpoint.headers, *_other_files(merged), STATE]
    for name in names:
        for path in (partial / (name + PARTIAL), partial / name):
            path.unlink(missing_ok=True)
    for folder in {(partial / name).parent for name in names} - {partial}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _identity(merged: Merged) -> str:
    """The same for the same files, unchanged since, and the same options."""
    base, adapter = merged.checkpoint, merged.adapter
    parts = (
        hashlib.sha256(merged.config).hexdigest(),
        state_of(base.path, base.headers),
        state_of(adapter.directory, (ADAPTER_CONFIG, WEIGHTS)),
        (adapter.packing, merged.onto, repr(merged.trained)),
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _save(partial: Path, state: dict[str, Any]) -> None:
    write_atomically(partial / STATE, json.dumps(state).encode())


def _is_whole(path: Path, sizes: dict[str, int]) -> bool:
    return path.is_file() and path.stat().st_size == sizes.get(path.name)


def _write_shard(merged: Merged, shard: str, folder: Path) -> None:
    source, partial = merged.checkpoint.path / shard, folder / (shard + PARTIAL)
    try:
        with disk_errors(partial), source.open("rb") as base, partial.open("wb") as file:
            header = merged.checkpoint.headers[shard]
            _copy(base, file, min((info.begin for info in header.values()), default=source.stat().st_size))
            for name, info in header.items():
                if name in merged.changed:
                    _write_changed(merged, name, info, file)
                else:
                    base.seek(info.begin)
                    _copy(base, file, info.end - info.begin)
            file.flush()
            os.fsync(file.fileno())
        merged.checkpoint.close()  # pages of the mapped shard leave this process's memory
        with disk_errors(folder / shard):
            partial.replace(folder / shard)
        sync_folder(folder)
    except BaseException:
        partial.unlink(missing_ok=True)  # it would keep a full disk full
        raise


def _copy(base: Any, file: Any, count: int) -> None:
    while count:
        data = base.read(min(_AT_ONCE, count))
        if not data:
            raise NibbleError(f"{base.name} was cut short while it was read.")
        file.write(data)
        count -= len(data)


def _write_changed(merged: Merged, name: str, info: TensorInfo, file: Any) -> None:
    written = 0
    for piece in merged.pieces(name):
        written += file.write(data_of(piece))
    if written != info.end - info.begin:
        raise NibbleError(
            f"{merged.checkpoint.path}: two shards hold {name}, in different shapes or dtypes; which is merged?\n"
            "Take the one that the index doesn't name out of its shard."
        )


def _other_files(merged: Merged) -> dict[str, bytes]:
    files = merged.side_files()
    index = merged.checkpoint.path / INDEX
    if list(merged.checkpoint.headers) != ["model.safetensors"] and index.is_file():
        files[INDEX] = index.read_bytes()
    return files


def _write_other_files(merged: Merged, folder: Path) -> None:
    for name, data in _other_files(merged).items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, data)
