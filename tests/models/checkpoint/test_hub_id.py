"""Hub ids: the folders that they mean, and what is downloaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from models.checkpoint.conversion import convert
from models.checkpoint.hub import INDEX
from models.checkpoint.hub_id import local_folder, looks_like_hub_id, resolve_model
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.hub_forms import write_checkpoint


def test_resolve_existing_folder_and_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == tmp_path
    for wrong in ("/nowhere/model", "nowhere", "a/b/c", "./x/y"):
        with pytest.raises(NibbleError, match=r"doesn't exist\. Wanted: a checkpoint folder, or a hub id such as"):
            resolve_model(wrong)
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_id("outputs/model")
    (tmp_path / "outputs").mkdir()
    assert not looks_like_hub_id("outputs/model")


def test_names_that_no_folder_can_have(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    unknown = r"^~nosuchuser/x: this machine has no user nosuchuser, whose folder ~ means\.$"
    for read in (resolve_model, local_folder, lambda name: convert(tmp_path, name, StorageSpec("none"))):
        with pytest.raises(NibbleError, match=unknown):
            read("~nosuchuser/x")
    with pytest.raises(NibbleError, match=r"aaa doesn't exist\. Wanted: a checkpoint folder, or a hub id"):
        resolve_model("a" * 300)


def test_folder_of_a_name_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    snapshot = cache / "models--Qwen--Tiny" / "snapshots" / "abc"
    write_checkpoint(snapshot)
    (cache / "models--Qwen--Tiny" / "refs").mkdir()
    (cache / "models--Qwen--Tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    assert local_folder("Qwen/Tiny") == snapshot
    assert local_folder(str(snapshot)) == snapshot
    assert local_folder("Qwen/Other") is None
    assert local_folder("/nowhere/Tiny") is None


def test_hub_id_is_downloaded_without_code_or_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked["name"] = name
        files = ["model-00001-of-00002.safetensors", INDEX, "config.json", "tokenizer.model", "chat_template.jinja"]
        files += ["vocab.json", "merges.txt", "model.safetensors-00001-of-00014.safetensors"]
        files += ["processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"]
        others = ["pytorch_model.bin", "modeling_x.py", "tokenizer_x.py", "README.md", "x.gguf", "onnx/model.json"]
        found = filter_repo_objects(files + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert list(found) == files
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("zai-org/GLM-4.7-Flash") == tmp_path
    assert asked == {"name": "zai-org/GLM-4.7-Flash"}


def test_offline_message_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NibbleError) as caught:
        resolve_model("zai-org/GLM-4.7-Flash")
    assert str(caught.value) == (
        "zai-org/GLM-4.7-Flash is no folder here and could not be fetched from the hub: the hub can't be reached and "
        "the hub cache doesn't hold it.\n"
        "Where there is a connection: hf download zai-org/GLM-4.7-Flash "
        "--local-dir checkpoints/GLM-4.7-Flash\n"
        "Then set model.path (or the argument) to that folder."
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("RepositoryNotFoundError", "the hub has no such model, or it is private"),
        ("GatedRepoError", "only to those who accepted its conditions"),
        ("HfHubHTTPError", "HfHubHTTPError: 500 Server Error"),
        ("ConnectionResetError", "ConnectionResetError: reset by peer"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: str, expected: str) -> None:
    from huggingface_hub import errors

    def fail(*_: object, **__: object) -> str:
        if error == "ConnectionResetError":
            raise ConnectionResetError("reset by peer")
        raise getattr(errors, error)("500 Server Error", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(NibbleError) as caught:
        resolve_model("someone/model")
    assert expected in str(caught.value)
    assert "hf download someone/model --local-dir checkpoints/model" in str(caught.value)
