"""What identifies the content of a hub folder: every byte of it, hashed once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import fingerprint
from models.checkpoint.hub import INDEX, SINGLE, HubCheckpoint
from tests.hub_forms import write_checkpoint


def test_fingerprint_follows_content_and_not_the_files_names(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "a", shards=2)
    write_checkpoint(tmp_path / "b", shards=2)
    content = HubCheckpoint(tmp_path / "a").fingerprint()
    assert content.startswith("full:")
    assert HubCheckpoint(tmp_path / "b").fingerprint() == content
    (tmp_path / "b" / INDEX).unlink()
    save_file(tensors, tmp_path / "b" / SINGLE)
    assert HubCheckpoint(tmp_path / "b").fingerprint() == content
    tensors["layer.3.weight"][0, 0, 0] += 1  # same shapes, other values: a fine-tuned model
    save_file(tensors, tmp_path / "b" / SINGLE)
    assert HubCheckpoint(tmp_path / "b").fingerprint() != content


def test_fingerprint_sees_the_last_byte_and_says_when_only_samples_are_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a tensor of 5 MiB an earlier version read 4 KiB at its beginning and 4 KiB at 4 MiB."""
    caplog.set_level("INFO", "nibble")
    tensors = {"embedding": torch.zeros(5, 2**20, dtype=torch.uint8), "scale": torch.ones(3)}
    (tmp_path / "config.json").write_text("{}")

    def saved() -> HubCheckpoint:
        save_file(tensors, tmp_path / SINGLE)
        return HubCheckpoint(tmp_path)

    digest = hashlib.sha256(b"{}")  # as the version before made it
    digest.update(b"\nembedding U8 [5, 1048576]\n\nscale F32 [3]\n")
    digest.update(bytes(2 * 4096) + tensors["scale"].numpy().tobytes())
    sampled = f"sha256:{digest.hexdigest()}"
    content = saved().fingerprint()
    assert saved().has_fingerprint(content, "")
    assert caplog.messages == []
    assert saved().has_fingerprint(sampled, "Do this.")
    assert caplog.messages == [
        f"{tmp_path}: taken for the same by samples of its data, all that an earlier version of nibble recorded; a "
        "small change goes unseen. Do this."
    ]
    tensors["embedding"][-1, -1] = 1
    assert not saved().has_fingerprint(content, "")
    assert saved().has_fingerprint(sampled, "")
    tensors["scale"][1] = 2
    assert not saved().has_fingerprint(sampled, "")


def test_a_change_that_sets_its_date_back_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub"
    write_checkpoint(folder, shards=1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_SMALL", 1)
    (shard,) = folder.glob("*.safetensors")
    os.utime(shard, (0, 0))
    before = HubCheckpoint(folder).fingerprint()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, (0, 0))
    assert HubCheckpoint(folder).fingerprint() != before


def test_a_large_checkpoint_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nibble")
    folder, cache = tmp_path / "hub", tmp_path / "cache"
    tensors = write_checkpoint(folder, shards=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    small = HubCheckpoint(folder).fingerprint()
    assert not cache.exists()
    monkeypatch.setattr(fingerprint, "_SMALL", 1)

    def of_age() -> str:
        for path in folder.glob("*.safetensors"):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10))
        return HubCheckpoint(folder).fingerprint()

    def hashed() -> int:
        return sum("hashed" in message for message in caplog.messages)

    assert HubCheckpoint(folder).fingerprint() == small
    assert hashed() == 1
    assert not cache.exists(), "a file that was written just now may change without another date"
    assert of_age() == small == HubCheckpoint(folder).fingerprint()
    assert hashed() == 2
    assert len(list(cache.rglob("*.json"))) == 1 and not list(folder.glob("*.partial"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {"config.json", INDEX, *(path.name for path in folder.glob("*.safetensors"))}
    )

    # Another value under the same size; then a damaged memory; then one that can't be written.
    tensors["layer.3.weight"][0, 0, 0] += 1
    for shard in folder.glob("*.safetensors"):
        held = load_file(shard)
        save_file({name: tensors[name] for name in held}, shard)
    other = of_age()
    assert other != small and hashed() == 3
    assert HubCheckpoint(folder).fingerprint() == other and hashed() == 3
    next(cache.rglob("*.json")).write_text("{")
    assert HubCheckpoint(folder).fingerprint() == other and hashed() == 4
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert HubCheckpoint(folder).fingerprint() == other
    assert "will be read whole again the next time, as that can't be remembered" in caplog.messages[-1]
