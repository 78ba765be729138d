"""Reading a hub folder: what is in it, and every way in which it can be damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.checkpoint.hub import INDEX, SINGLE, HubCheckpoint, check_counts
from quant.common.errors import NibbleError
from quant.common.words import shown
from tests.hub_forms import write_checkpoint


def message(folder: Path) -> str:
    with pytest.raises(NibbleError) as caught:
        HubCheckpoint(folder)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 2])
def test_reads_every_tensor_and_single_rows(tmp_path: Path, shards: int) -> None:
    tensors = write_checkpoint(tmp_path, shards)
    with HubCheckpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(tensors)
        assert len(checkpoint) == len(tensors)
        assert "layer.0.weight" in checkpoint
        assert checkpoint.config == {"model_type": "tiny"}
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        assert checkpoint.dtype("layer.0.weight") == "BF16"
        for name, tensor in tensors.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert torch.equal(checkpoint.tensor(name), tensor)
        for expert in (0, 3, 5):
            row = checkpoint.row("layer.1.weight", expert)
            assert torch.equal(row, tensors["layer.1.weight"][expert])


def test_missing_folder(tmp_path: Path) -> None:
    assert "nowhere doesn't exist. Wanted: a folder with config.json and *.safetensors" in message(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.touch()
    assert "is a file, not a folder" in message(file)


def test_missing_config(tmp_path: Path) -> None:
    assert "there is no config.json, so this isn't a checkpoint folder.\nIt is empty." in message(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "It holds: notes.txt." in message(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{not json", "config.json is not valid JSON: Expecting property name"),
        ("[1]", "config.json holds a list, expected an object"),
    ],
)
def test_broken_config(tmp_path: Path, text: str, expected: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert expected in message(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    folder = tmp_path / "GLM-4.7-Flash"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    text = message(folder)
    assert "there are no weights (model.safetensors, or model.safetensors.index.json and its shards)" in text
    assert f"hf download zai-org/GLM-4.7-Flash --local-dir {folder}" in text


def test_shards_without_their_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX).unlink()
    text = message(tmp_path)
    assert "model.safetensors.index.json is missing; without it model-00001-of-00002.safetensors" in text
    assert f"hf download ORGANISATION/{tmp_path.name} model.safetensors.index.json" in text


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04")
    text = message(tmp_path)
    assert f"the weights are pickle files ({name})" in text
    assert "can run any code that is in it, so only safetensors are read" in text
    assert "fetch those: hf download" in text
    assert "save_pretrained writes safetensors" in text


def test_index_of_pickle_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001.bin"}}))
    assert "the weights are pickle files (pytorch_model-00001.bin)" in message(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", " is not valid JSON: Expecting property name"),
        ("[]", " holds a list, expected an object"),
        ("{}", ": weight_map should name a shard for every key"),
        ('{"weight_map": [1]}', ": weight_map must be an object, got [1]"),
        ('{"weight_map": {"a": 1}}', ": weight_map should name a shard for every key"),
        ('{"weight_map": {"a": "x", "a": "y"}}', " is not valid JSON: the key 'a' stands twice in one object"),
    ],
)
def test_broken_index(tmp_path: Path, text: str, expected: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(text)
    assert f"{INDEX}{expected}" in message(tmp_path)


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "a/b.safetensors", "a" * 300 + ".safetensors", "\0.safetensors"]
)
def test_index_that_names_no_file_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert f"{INDEX} names {shown(name)}, which can't be a file in the folder." in message(tmp_path)


def test_index_that_names_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "config.json"}}))
    assert f"{INDEX} names 'config.json'; weights are read from *.safetensors.\n" in message(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    folder = tmp_path / "GLM-4.7-Flash"
    write_checkpoint(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert message(folder) == (
        f"{folder}: shard model-00002-of-00002.safetensors is missing (the index names it for 2 tensors).\n"
        "Fetch it again: hf download zai-org/GLM-4.7-Flash model-00002-of-00002.safetensors "
        f"--local-dir {folder}"
    )
    (folder / "model-00001-of-00002.safetensors").unlink()
    text = message(folder)
    assert "model-00001-of-00002.safetensors is missing (the index names it for 3 tensors). 1 more is missing" in text
    assert f"hf download zai-org/GLM-4.7-Flash --local-dir {folder}" in text


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (-100, "is cut short: "),
        (20, "is cut short: 20 bytes, its header alone has "),
        (3, "is not a safetensors file (3 bytes)"),
        (0, "is not a safetensors file (0 bytes)"),
    ],
)
def test_truncated_shard(tmp_path: Path, keep: int, expected: str) -> None:
    write_checkpoint(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    text = message(tmp_path)
    assert f"{shard} {expected}" in text
    assert f"hf download ORGANISATION/{tmp_path.name} {shard.name} --local-dir {tmp_path}" in text


def test_corrupt_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:8] + b"[" + whole[9:])
    assert "is not a safetensors file: its header can't be read" in message(tmp_path)
    shard.write_bytes(whole + b"more")
    assert "is longer than it should be" in message(tmp_path)
    shard.write_bytes(b"<html>404 not found</html>" * 10)
    assert "is not a safetensors file" in message(tmp_path)


def test_header_that_safetensors_itself_refuses(tmp_path: Path) -> None:
    # The header can be read and adds up, but a tensor's bytes don't match its shape.
    write_checkpoint(tmp_path, shards=1)
    file = tmp_path / SINGLE
    file.write_bytes(file.read_bytes().replace(b'"shape":[6,4,8]', b'"shape":[6,4,9]', 1))
    found = message(tmp_path)
    assert "('layer.0.weight' has 384 bytes, BF16 [6, 4, 9] needs 432).\nFetch it again" in found


def test_key_that_the_index_names_and_the_shard_lacks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["layer.9.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    text = message(tmp_path)
    assert "says that model-00001-of-00002.safetensors holds layer.9.weight; it doesn't" in text
    assert "Index and shards are of different versions" in text


def test_keys_that_the_index_forgets_are_not_lost(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["layer.2.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "layer.2.weight" in HubCheckpoint(tmp_path)


def test_a_single_file_beside_an_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As transformers does, which looks for the single file first."""
    write_checkpoint(tmp_path)
    save_file({"one": torch.ones(2)}, tmp_path / SINGLE)
    assert set(HubCheckpoint(tmp_path)) == {"one"}
    assert caplog.messages == [f"{tmp_path} has {SINGLE} beside {INDEX}; as in transformers, {SINGLE} is read."]


