"""What identifies the content of a hub checkpoint: a hash of all of it, made once and remembered.

Earlier versions of nibble recorded a fingerprint of samples ("sha256:…"), which misses a change that lies between two
samples. Where such a one was recorded, it is compared as it was made, with a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models.checkpoint.remembered import recall, remember, state_of
from models.checkpoint.tensorfile import TensorInfo
from quant.common.errors import NibbleError
from quant.common.progress import Bar
from quant.common.words import format_bytes

log = logging.getLogger("nibble")

_KIND = "full:"
_AT_ONCE = 4 * 2**20  # bytes
_THREADS = 4
_SMALL = 2**28  # bytes: so little is hashed in less than a second, each time
_SAMPLE = 4096  # bytes
_SAMPLE_EVERY = 4 * 2**20  # bytes

# By hub key: the file that holds the tensor, and where.
Tensors = Mapping[str, tuple[str, TensorInfo]]


def full_fingerprint(folder: Path, config: bytes, tensors: Tensors) -> str:
    """ "full:…": SHA-256 over the bytes of config.json, and every tensor's key, dtype, shape and data.

    File names, dates and the division into files don't count. Where every file has the size, dates and inode of the
    time when it was last hashed, the hash remembered in the user's cache folder is taken. Raises NibbleError where a
    file can't be read.
    """
    total = sum(info.end - info.begin for _, info in tensors.values())
    data = _hash_tensors(folder, tensors) if total < _SMALL else _cached_hash(folder, tensors, total)
    return _KIND + hashlib.sha256(config + b"\n" + data.encode()).hexdigest()


def _cached_hash(folder: Path, tensors: Tensors, total: int) -> str:
    # Which file holds which tensor counts too: of two copies the index says which one is read.
    places = hashlib.sha256(repr(sorted((key, name) for key, (name, _) in tensors.items())).encode()).hexdigest()
    files = state_of(folder, {name for name, _ in tensors.values()})
    found = recall("fingerprints", folder, files) or {}
    if found.get("places") == places and isinstance(found.get("sha256"), str):
        return str(found["sha256"])
    log.info("%s: hashing %s, once, so that any change of it is seen", folder, format_bytes(total))
    begun = time.monotonic()
    with Bar("hashing the checkpoint, once") as bar:
        data = _hash_tensors(folder, tensors, lambda done: bar.update(done, total))
    log.info("%s: hashed in %.0f s", folder, time.monotonic() - begun)
    remember("fingerprints", folder, files, {"places": places, "sha256": data})
    return data


def sampled_fingerprint(folder: Path, config: bytes, tensors: Tensors) -> str:
    """ "sha256:…", as earlier versions made it: of each tensor's data 4 KiB out of every 4 MiB."""
    digest = hashlib.sha256(config)
    for key in sorted(tensors):
        digest.update(_described(key, tensors[key][1]))
    with contextlib.ExitStack() as opened:
        files = {
            name: opened.enter_context((folder / name).open("rb", 0)) for name in {name for name, _ in tensors.values()}
        }
        for key in sorted(tensors):
            name, info = tensors[key]
            for begin in range(info.begin, info.end, _SAMPLE_EVERY):
                digest.update(os.pread(files[name].fileno(), min(_SAMPLE, info.end - begin), begin))
    return f"sha256:{digest.hexdigest()}"


def is_sampled(fingerprint: str) -> bool:
    return not fingerprint.startswith(_KIND)


def _described(key: str, info: TensorInfo) -> bytes:
    return f"\n{key} {info.dtype} {list(info.shape)}\n".encode()


def fingerprint_of(config: bytes, tensors: Tensors, hashes: Mapping[str, bytes]) -> str:
    """As `full_fingerprint`, of tensors whose data has these SHA-256 by key."""
    return _KIND + hashlib.sha256(config + b"\n" + _digest(tensors, hashes).encode()).hexdigest()


def _digest(tensors: Tensors, hashes: Mapping[str, bytes]) -> str:
    """SHA-256 over the tensors' descriptions and hashes in the order of keys."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(_described(key, tensors[key][1]) + hashes[key])
    return digest.hexdigest()


def _hash_tensors(folder: Path, tensors: Tensors, progress: Callable[[int], None] = lambda done: None) -> str:
    """Tensor by tensor, some at a time in threads."""
    by_place = sorted(tensors, key=lambda key: (tensors[key][0], tensors[key][1].begin))
    hashes: dict[str, bytes] = {}
    done = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda key: hash_tensor(folder / tensors[key][0], tensors[key][1]), by_place)
        for key, value in zip(by_place, found, strict=True):
            hashes[key] = value
            done += tensors[key][1].end - tensors[key][1].begin
            progress(done)
    return _digest(tensors, hashes)


def hash_tensor(path: Path, info: TensorInfo) -> bytes:
    """SHA-256 of a tensor's data. Raises NibbleError where it can't be read."""
    digest, position = hashlib.sha256(), info.begin
    try:
        with path.open("rb", 0) as file:
            while position < info.end:
                part = os.pread(file.fileno(), min(_AT_ONCE, info.end - position), position)
                if not part:
                    raise OSError("it ends too early")
                digest.update(part)
                position += len(part)
    except OSError as error:
        raise NibbleError(f"{path} can't be read: {error.strerror or error}.") from error
    return digest.digest()
