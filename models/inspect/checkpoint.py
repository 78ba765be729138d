"""What is in a checkpoint's folder, in the hub's format or converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from models.blocks.groups import GROUP_WORDS
from models.checkpoint.content import check_content, differing
from models.checkpoint.conversion import count_parameters
from models.checkpoint.hub import HubCheckpoint, check_counts
from models.checkpoint.hub_id import download_command, downloaded_sums
from models.checkpoint.keymap import Key, key_map_of
from models.checkpoint.native import Manifest, NativeCheckpoint, dtype_name
from models.checkpoint.side_files import CONFIG, side_names
from models.checkpoint.stream import HubReader, sum_up
from models.checkpoint.tensorfile import DTYPES, TensorInfo
from models.inspect.diff import Compared
from models.inspect.settings import flat, read_settings
from models.load import ModelFolder
from quant.common.errors import NibbleError
from quant.common.files import sha256_file
from quant.common.words import some
from quant.storage import StorageSpec

Places = Mapping[str, tuple[str, TensorInfo]]


def open_checkpoint(folder: ModelFolder) -> tuple[HubReader | NativeCheckpoint, dict[str, Any]]:
    """A reader of the checkpoint's tensors, in the dtypes and the storage that the files have (of a hub checkpoint: the
    dtype that most bytes have), and what `read_settings` found. Headers are read and compared with config.json.

    Raises NibbleError where the weights are incomplete, damaged, or don't fit config.json.
    """
    where = str(folder.path / "config.json")
    architecture, config, settings = read_settings(folder.config, where)
    checkpoint = HubCheckpoint(folder.path) if folder.manifest is None else NativeCheckpoint(folder.path)
    check_counts(checkpoint.shapes, config.layers, config.experts, where)
    if isinstance(checkpoint, NativeCheckpoint):
        spec, dtype = checkpoint.manifest.spec, checkpoint.manifest.dtype
        keys = key_map_of(architecture.build(config, spec, dtype, "meta"))
        return checkpoint.bind(keys.keys), settings
    dtype = DTYPES.get(_dtype(checkpoint.places), torch.bfloat16)
    keys = key_map_of(architecture.build(config, StorageSpec("none"), dtype, "meta"))
    return HubReader(checkpoint, keys), settings


def inspect_checkpoint(folder: ModelFolder, *, quick: bool = False) -> dict[str, Any]:
    """The report of a checkpoint. quick: only headers are read, nothing is compared with its checksum.

    Raises NibbleError as `open_checkpoint` does, and for files that aren't what their checksums say.
    """
    reader, settings = open_checkpoint(folder)
    checkpoint = reader.checkpoint if isinstance(reader, HubReader) else reader
    places = checkpoint.places
    report: dict[str, Any] = {
        "path": str(folder.path),
        "kind": "converted" if folder.manifest else "hub",
        "model_type": folder.config["model_type"],
    }
    if folder.manifest is not None:
        manifest = folder.manifest
        report |= {
            "storage": manifest.spec.kind,
            "double_quant": manifest.spec.double_quant,
            "dtype": dtype_name(manifest.dtype),
            "source": manifest.source,
            "fingerprint": manifest.fingerprint,
        }
        sums, carried, left_out = _converted_sums(folder.path, manifest, quick), manifest.carried, None
        if manifest.carried:
            left_out = sum_up(manifest.carried)
    else:
        assert isinstance(reader, HubReader)
        report |= {
            "storage": "none",
            "double_quant": False,
            "dtype": _named(_dtype(places)),
            "source": folder.name,
            "fingerprint": None if quick else reader.checkpoint.fingerprint(),
        }
        sums, carried = _hub_sums(reader.checkpoint, quick), reader.carried
        left_out = reader.left_out() if carried else None
    return report | {
        "parameters": count_parameters(reader.keys),
        "bytes": sum(info.end - info.begin for _, info in places.values()),
        "groups": list(_groups(reader, places)),
        "carried": {"tensors": list(carried), "summary": left_out},
        "files": _files(folder.path, places, sums),
        "settings": settings,
    }


def _groups(reader: HubReader | NativeCheckpoint, places: Places) -> Iterator[dict[str, Any]]:
    """A row per group of weights: the exact number of parameters (buffers such as routers' biases are none), and the
    bytes and kinds of what is stored for them.
    """
    for group, words in GROUP_WORDS.items():
        keys = [key for key in reader.keys if key.group == group]
        if not keys:
            continue
        stored: Counter[str] = Counter()
        for key in keys:
            packed = isinstance(reader, NativeCheckpoint) and key.spec is not None and key.spec.kind != "none"
            for name in _names(reader, key):
                info = places[name][1]
                kind = key.spec.kind if packed and key.spec is not None else _named(info.dtype)
                stored[kind] += info.end - info.begin
        yield {
            "group": group,
            "words": words,
            "parameters": count_parameters(keys),
            "tensors": sum(1 for key in keys for _ in _names(reader, key)),
            "bytes": stored.total(),
            "stored": [kind for kind, _ in stored.most_common()],
        }


def _names(reader: HubReader | NativeCheckpoint, key: Key) -> Iterator[str]:
    """The names of a key's tensors in the files."""
    if isinstance(reader, NativeCheckpoint):
        yield from key.tensors()
    elif key.hub in reader.checkpoint:
        yield key.hub
    else:
        yield from key.part_keys()


def _files(folder: Path, places: Places, sums: Mapping[str, str | None]) -> list[dict[str, Any]]:
    counts = Counter(name for name, _ in places.values())
    return [
        {
            "name": name,
            "bytes": (folder / name).stat().st_size,
            "tensors": counts[name],
            "checksum": sums.get(name),
        }
        for name in [*sorted(counts), *side_names(folder)]
    ]


def _converted_sums(folder: Path, manifest: Manifest, quick: bool) -> dict[str, str | None]:
    """By file: "matches"; of a tokenizer file or a template, which may be changed, also "changed"; None: not compared.

    Raises NibbleError where a file of weights doesn't match.
    """
    if quick:
        return {}
    check_content(folder, manifest)
    found: dict[str, str | None] = {}
    for name, record in manifest.files.items():
        if record.tensors:
            found[name] = "matches"
        elif (folder / name).is_file():
            found[name] = "matches" if sha256_file(folder / name) == record.sha256 else "changed"
    return found


def _hub_sums(checkpoint: HubCheckpoint, quick: bool) -> dict[str, str | None]:
    """By shard: "matches" the SHA-256 that came with the download; None where none did, or it wasn't compared."""
    shards = sorted({name for name, _ in checkpoint.places.values()})
    sums = {} if quick else downloaded_sums(checkpoint.path, shards)
    if differ := differing(checkpoint.path, sums):
        raise NibbleError(
            f"{checkpoint.path}: {some(differ)}: not what the hub's checksum says.\n"
            f"Fetch it again: {download_command(checkpoint.path, differ[0] if len(differ) == 1 else '')}"
        )
    return dict.fromkeys(sums, "matches")


def _dtype(places: Places) -> str:
    """The file format's name of the dtype that most bytes have."""
    counts: Counter[str] = Counter()
    for _, info in places.values():
        counts[info.dtype] += info.end - info.begin
    return next((name for name, _ in counts.most_common(1)), "")


def _named(dtype: str) -> str:
    """ "bfloat16" of the file format's "BF16" """
    return dtype_name(DTYPES[dtype]) if dtype in DTYPES else dtype


def compared_checkpoint(folder: ModelFolder) -> Compared:
    """What a difference between two checkpoints may be in: config.json, how weights are stored and what was left out,
    every tensor, the files beside them. How tensors are divided into files doesn't count, nor does the source's name.
    """
    reader, _ = open_checkpoint(folder)
    checkpoint = reader.checkpoint if isinstance(reader, HubReader) else reader
    stored: dict[str, Any] = {"format": "converted" if folder.manifest else "hub"}
    carried: dict[str, Any] = {}
    if folder.manifest is not None:
        manifest = folder.manifest
        stored |= {
            "storage": manifest.spec.kind,
            "double_quant": manifest.spec.double_quant,
            "dtype": dtype_name(manifest.dtype),
            "source's fingerprint": manifest.fingerprint,
        }
        carried = dict.fromkeys(manifest.carried, "left out")
    values = {"stored": stored, "config": flat(folder.config), "carried": carried}
    files = tuple(name for name in side_names(folder.path) if name != CONFIG)
    return Compared(folder.path, values, checkpoint.places, files)
