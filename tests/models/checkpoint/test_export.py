"""Writing a dense model back as a hub checkpoint that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import load_model
from models.adapters.lora import add_lora
from models.adapters.targets import AdapterSpec
from models.checkpoint.conversion import convert
from models.checkpoint.export import export_hub
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.helpers import save_tiny_glm

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "direct-queries": {"q_lora_rank": None, "attention_bias": True},
}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("max_shard_bytes", [5e9, 200_000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_through_the_converted_format(tmp_path: Path, variant: str, max_shard_bytes: float) -> None:
    from transformers import AutoModelForCausalLM

    reference = save_tiny_glm(tmp_path / "hub", **VARIANTS[variant])
    (tmp_path / "hub" / "tokenizer.json").write_text("{}")
    convert(tmp_path / "hub", tmp_path / "native", StorageSpec("none"), torch.float32)
    model = load_model(tmp_path / "native", "none", torch.float32)
    out = export_hub(model, tmp_path / "out", tmp_path / "native", max_shard_bytes=max_shard_bytes)
    assert out == tmp_path / "out"
    assert_same(tensors_in(out), tensors_in(tmp_path / "hub"))
    assert (out / "config.json").read_bytes() == (tmp_path / "hub" / "config.json").read_bytes()
    assert (out / "tokenizer.json").read_text() == "{}"
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    if max_shard_bytes > 1e9:
        assert shards == ["model.safetensors"]
    else:
        assert len(shards) > 3
        assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        assert all((out / shard).stat().st_size < 1.2 * max_shard_bytes for shard in shards)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_in(out).values())
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert_same(loaded.state_dict(), reference.state_dict())


def test_dtype_of_the_export_is_in_its_config(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "hub")
    model = load_model(tmp_path / "hub", "none", torch.bfloat16)
    export_hub(model, tmp_path / "out", tmp_path / "hub")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hub", "out"))
    assert before["dtype"] == "float32"
    assert after == before | {"dtype": "bfloat16"}
    tensors = tensors_in(tmp_path / "out")
    assert tensors["model.layers.1.mlp.experts.2.up_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


@pytest.mark.parametrize(("first", "then"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_model_that_was_cast_is_exported_as_what_it_is_now(first: str, then: str, tmp_path: Path) -> None:
    reference = save_tiny_glm(tmp_path / "hub")
    model = load_model(tmp_path / "hub", "none", getattr(torch, first)).to(getattr(torch, then))
    assert model.dtype == getattr(torch, then)
    export_hub(model, tmp_path / "out", tmp_path / "hub")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == then
    # Both ways round through bfloat16; what stays in float32 (routers) does.
    tensors = tensors_in(tmp_path / "out")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    expected = reference.state_dict()["model.layers.1.mlp.experts.gate_up_proj"][2].chunk(2)[1]
    assert torch.equal(tensors[name], expected.bfloat16().to(getattr(torch, then)))
    wide = {key for key, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == (tensors.keys() if then == "float32" else {key for key in tensors if ".mlp.gate." in key})
    loaded = load_model(tmp_path / "out", "none", getattr(torch, then))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_float16_is_refused_as_configs_refuse_it(storage: str, tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "hub")
    said = r"^float16 needs loss scaling, which is not supported; use bfloat16 or float32\.$"
    with pytest.raises(NibbleError, match=said):
        load_model(tmp_path / "hub", storage, torch.float16)
    model = load_model(tmp_path / "hub", storage, torch.float32)
    for cast in (model.half, lambda: model.to(torch.float16), lambda: model.to("cpu", torch.half)):
        with pytest.raises(NibbleError, match=said):
            cast()
    assert model.dtype == torch.float32
    assert torch.float16 not in {tensor.dtype for tensor in model.state_dict().values()}
    assert model.bfloat16().dtype == torch.bfloat16


def test_prediction_layer_is_carried_through(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny_glm(tmp_path / "hub")
    extra = {"model.layers.3.eh_proj.weight": torch.randn(3, 5).half()}
    save_file(tensors_in(tmp_path / "hub") | extra, tmp_path / "hub" / "model.safetensors")
    model = load_model(tmp_path / "hub", "none", torch.float32)
    export_hub(model, tmp_path / "out", tmp_path / "hub")
    assert_same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "hub"))

    # A converted checkpoint leaves them where they are; they are fetched from there, or missed aloud.
    convert(tmp_path / "hub", tmp_path / "native", StorageSpec("none"), torch.float32)
    export_hub(model, tmp_path / "out2", tmp_path / "native")
    assert_same(tensors_in(tmp_path / "out2"), tensors_in(tmp_path / "hub"))
    assert caplog.messages == []
    (tmp_path / "hub" / "model.safetensors").unlink()
    export_hub(model, tmp_path / "out3", tmp_path / "native")
    assert tensors_in(tmp_path / "out2").keys() - tensors_in(tmp_path / "out3").keys() == extra.keys()
    assert caplog.messages == [
        "not exported, as the converted checkpoint doesn't hold them and what it was made from, "
        f"{tmp_path}/hub, is no longer there or has changed: model.layers.3.eh_proj.weight (1 tensor)"
    ]


def test_source_without_weights_will_do(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "hub")
    model = load_model(tmp_path / "hub", "none", torch.float32)
    expected = tensors_in(tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").unlink()
    export_hub(model, tmp_path / "out", tmp_path / "hub")
    assert_same(tensors_in(tmp_path / "out"), expected)


def test_quantised_model_is_refused(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "hub")
    model = load_model(tmp_path / "hub", "nf4")
    with pytest.raises(
        NibbleError, match=r"format is dense, and this model's storage is nf4\.\nLoad it with storage none"
    ):
        export_hub(model, tmp_path / "out", tmp_path / "hub")
    assert not (tmp_path / "out").exists()


def test_model_with_an_adapter_is_refused(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "hub")
    model = load_model(tmp_path / "hub", "none", torch.float32)
    add_lora(model, AdapterSpec(("experts",), rank=2, alpha=4.0))
    with pytest.raises(NibbleError, match=r"has an adapter, and an export writes the base weights alone\.\nSave the"):
        export_hub(model, tmp_path / "out", tmp_path / "hub")
    assert not (tmp_path / "out").exists()


def test_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "hub")
    model = load_model(tmp_path / "hub", "none", torch.float32)
    export_hub(model, tmp_path / "out", tmp_path / "hub")
    with pytest.raises(NibbleError, match=r"out exists already\. Name a folder that doesn't"):
        export_hub(model, tmp_path / "out", tmp_path / "hub")
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    export_hub(model, tmp_path / "out", tmp_path / "hub", overwrite=True)
    assert torch.equal(tensors_in(tmp_path / "out")["model.norm.weight"], torch.full((64,), 7.0))
    (tmp_path / "mine").mkdir()
    with pytest.raises(NibbleError, match=r"mine exists already"):
        export_hub(model, tmp_path / "mine", tmp_path / "hub", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "mine", "out"]


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_glm(tmp_path / "hub")
    model = load_model(tmp_path / "hub", "none", torch.float32)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(NibbleError, match=r"the disk is full: .*model\.safetensors\.partial can't be written"):
        export_hub(model, tmp_path / "out", tmp_path / "hub")
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_prediction_layers_that_config_json_switches_off(tmp_path: Path) -> None:
    """num_nextn_predict_layers 0, and the layer in the files all the same: carried, by what only such a layer has."""
    save_tiny_glm(tmp_path / "hub", num_nextn_predict_layers=0)
    tensors = tensors_in(tmp_path / "hub")
    extra = {"model.layers.3.eh_proj.weight": torch.randn(3, 5), "model.layers.3.mlp.gate.weight": torch.randn(3, 5)}
    save_file(tensors | extra, tmp_path / "hub" / "model.safetensors")
    model = load_model(tmp_path / "hub", "none", torch.float32)
    export_hub(model, tmp_path / "out", tmp_path / "hub")
    assert_same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "hub"))
    extra.pop("model.layers.3.eh_proj.weight")
    save_file(tensors | extra, tmp_path / "hub" / "model.safetensors")
    with pytest.raises(NibbleError, match=r"1 not used: model\.layers\.3\.mlp\.gate\.weight"):
        load_model(tmp_path / "hub", "none", torch.float32)


def test_an_export_says_nothing_of_quantisation(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    config = json.loads(path.read_text())
    said = {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps({**config, **said, "text_config": {**config, **said}}))
    model = load_model(tmp_path / "hub", "none", torch.float32)
    written = json.loads(export_hub(model, tmp_path / "out", tmp_path / "hub").joinpath("config.json").read_text())
    assert "quantization_config" not in written and "quantization_config" not in written["text_config"]
    assert written == {**config, "text_config": config}


def test_named_templates_are_carried(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "hub")
    template = Path("additional_chat_templates") / "tool_use.jinja"
    (tmp_path / "hub" / template).parent.mkdir()
    (tmp_path / "hub" / template).write_text("{{ messages }}")
    convert(tmp_path / "hub", tmp_path / "native", StorageSpec("none"), torch.float32)
    model = load_model(tmp_path / "native", "none", torch.float32)
    export_hub(model, tmp_path / "out", tmp_path / "native")
    for folder in ("native", "out"):
        assert (tmp_path / folder / template).read_text() == "{{ messages }}"
    convert(tmp_path / "hub", tmp_path / "native", StorageSpec("none"), torch.float32, force=True)
    assert (tmp_path / "native" / template).read_text() == "{{ messages }}"


def test_an_export_keeps_what_it_did_not_write(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "hub")
    model = load_model(tmp_path / "hub", "none", torch.float32)
    export_hub(model, tmp_path / "out", tmp_path / "hub", max_shard_bytes=100_000)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "model-q4.gguf").write_text("mine too")
    export_hub(model, tmp_path / "out", tmp_path / "hub", overwrite=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt", "model-q4.gguf"}
    assert_same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "hub"))
