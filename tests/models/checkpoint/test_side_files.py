"""What goes with the weights, and what a link must not bring along."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.checkpoint.side_files import side_files
from quant.common.errors import NibbleError


def test_side_files_are_those_of_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "hub", tmp_path / "secret"
    (folder / "additional_chat_templates").mkdir(parents=True)
    outside.write_text("a password")
    (folder / "config.json").write_text("{}")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    (folder / "vocab.json").symlink_to(folder / "config.json")
    assert side_files(folder) == {
        "config.json": b"{}",
        "vocab.json": b"{}",
        "additional_chat_templates/tool_use.jinja": b"x",
    }
    for name in ("chat_template.jinja", "additional_chat_templates/a.jinja"):
        link = folder / name
        link.symlink_to(outside)
        with pytest.raises(NibbleError, match=rf"{name} is a link to .*secret, outside the checkpoint's folder"):
            side_files(folder)
        link.unlink()
    (folder / "merges.txt").symlink_to(tmp_path / "nothing")
    assert "merges.txt" not in side_files(folder)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    snapshot, blob = model / "snapshots" / "abc", model / "blobs" / "123"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert side_files(snapshot) == {"config.json": b"{}"}
    (snapshot / "vocab.json").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("x")
    with pytest.raises(NibbleError, match="outside the checkpoint's folder"):
        side_files(snapshot)
