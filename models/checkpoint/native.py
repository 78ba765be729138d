"""The converted format: weights as the native model keeps them, ready to be mapped and copied.

A folder with one safetensors file per decoder layer and one for the rest, under native names; the hub's config.json,
tokenizer and chat template; and `nibble.json`, which says how the weights are stored, what they were made from, and
every file's size and checksum. It contains no dates, and no path but the source as it was named: the same command
gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from models.checkpoint.keymap import Key
from models.checkpoint.layout import Layout
from models.checkpoint.side_files import CONFIG, is_plain
from models.checkpoint.stream import Piece
from models.checkpoint.tensorfile import DTYPES, MappedFolder, TensorInfo, read_header
from quant.choices import named_dtype
from quant.common.errors import NibbleError
from quant.common.files import write_atomically
from quant.common.jsonfile import flag, integer, kind_of, mapping, read_json, text, texts
from quant.common.words import counted, shown, some
from quant.storage import Kind, StorageSpec

MANIFEST = "nibble.json"
FORMAT_VERSION = 1
REST = "rest.safetensors"  # embedding, final norm and head
WEIGHTS_FILE = re.compile(rf"layer-\d{{5}}\.safetensors|{re.escape(REST)}")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class FileRecord:
    """size in bytes; sha256 in hexadecimal; tensors by native name (none for a tokenizer file and the like)."""

    size: int
    sha256: str
    tensors: tuple[str, ...] = ()


@dataclass
class Manifest:
    """What nibble.json holds.

    source: what the user named as source, a hub id or the folder's name. fingerprint: HubCheckpoint.fingerprint.
    carried: hub keys that were left out because the architecture doesn't compute with them. layout: how the source
    spells the others, None if that isn't known. Both are for an export, which writes what the source was like.
    merged: of a conversion of the source with an adapter merged into it, the adapter and options of models.merge.
    complete: all files are there; until then a conversion goes on where it stopped.
    """

    model_type: str
    spec: StorageSpec
    dtype: torch.dtype
    source: str
    fingerprint: str
    config: dict[str, Any]
    carried: tuple[str, ...] = ()
    layout: Layout | None = None
    files: dict[str, FileRecord] = field(default_factory=dict)
    complete: bool = False
    merged: tuple[str, ...] = ()

    def save(self, folder: Path) -> None:
        data = {
            "format": "nibble",
            "version": FORMAT_VERSION,
            "complete": self.complete,
            "model_type": self.model_type,
            "storage": dataclasses.asdict(self.spec),
            "dtype": dtype_name(self.dtype),
            "source": {"name": self.source, "fingerprint": self.fingerprint}
            | ({"merged": list(self.merged)} if self.merged else {}),
            "carried": list(self.carried),
            "layout": None if self.layout is None else dataclasses.asdict(self.layout),
            "config": self.config,
            "files": {name: dataclasses.asdict(self.files[name]) for name in sorted(self.files)},
        }
        write_atomically(folder / MANIFEST, json.dumps(data, indent=1).encode() + b"\n")

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Raises NibbleError where nibble.json is missing, damaged, or of a newer format."""
        path = folder / MANIFEST
        if not path.is_file():
            raise NibbleError(f"{folder}: there is no {MANIFEST}, so this isn't a converted checkpoint.")
        again, where = f"Delete {folder} and convert again.", str(path)
        data = read_json(path, dict, again)
        if data.get("format") != "nibble":
            raise NibbleError(f"{path} is not of a converted checkpoint: its format is {shown(data.get('format'))}.")
        version = integer(data, "version", 0, where)
        if version > FORMAT_VERSION:
            raise NibbleError(
                f"{path} has format version {version}; this version of nibble reads up to {FORMAT_VERSION}.\n"
                "Update nibble, or convert the source again."
            )
        storage, source, layout = (mapping(data, key, where) for key in ("storage", "source", "layout"))
        double = flag(storage, "double_quant", True, f"{where}: storage")
        try:
            spec = StorageSpec(cast(Kind, text(storage, "kind", "", f"{where}: storage")), double)
            dtype = named_dtype(text(data, "dtype", "bfloat16", where))
        except NibbleError as error:
            raise NibbleError(f"{where}: {str(error).removeprefix(f'{where}: ')}\n{again}") from error
        return Manifest(
            model_type=text(data, "model_type", "", where),
            spec=spec,
            dtype=dtype,
            source=text(source, "name", "", f"{where}: source"),
            fingerprint=text(source, "fingerprint", "", f"{where}: source"),
            config=mapping(data, "config", where),
            carried=tuple(texts(data, "carried", where)),
            layout=Layout(*(flag(layout, key, False, f"{where}: layout") for key in ("wrapped", "fused")))
            if layout
            else None,
            files={name: _record(name, entry, where) for name, entry in mapping(data, "files", where).items()},
            complete=flag(data, "complete", False, where),
            merged=tuple(texts(source, "merged", f"{where}: source")),
        )


def _record(name: str, entry: Any, where: str) -> FileRecord:
    if not is_plain(name):
        raise NibbleError(f"{where}: files names {shown(name)}, which can't be a file in the folder.")
    if not isinstance(entry, dict):
        raise NibbleError(f"{where}: files: {name} is {kind_of(entry)}, expected an object.")
    of = f"{where}: files: {name}"
    size = integer(entry, "size", -1, of, least=0, most=2**53)
    return FileRecord(size, text(entry, "sha256", "", of), tuple(texts(entry, "tensors", of)))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(spec: StorageSpec, dtype: torch.dtype) -> str:
    """ "nf4 with double quantisation, bfloat16" """
    return f"{describe_storage(spec)}, {dtype_name(dtype)}"


