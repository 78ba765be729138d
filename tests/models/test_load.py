"""Loading: from a hub folder, from a converted one, and what is checked on the way."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import load_model
from models.checkpoint.conversion import convert
from models.checkpoint.fingerprint import sampled_fingerprint
from models.checkpoint.hub import HubCheckpoint
from models.checkpoint.keymap import key_map_of
from models.checkpoint.native import NativeCheckpoint
from models.checkpoint.stream import HubReader, Piece, Reader
from models.load import ModelFolder, allocate, fill, open_folder
from models.registry import architecture_for
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.helpers import random_tokens, save_tiny_glm

STORAGES = [("none", False), ("nf4", True), ("nf4", False), ("fp4", True), ("int8", False)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint that transformers saved. Read only, with nothing beside it."""
    folder = tmp_path_factory.mktemp("hub") / "inner" / "tiny"
    save_tiny_glm(folder)
    return folder


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same_tensors(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    left, right = tensors_of(actual), tensors_of(expected)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("storage", "double_quant"), STORAGES)
def test_hub_folder_and_converted_folder_give_the_same_model(
    hub: Path, tmp_path: Path, storage: Any, double_quant: bool, dtype: torch.dtype
) -> None:
    convert(hub, tmp_path / "x", StorageSpec(storage, double_quant), dtype)
    streamed = load_model(hub, storage, dtype, double_quant=double_quant)
    converted = load_model(tmp_path / "x", storage, dtype, double_quant=double_quant)
    assert_same_tensors(converted, streamed)
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    assert not converted.training
    assert converted.spec == StorageSpec(storage, double_quant)
    assert converted.dtype == dtype
    logits = streamed(random_tokens((2, 5)))
    assert logits.shape == (2, 5, 128)
    assert logits.dtype == dtype
    assert torch.equal(converted(random_tokens((2, 5))), logits)


def test_routers_stay_float32_and_names_are_the_hubs(hub: Path) -> None:
    model = load_model(hub, "nf4")
    tensors = tensors_of(model)
    assert tensors["model.layers.1.mlp.gate.weight.value"].dtype == torch.float32
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert tensors["model.layers.1.mlp.experts.gate_up_proj.weight.packed"].shape == (8, 128, 32)
    stored = load_file(hub / "model.safetensors")
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    assert torch.equal(tensors[bias], stored[bias])


def test_tied_head_stays_one_parameter(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "tied", tie_word_embeddings=True)
    convert(tmp_path / "tied", tmp_path / "other" / "x", StorageSpec("none"), torch.float32)
    for folder in (tmp_path / "tied", tmp_path / "other" / "x"):
        model = load_model(folder, "none", torch.float32)
        assert model.lm_head.weight.value is model.model.embed_tokens.weight
        assert torch.equal(
            model.lm_head.weight.value, load_file(tmp_path / "tied/model.safetensors")["model.embed_tokens.weight"]
        )


def test_stored_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | head, tmp_path / "tied" / "model.safetensors")
    model = load_model(tmp_path / "tied", "none", torch.float32)
    assert model.lm_head.weight.value is model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])
    summary = convert(tmp_path / "tied", tmp_path / "x", StorageSpec("none"), torch.float32)
    assert summary.carried == ("lm_head.weight",)


@pytest.mark.parametrize("rows", [128, 127])
def test_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path, rows: int) -> None:
    save_tiny_glm(tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    head = tensors["model.embed_tokens.weight"][:rows].clone()
    head[5, 3] += 1e-3
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "tied" / "model.safetensors")
    refused = (
        r"\(tie_word_embeddings: true\), but lm_head\.weight differs from model\.embed_tokens\.weight\.\nSet tie_wo"
    )
    with pytest.raises(NibbleError, match=refused):
        load_model(tmp_path / "tied", "none", torch.float32)
    with pytest.raises(NibbleError, match=refused):
        convert(tmp_path / "tied", tmp_path / "x", StorageSpec("none"), torch.float32)


