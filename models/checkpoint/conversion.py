"""Hub checkpoint in, converted checkpoint out: one matrix in memory at a time, one file finished after another.

A file that is finished is recorded with its checksum in the manifest and kept when the work is taken up again, so
that an interruption costs at most one layer.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint.hub import HubCheckpoint, meta_model
from models.checkpoint.hub_id import resolve_model
from models.checkpoint.keymap import Key, key_map_of
from models.checkpoint.native import (
    MANIFEST,
    WEIGHTS_FILE,
    FileRecord,
    Manifest,
    convert_command,
    describe,
    group_by_file,
    is_converted,
)
from models.checkpoint.side_files import side_files
from models.checkpoint.stream import HubReader
from models.checkpoint.tensorfile import TensorWriter, tensor_bytes
from quant.common.errors import NibbleError
from quant.common.files import PARTIAL, sha256_file, write_atomically
from quant.storage import StorageSpec


class Interrupted(Exception):
    """The user stopped a conversion; the message says how far it came and how to go on."""


@dataclass(frozen=True)
class Summary:
    """What a conversion did. Sizes in bytes; parameters of the dense model; seconds of this run.

    carried: hub keys of the source that are not computed with; left_out: the same in one line.
    """

    destination: Path
    stored: str
    parameters: int
    source_bytes: int
    bytes: int
    files: int
    kept: int
    carried: tuple[str, ...]
    left_out: str
    seconds: float


Progress = Callable[[int, int, str], None]


def convert(
    source: str | Path,
    destination: str | Path,
    spec: StorageSpec,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: torch.device | str = "cpu",
    force: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> Summary:
    """Convert a hub folder or hub id into `destination`, or finish a conversion that was interrupted.

    spec: how frozen matrices are stored; dtype: of everything else but what the architecture keeps in
        float32 whatever the file has (routers, Trinity's norms, DeltaNet's decay).
    device: where matrices are quantised. The CPU is the reference; a CUDA device is much faster for 4 bits.
    force: throw away another conversion that is in `destination`. progress(done, total, what): parameters, and the
    file being written. Raises NibbleError, and Interrupted on Ctrl-C.
    """
    folder, target = resolve_model(source), Path(destination).expanduser()
    if is_converted(folder):
        raise NibbleError(f"{folder} is a converted checkpoint already; convert from the hub's format.")
    with HubCheckpoint(folder) as checkpoint:
        content = Content(checkpoint, str(source))
        return convert_content(content, target, spec, dtype, device=device, force=force, progress=progress)


class Content:
    """What is converted: a hub checkpoint as it is. Subclasses change its tensors on the way.

    name: as the user named it. merged: for the manifest.
    """

    merged: tuple[str, ...] = ()

    def __init__(self, checkpoint: HubCheckpoint, name: str) -> None:
        self.checkpoint, self.name = checkpoint, name

    def change(self, key: Key, expert: int | None, dense: Tensor) -> Tensor:
        """See stream.Change."""
        return dense

    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint()

    def has_fingerprint(self, recorded: str) -> bool:
        return self.checkpoint.has_fingerprint(recorded, "To be sure, add --force.")

    def side_files(self) -> dict[str, bytes]:
        return side_files(self.checkpoint.path)


def convert_content(
    content: Content,
    target: Path,
    spec: StorageSpec,
    dtype: torch.dtype,
    *,
    device: torch.device | str,
    force: bool,
    progress: Progress,
) -> Summary:
    """As `convert`, of a content that is open."""
    begun, checkpoint = time.monotonic(), content.checkpoint
    folder = checkpoint.path
    model = meta_model(checkpoint.config, checkpoint.shapes, str(folder / "config.json"), spec, dtype)
    reader = HubReader(checkpoint, key_map_of(model), device, content.change)
    files = group_by_file(reader.keys)
    _refuse_overlap(folder, target)
    with locked(target):
        manifest = Manifest(
            model_type=model.model_type,
            spec=spec,
            dtype=dtype,
            source=content.name,
            fingerprint=content.fingerprint(),
            config=checkpoint.config,
            carried=reader.carried,
            layout=reader.layout,
            merged=content.merged,
        )
        manifest = _prepare(target, manifest, content, force)
        kept = len(files.keys() & manifest.files.keys())
        needed = [key for name in files if name not in manifest.files for key in files[name]]
        check_space(target, sum(tensor_bytes(*entry) for key in needed for entry in key.tensors().values()))
        try:
            _write_files(reader, files, target, manifest, progress)
            _copy_side_files(content, target, manifest)
        except KeyboardInterrupt as error:
            done = len(files.keys() & manifest.files.keys())
            raise Interrupted(
                f"interrupted: {done} of {len(files)} files are finished and kept.\n"
                f"To go on: {convert_command(manifest, target)}"
            ) from error
    return Summary(
        destination=target,
        stored=describe(spec, dtype),
        parameters=count_parameters(reader.keys),
        source_bytes=checkpoint.nbytes,
        bytes=sum(manifest.files[name].size for name in files),
        files=len(files),
        kept=kept,
        carried=reader.carried,
        left_out=reader.left_out(),
        seconds=time.monotonic() - begun,
    )


def count_parameters(keys: Iterable[Key]) -> int:
    """Of the dense model. Buffers (routers' correction biases) don't count."""
    return sum(_numel(key) for key in keys if key.counted)


def _numel(key: Key) -> int:
    return torch.Size(key.shape).numel()


def _write_files(
    reader: HubReader, files: dict[str, list[Key]], target: Path, manifest: Manifest, progress: Progress
) -> None:
    total = sum(_numel(key) for key in reader.keys)
    done = 0
    for name, keys in files.items():
        if name in manifest.files:
            done += sum(_numel(key) for key in keys)
            progress(done, total, name)
            continue
        progress(done, total, name)
        tensors = {tensor: entry for key in keys for tensor, entry in key.tensors().items()}
        with TensorWriter(target / name, tensors, hashed=True) as writer:
            for key in keys:
                for piece in reader.read(key):
                    for tensor, value in piece.tensors.items():
                        writer.write(tensor, value, piece.start)
                    done += _numel(key) if piece.start is None else _numel(key) // key.shape[0]
                    progress(done, total, name)
            digest = writer.finish()
        manifest.files[name] = FileRecord(writer.size, digest, tuple(tensors))
        manifest.save(target)
        reader.checkpoint.close()  # pages of the mapped shard leave this process's memory


def _copy_side_files(content: Content, target: Path, manifest: Manifest) -> None:
    """config.json, tokenizer, chat template. Marks the manifest complete."""
    for name, data in content.side_files().items():
        if name not in manifest.files:
            (target / name).parent.mkdir(exist_ok=True)
            write_atomically(target / name, data)
            manifest.files[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest())
    manifest.complete = True
    manifest.save(target)


def _prepare(target: Path, manifest: Manifest, content: Content, force: bool) -> Manifest:
    """The manifest to go on with: the one in the folder where it is of the same conversion, else the new one."""
    if not is_converted(target):
        others = sorted(entry.name for entry in target.iterdir() if not entry.name.endswith(PARTIAL))
        if others:
            raise NibbleError(
                f"{target} isn't empty and isn't a converted checkpoint (it holds {others[0]}).\nName a new folder."
            )
        manifest.save(target)
        return manifest
    if force:
        _clear(target)
        manifest.save(target)
        return manifest
    found = Manifest.load(target)
    there = manifest.fingerprint if content.has_fingerprint(found.fingerprint) else found.fingerprint
    differences = [
        f"{what} {before!s} there, {after!s} now"
        for what, before, after in (
            ("storage", describe(found.spec, found.dtype), describe(manifest.spec, manifest.dtype)),
            ("model_type", found.model_type, manifest.model_type),
            ("content of the source (fingerprint)", there[-64:-52], manifest.fingerprint[-64:-52]),
        )
        if before != after
    ]
    if differences:
        raise NibbleError(
            f"{target} holds another conversion (of {found.source}): {'; '.join(differences)}.\n"
            "Name another folder, or add --force to replace it."
        )
    _remove_partial(target)
    found.files = {
        name: record
        for name, record in found.files.items()
        if (target / name).is_file() and (target / name).stat().st_size == record.size
    }
    return found


def _clear(target: Path) -> None:
    """Remove a conversion's own files, and nothing else; the manifest first, so that no rest is taken for a whole.

    Raises NibbleError, before anything is removed, for a file that isn't as it was written, and for a name that no
    conversion gives a file: nibble.json may have been edited.
    """
    records: Mapping[str, FileRecord | None]
    try:
        records = Manifest.load(target).files
    except NibbleError:
        records = {path.name: None for path in target.iterdir() if WEIGHTS_FILE.fullmatch(path.name)}
    ours = [name for name in records if (target / name).is_file()]
    for name in ours:
        record, weights = records[name], WEIGHTS_FILE.fullmatch(name) is not None
        if not weights and (record is None or sha256_file(target / name) != record.sha256):
            raise NibbleError(
                f"{target / name} is not what a conversion wrote there, so --force doesn't remove it.\n"
                "Move it away, or name another folder."
            )
    (target / MANIFEST).unlink()
    for name in ours:
        (target / name).unlink()
    _remove_partial(target)


def _remove_partial(target: Path) -> None:
    """What an interrupted conversion had not finished."""
    for path in target.glob(f"*{PARTIAL}"):
        if WEIGHTS_FILE.fullmatch(path.name.removesuffix(PARTIAL)):
            path.unlink()


def _refuse_overlap(folder: Path, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise NibbleError(f"{target} is a file. Name a folder for the converted checkpoint.")
    if target.resolve() == folder.resolve():
        raise NibbleError(f"source and destination are the same folder: {folder}. Name another destination.")


def check_space(target: Path, needed: int) -> None:
    """Raises NibbleError where the disk of a folder has fewer bytes left."""
    free = shutil.disk_usage(target).free
    if needed > free:
        raise NibbleError(
            f"{target}: {needed / 2**30:.1f} GiB more are needed, {free / 2**30:.1f} GiB are free there.\n"
            "Make room, or name a folder on another disk."
        )


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Makes the folder, and holds it against a second command that would write to it at the same time."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        handle = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise NibbleError(f"{target} can't be made: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise NibbleError(
                f"another command is writing to {target} now. Wait for it, or name another folder."
            ) from error
        yield
    finally:
        os.close(handle)