@pytest.mark.parametrize(
    ("names", "layers", "experts", "expected"),
    [
        (
            {"model.layers.0.x": (2,), "model.layers.3.x": (2,)},
            5,
            1,
            "num_hidden_layers is 5, but the weights are of 4",
        ),
        (
            {"layers.1.mlp.experts.7.up_proj.weight": (2, 2)},
            2,
            10**6,
            "experts is 1,000,000, but the weights are of 8",
        ),
        ({"a.experts.gate_up_proj": (8, 2, 2)}, 2, 9, "the number of experts is 9, but the weights are of 8."),
    ],
)
def test_more_layers_or_experts_than_there_are(
    names: dict[str, tuple[int, ...]], layers: int, experts: int, expected: str
) -> None:
    with pytest.raises(NibbleError) as caught:
        check_counts(names, layers, experts, "config.json")
    assert expected in str(caught.value)


def test_counts_that_fit_or_are_not_known() -> None:
    check_counts({"model.layers.3.mlp.experts.7.x": (2,)}, 4, 8, "config.json")
    check_counts({"model.layers.9.mlp.experts.gate_up_proj": (8, 2, 2)}, 4, 8, "config.json")
    check_counts({"layers.0.experts.gate_up_proj.weight.packed": ()}, 1, 8, "config.json")