def describe_storage(spec: StorageSpec) -> str:
    return f"{spec.kind} with double quantisation" if spec.double_quant else spec.kind


def is_converted(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def group_by_file(keys: Iterable[Key]) -> dict[str, list[Key]]:
    """Which keys go into which file: one file per decoder layer, the rest in one."""
    files: dict[str, list[Key]] = {}
    for key in keys:
        layer = _LAYER.search(f".{key.native}")
        files.setdefault(f"layer-{int(layer[1]):05d}.safetensors" if layer else REST, []).append(key)
    return files


class NativeCheckpoint:
    """A converted checkpoint, opened: its manifest, with all weights present and of the right size.

    Implements stream.Reader once `bind` has given it the architecture's keys.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises NibbleError where the conversion is unfinished or a file is missing or damaged."""
        self.path = Path(path)
        self.manifest = Manifest.load(self.path)
        if not self.manifest.complete:
            raise NibbleError(
                f"{self.path}: the conversion isn't finished.\n"
                f"It goes on where it stopped: {convert_command(self.manifest, self.path)}"
            )
        wrong = wrong_sizes(self.path, self.manifest)
        if wrong:
            raise NibbleError(
                f"{self.path}: {some(wrong, 3)}.\n"
                f"This makes the damaged files again: {convert_command(self.manifest, self.path)}"
            )
        self.keys: tuple[Key, ...] = ()
        self._infos: dict[str, TensorInfo] = {}
        self._files: dict[str, str] = {}
        self._mapped = MappedFolder(self.path)

    @property
    def places(self) -> dict[str, tuple[str, TensorInfo]]:
        """By native name, once `bind` has read the headers: the file that holds the tensor, and where."""
        return {name: (self._files[name], info) for name, info in self._infos.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The names of the tensors, as nibble.json has them, with () for the shapes that it doesn't tell."""
        return {name: () for record in self.manifest.files.values() for name in record.tensors}

    def bind(self, keys: tuple[Key, ...]) -> NativeCheckpoint:
        """Check that the files hold exactly these keys' tensors, so that `read` can serve them."""
        self.keys = keys
        for name, record in self.manifest.files.items():
            if record.tensors:
                header = read_header(self.path / name)
                self._infos.update(header)
                self._files.update(dict.fromkeys(header, name))
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for key in keys:
            wanted.update(key.tensors())
        wrong = sorted(
            name
            for name in wanted.keys() | self._infos.keys()
            if name not in self._infos
            or name not in wanted
            or (self._infos[name].shape, DTYPES.get(self._infos[name].dtype)) != wanted[name]
        )
        if wrong:
            raise NibbleError(
                f"{self.path}: {counted(len(wrong), 'tensor')} missing, unknown or of other shapes: {some(wrong, 3)}.\n"
                f"Delete the folder and convert again: {convert_command(self.manifest, self.path)}"
            )
        return self

    def read(self, key: Key, experts: range | None = None) -> Iterator[Piece]:
        """One piece: the whole key, or one range of experts (step 1). The tensors are views of the mapped file."""
        if experts is not None and experts.step != 1:
            raise ValueError(f"experts must be consecutive, got {experts}")
        start = experts.start if key.parts and experts is not None else 0 if key.parts else None
        rows = experts if key.parts else None
        yield Piece(key, start, {name: self._tensor(name, rows) for name in key.tensors()})

    def _tensor(self, name: str, rows: range | None) -> Tensor:
        file, info = self._files[name], self._infos[name]
        nbytes = info.end - info.begin
        try:
            if rows is None:
                return self._mapped.file(file, nbytes).get_tensor(name)
            opened = self._mapped.file(file, nbytes * len(rows) // info.shape[0])
            return opened.get_slice(name)[rows.start : rows.stop]
        except (SafetensorError, OSError) as error:
            raise NibbleError(
                f"{self.path / file}: {name} can't be read ({error}).\n"
                f"Delete that file, then: {convert_command(self.manifest, self.path)}"
            ) from error

    def close(self) -> None:
        """Unmap the file that is open. Reading maps it again."""
        self._mapped.close()


def wrong_sizes(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the sizes of the files of weights, in words; empty where all is right. Reads no data."""
    wrong = []
    for name, record in manifest.files.items():
        if not record.tensors:
            continue  # a chat template or a tokenizer may be edited
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != record.size:
            wrong.append(f"{name} has {path.stat().st_size:,} bytes, {MANIFEST} says {record.size:,}")
    return wrong


def require_same_config(folder: Path, config: Mapping[str, Any], manifest: Manifest) -> None:
    """Raises NibbleError where config.json isn't what the weights beside it were converted with."""
    was = {**manifest.config, "model_type": manifest.model_type}
    absent = object()
    differ = [key for key in (*config, *was) if config.get(key, absent) != was.get(key, absent)]
    if differ:
        now, then = (shown(side[differ[0]]) if differ[0] in side else "absent" for side in (config, was))
        raise NibbleError(
            f"{folder / CONFIG}: {shown(differ[0])} is {now}; the folder was converted with {then} ({MANIFEST}).\n"
            f"Restore the file from {manifest.source}, or change it there and convert that again into another folder."
        )


def convert_command(manifest: Manifest, folder: Path) -> str:
    """The command that makes (or finishes) a converted folder."""
    adapter, options = manifest.merged[:1], manifest.merged[1:]
    command = ["python", "-m", "models.merge" if adapter else "models.convert", manifest.source, *adapter, str(folder)]
    command += [*options, "--storage", manifest.spec.kind]
    if manifest.spec.kind in ("nf4", "fp4") and not manifest.spec.double_quant:
        command.append("--single-quant")
    if manifest.dtype != torch.bfloat16:
        command += ["--dtype", dtype_name(manifest.dtype)]
    return shlex.join(command)
