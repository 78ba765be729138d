"""Files of a converted checkpoint that aren't what was written: found when it is loaded."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from models import load_model
from models.checkpoint import content, remembered
from models.checkpoint.content import check_content
from models.checkpoint.conversion import convert
from models.checkpoint.native import Manifest
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.helpers import save_tiny_glm

OLD = 1_000_000_000  # a date long before the tests run, in seconds


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A converted checkpoint with files of another day, so that what is found of them is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_tiny_glm(tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "nf4", StorageSpec("nf4"), torch.float32)
    for path in (tmp_path / "nf4").iterdir():
        os.utime(path, (OLD, OLD))
    return tmp_path / "nf4"


def flip(path: Path, position: int) -> None:
    """One bit of one byte, with the file's dates as they were as far as a user can set them."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def load(folder: Path) -> None:
    load_model(folder, "nf4", "float32")


def test_one_flipped_bit_is_found_when_the_model_is_loaded(folder: Path) -> None:
    load(folder)
    path = folder / "layer-00001.safetensors"
    flip(path, path.stat().st_size - 5)
    with pytest.raises(NibbleError) as error:
        load(folder)
    assert str(error.value) == (
        f"{folder}: 1 file missing or changed since it was written: layer-00001.safetensors.\nDelete it, then: "
        f"python -m models.convert {folder.parent / 'hub'} {folder} --storage nf4 --dtype float32"
    )
    flip(path, path.stat().st_size - 5)
    load(folder)


def test_large_files_are_read_whole_once_and_then_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_SMALL", 0)
    read: list[str] = []

    def counting(path: Path) -> str:
        read.append(path.name)
        return sha256_file(path)

    from quant.common.files import sha256_file

    monkeypatch.setattr(content, "sha256_file", counting)
    manifest = Manifest.load(folder)
    weights = [name for name, record in manifest.files.items() if record.tensors]
    check_content(folder, manifest)
    assert sorted(read) == sorted(weights)
    check_content(folder, manifest)
    assert len(read) == len(weights), "the second time they are sampled"

    # A file with another date is read again, and all others with it; a date set back doesn't hide it (ctime).
    os.utime(folder / weights[0], (OLD, OLD))
    check_content(folder, manifest)
    assert len(read) == 2 * len(weights)

    # A disk that changes a file's bytes changes none of its dates: where a sample has them, they are found.
    state = remembered.state_of(folder, weights)
    flip(folder / weights[0], 100)
    monkeypatch.setattr(content, "state_of", lambda folder, names: state)
    with pytest.raises(NibbleError, match=f"1 file missing or changed since it was written: {weights[0]}"):
        check_content(folder, manifest)
    assert len(read) == 2 * len(weights)


def test_what_was_written_just_now_is_not_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_SMALL", 0)
    now = time.time()
    os.utime(folder / "rest.safetensors", (now, now))
    check_content(folder, Manifest.load(folder))
    assert not list((folder.parent / "cache").rglob("*.json"))


def test_a_cache_that_cannot_be_written_or_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(content, "_SMALL", 0)
    (folder.parent / "cache").write_text("a file")
    check_content(folder, Manifest.load(folder))
    assert "will be read whole again the next time, as that can't be remembered" in caplog.text
    (folder.parent / "cache").unlink()
    check_content(folder, Manifest.load(folder))
    next((folder.parent / "cache").rglob("*.json")).write_text('{"state": []}')
    check_content(folder, Manifest.load(folder))
