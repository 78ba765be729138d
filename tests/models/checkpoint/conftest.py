"""What the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import save_tiny_glm


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that transformers saved, in several shards. Read only."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    save_tiny_glm(folder).save_pretrained(folder / "sharded", max_shard_size="300KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "sharded").iterdir():
        file.replace(folder / file.name)
    (folder / "sharded").rmdir()
    assert len(list(folder.glob("*.safetensors"))) > 3
    (folder / "tokenizer.json").write_text('{"tokens": "ü"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not needed")
    return folder
