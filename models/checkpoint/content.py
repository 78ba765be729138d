"""Whether the files of a converted checkpoint are what was written: their checksums, compared when they must be."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from models.checkpoint.native import Manifest, NativeCheckpoint, convert_command
from models.checkpoint.remembered import recall, remember, state_of
from quant.common.errors import NibbleError
from quant.common.files import sha256_file
from quant.common.progress import Bar
from quant.common.words import counted, format_bytes, some

log = logging.getLogger("nibble")

_VERIFIED = "verified"
_SMALL = 2**28  # bytes: so little is read in less than a second, each time
_THREADS = 4
_SAMPLE = 4096  # bytes
_SAMPLE_EVERY = 16 * 2**20  # bytes


def check_content(folder: Path, manifest: Manifest) -> None:
    """Raises NibbleError where a file of weights isn't what was written (`differing`)."""
    if differ := differing(folder, {name: record.sha256 for name, record in manifest.files.items() if record.tensors}):
        raise _damaged(folder, manifest, differ)


def differing(folder: Path, sums: Mapping[str, str]) -> list[str]:
    """The files of a folder whose SHA-256 is another than `sums` has by their names.

    A folder whose files have the sizes, dates and inodes of the time when they were last compared with their checksums
    is only sampled; another one is read whole. A small one always is.
    """
    sizes = {name: (folder / name).stat().st_size for name in sums}
    total = sum(sizes.values())
    state = state_of(folder, sums)
    found = (recall(_VERIFIED, folder, state) if total > _SMALL else None) or {}
    samples = found.get("samples")
    if found.get("sums") == sums and isinstance(samples, dict):
        return [name for name in sums if samples.get(name) != _sample(folder / name)]
    if total > _SMALL:
        log.info("%s: checking %s once, as it is new here or has changed", folder, format_bytes(total))
    with Bar("checking the checkpoint", show=total > _SMALL) as bar, ThreadPoolExecutor(_THREADS) as pool:
        done, differ = 0, []
        for name, value in zip(sums, pool.map(lambda name: sha256_file(folder / name), sums), strict=True):
            done += sizes[name]
            bar.update(done, total, name)
            if value != sums[name]:
                differ.append(name)
    if not differ and total > _SMALL:
        samples = {name: _sample(folder / name) for name in sums}
        remember(_VERIFIED, folder, state, {"sums": dict(sums), "samples": samples})
    return differ


def _sample(path: Path) -> str:
    """Of a file, 4 KiB out of every 16 MiB."""
    digest = hashlib.sha256()
    with path.open("rb", 0) as file:
        for start in range(0, path.stat().st_size, _SAMPLE_EVERY):
            digest.update(os.pread(file.fileno(), _SAMPLE, start))
    return digest.hexdigest()


def _damaged(folder: Path, manifest: Manifest, differ: list[str]) -> NibbleError:
    return NibbleError(
        f"{folder}: {counted(len(differ), 'file')} missing or changed since it was written: {some(differ)}.\n"
        f"Delete {'it' if len(differ) == 1 else 'them'}, then: {convert_command(manifest, folder)}"
    )


def verify(folder: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Manifest:
    """Compare every file with its sha256. Raises NibbleError naming the files that differ or are missing.

    progress(bytes, total): bytes checked since the last call, of how many in all.
    """
    checkpoint = NativeCheckpoint(folder)
    differ, total = [], sum(record.size for record in checkpoint.manifest.files.values())
    for name, record in checkpoint.manifest.files.items():
        if not (folder / name).is_file() or sha256_file(folder / name) != record.sha256:
            differ.append(name)
        progress(record.size, total)
    if differ:
        raise _damaged(folder, checkpoint.manifest, differ)
    return checkpoint.manifest
