"""Exporting each architecture: a round trip changes nothing, and transformers loads what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import load_model
from models.checkpoint.conversion import convert
from models.checkpoint.export import export_hub
from models.checkpoint.native import MANIFEST
from quant.storage import StorageSpec
from tests.helpers import assert_close, random_tokens
from tests.hub_forms import FORMS, save_form, tensors_in

TOKENS = random_tokens((2, 24))
VISION_LANGUAGE = "vision-language"


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def carried(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("model.visual.", "mtp."))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_round_trip_changes_nothing(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    """Neither keys nor shapes, dtypes and bits, from the hub folder and by way of a converted one."""
    hub, native = tmp_path / "hub", tmp_path / "native"
    save_form(hub, form, dtype)
    (hub / "preprocessor_config.json").write_text("{}")
    convert(hub, native, StorageSpec("none"), dtype)
    for source in (hub, native):
        out = export_hub(load_model(source, "none", dtype), tmp_path / f"from-{source.name}", source)
        assert_same(tensors_in(out), tensors_in(hub))
        assert (out / "config.json").read_bytes() == (hub / "config.json").read_bytes()
        assert (out / "preprocessor_config.json").read_text() == "{}"


def trained(model: Any) -> Any:
    """After a step of gradient descent on every parameter that has a gradient."""
    model.requires_grad_(True)
    logits = model(TOKENS)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.02 * parameter.grad.sign()
    return model.requires_grad_(False)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_trained_is_loaded_by_transformers(tmp_path: Path, form: str) -> None:
    from transformers import AutoModelForCausalLM, Qwen3_5MoeForConditionalGeneration

    reference = save_form(tmp_path / "hub", form)
    model = trained(load_model(tmp_path / "hub", "none", torch.float32))
    out = export_hub(model, tmp_path / "out", tmp_path / "hub")
    before, after = tensors_in(tmp_path / "hub"), tensors_in(out)
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in before.items()}
    assert_same(carried(after), carried(before))
    classes = [AutoModelForCausalLM] + [Qwen3_5MoeForConditionalGeneration] * form.startswith(VISION_LANGUAGE)
    for class_ in classes:
        loaded, info = class_.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] | info["mismatched_keys"], info
        assert all(name.startswith("model.layers.4.") for name in info["unexpected_keys"]), info
        with torch.no_grad():
            logits = loaded(TOKENS).logits
            assert_close(model(TOKENS), logits)
            assert not torch.allclose(logits, reference(TOKENS).logits, rtol=1e-2)
    if form.startswith(VISION_LANGUAGE):
        vision = {name: tensor for name, tensor in loaded.state_dict().items() if name.startswith("model.visual.")}
        assert_same(vision, {name: tensor for name, tensor in before.items() if name.startswith("model.visual.")})


# Dtypes


def test_what_was_trained_in_float32_is_not_rounded_to_the_sources_dtype(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    save_form(hub, "afmoe", torch.bfloat16)
    model = load_model(hub, "none", torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-5
        model.model.layers[1].mlp.gate.e_score_correction_bias[0] += 1e-5
    before, after = tensors_in(hub), tensors_in(export_hub(model, tmp_path / "out", hub))
    changed = {"model.norm.weight", "model.layers.1.mlp.expert_bias"}
    assert {name for name in after if after[name].dtype != before[name].dtype} == changed
    assert after["model.norm.weight"].dtype == torch.float32
    assert torch.equal(after["model.norm.weight"], model.model.norm.weight)


def test_a_float32_model_is_exported_in_float32_alone(tmp_path: Path) -> None:
    save_form(tmp_path / "hub", "afmoe", torch.bfloat16)
    model = load_model(tmp_path / "hub", "none", torch.float32)
    tensors = tensors_in(export_hub(model, tmp_path / "out", tmp_path / "hub"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("outer", [True, False])
def test_dtype_is_set_in_each_section_that_has_one(tmp_path: Path, outer: bool) -> None:
    hub = tmp_path / "hub"
    save_form(hub, VISION_LANGUAGE)
    config = json.loads((hub / "config.json").read_text())
    config["text_config"]["dtype"] = "float32"
    if not outer:
        del config["dtype"]
    (hub / "config.json").write_text(json.dumps(config))
    out = export_hub(load_model(hub, "none", torch.bfloat16), tmp_path / "out", hub)
    config["text_config"]["dtype"] = "bfloat16"
    if outer:
        config["dtype"] = "bfloat16"
    assert json.loads((out / "config.json").read_text()) == config
    assert_same(carried(tensors_in(out)), carried(tensors_in(hub)))  # in the dtypes they have


# Where the source is gone


def test_layout_outlives_the_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub, native = tmp_path / "hub", tmp_path / "native"
    for form in (VISION_LANGUAGE, "text out of vision-language", "qwen3_5_moe_text"):
        save_form(hub, form)
        convert(hub, native, StorageSpec("none"), torch.float32)
        expected = tensors_in(hub)
        shutil.rmtree(hub)
        out = export_hub(load_model(native, "none", torch.float32), tmp_path / form, native)
        assert_same(tensors_in(out), {name: expected[name] for name in expected.keys() - carried(expected).keys()})
        if form == VISION_LANGUAGE:
            assert caplog.messages == [
                "not exported, as the converted checkpoint doesn't hold them and what it was made from, "
                f"{hub}, is no longer there or has changed: model.visual.* (21 tensors), mtp.* (8 tensors)"
            ]
            data = json.loads((native / MANIFEST).read_text())
            (native / MANIFEST).write_text(json.dumps(data | {"layout": None}))
            # Not known, so as the hub has models of this type.
            again = export_hub(load_model(native, "none", torch.float32), tmp_path / "again", native)
            assert tensors_in(again).keys() == tensors_in(out).keys()
        else:
            assert caplog.messages == []
        caplog.clear()
        shutil.rmtree(native)


def test_source_that_has_changed_is_not_mixed_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub, native = tmp_path / "hub", tmp_path / "native"
    save_form(hub, VISION_LANGUAGE)
    convert(hub, native, StorageSpec("none"), torch.float32)
    (hub / "config.json").write_text((hub / "config.json").read_text() + " ")
    out = export_hub(load_model(native, "none", torch.float32), tmp_path / "out", native)
    assert not carried(tensors_in(out))
    assert f"{hub}, is no longer there or has changed: model.visual.* (21 tensors)" in caplog.text


def test_source_in_the_hubs_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model converted from a hub id: its vision tower is taken from the cache, without asking the hub."""
    cached = tmp_path / "cache" / "models--Qwen--Tiny" / "snapshots" / "abc"
    save_form(cached, VISION_LANGUAGE)
    (cached.parents[1] / "refs").mkdir()
    (cached.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    convert(cached, tmp_path / "native", StorageSpec("none"), torch.float32)
    manifest = json.loads((tmp_path / "native" / MANIFEST).read_text())
    manifest["source"]["name"] = "Qwen/Tiny"  # as if the hub id had been given
    (tmp_path / "native" / MANIFEST).write_text(json.dumps(manifest))
    out = export_hub(load_model(tmp_path / "native", "none", torch.float32), tmp_path / "out", tmp_path / "native")
    assert_same(tensors_in(out), tensors_in(cached))