def test_converted_copy_beside_the_hub_folder_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "nibble")
    hub = tmp_path / "tiny"
    save_tiny_glm(hub)
    plain = load_model(hub, "int8")
    convert(hub, tmp_path / "tiny-nibble-int8", StorageSpec("int8"))
    assert caplog.messages == []
    with monkeypatch.context() as patch:
        patch.setattr(HubReader, "read", None)  # nothing is read from the hub folder
        copied = load_model(hub, "int8")
    assert caplog.messages == [f"{hub}: using the converted copy {tmp_path}/tiny-nibble-int8"]
    assert_same_tensors(copied, plain)
    caplog.clear()

    # Neither another storage, nor another dtype, nor another model of the same shapes takes it.
    load_model(hub, "int8", torch.float32)
    load_model(hub, "nf4")
    tensors = load_file(hub / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 7] += 0.5
    save_file(tensors, hub / "model.safetensors")
    tuned = load_model(hub, "int8")
    assert caplog.messages == []
    name = "model.layers.0.self_attn.o_proj.weight.packed"
    assert not torch.equal(tensors_of(tuned)[name], tensors_of(plain)[name])


def test_a_change_anywhere_in_the_hub_folder_is_seen_by_all_that_know_it_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last value of the embedding: a copy made before is not taken, nor does a conversion or an export go on it."""
    caplog.set_level(logging.INFO, "nibble")
    hub, copy = tmp_path / "hub", tmp_path / "copy"
    save_tiny_glm(hub, vocab_size=80_000)  # of 20 MB, so that samples of it leave out the end
    convert(hub, copy, StorageSpec("int8"), torch.float32)
    before = load_file(hub / "model.safetensors")
    changed = {name: tensor.clone() for name, tensor in before.items()}
    changed["model.embed_tokens.weight"][-1, -1] += 1
    save_file(changed, hub / "model.safetensors")
    loaded = load_model(hub, "int8", torch.float32)
    assert torch.equal(loaded.model.embed_tokens.weight, changed["model.embed_tokens.weight"])
    assert caplog.messages == []
    with pytest.raises(NibbleError, match=r"content of the source \(fingerprint\) \w{12} there, \w{12} now"):
        convert(hub, copy, StorageSpec("int8"), torch.float32)

    # What the version before recorded was made of samples: the copy is taken as it was then, with a warning.
    manifest = json.loads((copy / "nibble.json").read_text())
    checkpoint = HubCheckpoint(hub)
    manifest["source"]["fingerprint"] = sampled_fingerprint(hub, checkpoint.config_bytes, checkpoint.places)
    (copy / "nibble.json").write_text(json.dumps(manifest))
    loaded = load_model(hub, "int8", torch.float32)
    assert torch.equal(loaded.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert [message.split(". ")[-1] for message in caplog.messages] == [
        f"To be sure, convert {copy} again with --force.",
        f"{hub}: using the converted copy {copy}",
    ]
    convert(hub, copy, StorageSpec("int8"), torch.float32)
    assert caplog.messages[-1].endswith("a small change goes unseen. To be sure, add --force.")
    convert(hub, copy, StorageSpec("int8"), torch.float32, force=True)
    caplog.clear()
    loaded = load_model(hub, "int8", torch.float32)
    assert torch.equal(loaded.model.embed_tokens.weight, changed["model.embed_tokens.weight"])
    assert caplog.messages == [f"{hub}: using the converted copy {copy}"]


def test_damaged_or_unfinished_copy_beside_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nibble")
    hub, copy = tmp_path / "tiny", tmp_path / "copy"
    save_tiny_glm(hub)
    convert(hub, copy, StorageSpec("int8"))
    (copy / "rest.safetensors").write_bytes(b"")
    load_model(hub, "int8")
    assert f"{copy} is a converted copy but not used: rest.safetensors has 0 bytes" in caplog.messages[0]
    manifest = json.loads((copy / "nibble.json").read_text())
    (copy / "nibble.json").write_text(json.dumps(manifest | {"complete": False}))
    caplog.clear()
    load_model(hub, "int8")
    assert caplog.messages == []
    (copy / "nibble.json").write_text("{")
    load_model(hub, "int8")
    assert "nibble.json is not valid JSON: " in caplog.messages[0]


def test_converted_folder_with_another_storage_names_both(hub: Path, tmp_path: Path) -> None:
    target = tmp_path / "x"
    convert(hub, target, StorageSpec("int8"))
    with pytest.raises(NibbleError) as caught:
        load_model(target, "nf4", torch.float32)
    assert str(caught.value) == (
        f"{target} is converted to int8, bfloat16; asked for is nf4 with double quantisation, float32.\n"
        "Ask for what is there, or convert again: "
        f"python -m models.convert {hub} {target}-nf4 --storage nf4 --dtype float32"
    )
    convert(hub, tmp_path / "single", StorageSpec("nf4", False))
    with pytest.raises(NibbleError, match=r"single is converted to nf4, bfloat16; asked for is nf4 with double quant"):
        load_model(tmp_path / "single", "nf4")


def test_wrong_names(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(NibbleError, match=r"unknown storage 'nf8': choose one of none, nf4, fp4, int8"):
        load_model(hub, "nf8")
    with pytest.raises(NibbleError, match=r"/nowhere/x doesn't exist\. Wanted: a checkpoint folder, or a hub id"):
        load_model("/nowhere/x")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(NibbleError, match=r"model_type 'gpt2' is not supported"):
        load_model(tmp_path)


def test_missing_key_and_converted_tensors_of_another_shape(hub: Path, tmp_path: Path) -> None:
    tensors = load_file(hub / "model.safetensors")
    del tensors["model.norm.weight"]
    (tmp_path / "less").mkdir()
    save_file(tensors, tmp_path / "less" / "model.safetensors")
    (tmp_path / "less" / "config.json").write_bytes((hub / "config.json").read_bytes())
    with pytest.raises(NibbleError, match=r"1 missing: model\.norm\.weight\."):
        load_model(tmp_path / "less")

    target = tmp_path / "x"
    convert(hub, target, StorageSpec("none"))
    for name in ("config.json", "nibble.json"):
        values = json.loads((target / name).read_text())
        (values if name == "config.json" else values["config"])["vocab_size"] = 64
        (target / name).write_text(json.dumps(values))
    with pytest.raises(NibbleError) as caught:
        load_model(target, "none")
    assert "2 tensors missing, unknown or of other shapes: lm_head.weight.value, model." in str(caught.value)
    assert "Delete the folder and convert again: python -m models.convert" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": 5e5}, "'rope_theta' is 500000.0; the folder was converted with absent (nibble.json).\n"),
        ({"rms_norm_eps": 1e-3}, "'rms_norm_eps' is 0.001; the folder was converted with 1e-05 (nibble.json).\n"),
        ({"vocab_size": ...}, "'vocab_size' is absent; the folder was converted with "),
        ({"model_type": "glm4_moe"}, "'model_type' is 'glm4_moe'; the folder was converted with 'glm4_moe_lite' ("),
    ],
)
def test_a_converted_folder_with_another_config(hub: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    convert(hub, tmp_path / "x", StorageSpec("none"))
    config = {**json.loads((tmp_path / "x" / "config.json").read_text()), **change}
    (tmp_path / "x" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    with pytest.raises(NibbleError) as caught:
        load_model(tmp_path / "x", "none")
    assert f"config.json: {said}" in str(caught.value)
    assert f"\nRestore the file from {hub}, or change it there and convert that again" in str(caught.value)


def test_nothing_stays_unfilled(hub: Path) -> None:
    class Forgetful:
        """Leaves out one norm, and one expert of one stack."""

        def __init__(self, reader: Reader) -> None:
            self.reader, self.keys = reader, reader.keys

        def read(self, key: Any, experts: range | None = None) -> Any:
            if key.native == "model.norm.weight":
                return
            for piece in self.reader.read(key, experts):
                if (key.native, piece.start) != ("model.layers.1.mlp.experts.down_proj.weight", 5):
                    yield piece

    model, reader = empty(hub, StorageSpec("nf4"))
    allocate(model, "cpu")
    with pytest.raises(NibbleError) as caught:
        fill(tensors_of(model), Forgetful(reader))
    assert "5 tensors of the model not filled from the checkpoint: " in str(caught.value)
    assert "model.layers.1.mlp.experts.down_proj.weight.absmax, " in str(caught.value)
    assert "model.norm.weight" in str(caught.value)


def empty(hub: Path, spec: StorageSpec) -> tuple[Any, HubReader]:
    """A model on the meta device, and a reader for it."""
    checkpoint = HubCheckpoint(hub)
    architecture = architecture_for(checkpoint.config, "config.json")
    config = architecture.parse_config(checkpoint.config, "config.json")
    model = architecture.build(config, spec, torch.float32, "meta")
    return model, HubReader(checkpoint, key_map_of(model))


def test_allocate_leaves_nothing_on_the_meta_device(hub: Path) -> None:
    model, _ = empty(hub, StorageSpec("nf4"))
    assert {tensor.device.type for tensor in tensors_of(model).values()} == {"meta"}
    allocate(model, "cpu")
    assert {tensor.device.type for tensor in tensors_of(model).values()} == {"cpu"}


@pytest.mark.parametrize("storage", ["nf4", "int8", "none"])
def test_a_range_of_experts_can_be_read_alone(hub: Path, tmp_path: Path, storage: Any) -> None:
    spec = StorageSpec(storage)
    convert(hub, tmp_path / "x", spec, torch.float32)
    whole = tensors_of(load_model(hub, storage, torch.float32))
    _, reader = empty(hub, spec)
    native = NativeCheckpoint(tmp_path / "x").bind(reader.keys)
    key = next(key for key in reader.keys if key.native == "model.layers.2.mlp.experts.gate_up_proj.weight")
    for source in (reader, native):
        pieces: list[Piece] = list(source.read(key, range(3, 6)))
        assert [piece.start for piece in pieces] == ([3, 4, 5] if source is reader else [3])
        for name in pieces[0].tensors:
            assert torch.equal(torch.cat([piece.tensors[name] for piece in pieces]), whole[name][3:6])


def test_folder_of_either_kind_without_its_weights(hub: Path, tmp_path: Path) -> None:
    convert(hub, tmp_path / "x", StorageSpec("none"))
    found = open_folder(hub)
    assert found == ModelFolder(hub, str(hub), json.loads((hub / "config.json").read_text()), None)
    converted = open_folder(str(tmp_path / "x"))
    assert (converted.path, converted.name, converted.config) == (tmp_path / "x", str(hub), found.config)
    assert converted.manifest is not None
    assert converted.manifest.spec == StorageSpec("none")
    cached = tmp_path / "models--zai-org--GLM-4.7-Flash" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    assert open_folder(cached).name == "zai-org/GLM-4.7-Flash"


def test_adapter_is_put_on_top(hub: Path, tmp_path: Path) -> None:
    from models.adapters.files import save_adapter
    from models.adapters.lora import add_lora
    from models.adapters.targets import AdapterSpec

    model = load_model(hub, "nf4", torch.float32)
    tokens = random_tokens((1, 6))
    base = model(tokens)
    add_lora(model, AdapterSpec(("attention", "experts"), rank=4, alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora.B"):
                parameter.normal_(std=0.1)
    save_adapter(model, tmp_path / "adapter", str(hub))
    loaded = load_model(hub, "nf4", torch.float32, adapter=tmp_path / "adapter")
    assert all(parameter.requires_grad == ("lora" in name) for name, parameter in loaded.named_parameters())
    assert torch.equal(loaded(tokens), model(tokens))
    assert not torch.equal(loaded(tokens), base)
