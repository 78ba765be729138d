"""Checkpoints of the hub that can't be read as config.json describes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint.conversion import convert
from models.checkpoint.native import Manifest
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.convert_helpers import NF4, hub_tensors, write_hub
from tests.helpers import save_tiny_glm


def broken(hub: Path, tmp_path: Path, change: Any, **config: Any) -> str:
    tensors = hub_tensors(hub)
    change(tensors)
    source = write_hub(tmp_path / "broken", tensors, hub, **config)
    with pytest.raises(NibbleError) as caught:
        convert(source, tmp_path / "out", NF4)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def test_missing_and_unused_keys_are_listed_together(hub: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        for layer in (1, 2):
            for expert in range(8):
                for part in ("gate", "up", "down"):
                    del tensors[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            del tensors[f"model.layers.2.{norm}.weight"]
        tensors["model.extra.weight"] = torch.ones(3)
        tensors["model.layers.4.surplus"] = torch.ones(3)

    text = broken(hub, tmp_path, change)
    assert "the weights don't fit glm4_moe_lite as config.json describes it" in text
    assert "51 missing: model.layers.1.mlp.experts.0.down_proj.weight, " in text
    assert text.count("_proj.weight") == 48
    assert " and 1 more.\n" in text
    assert "2 not used: model.extra.weight, model.layers.4.surplus." in text
    assert not (tmp_path / "out").exists()


def test_shape_that_differs_is_named_with_both(hub: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(65)
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.ones(64, 128)

    text = broken(hub, tmp_path, change)
    assert "shapes differ from what config.json says (2 tensors)" in text
    assert "model.norm.weight is [65], should be [64]" in text
    assert "model.layers.1.mlp.experts.3.up_proj.weight is [64, 128], should be [64, 64]" in text


def test_checkpoint_that_is_quantised_already(hub: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.self_attn.o_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    text = broken(hub, tmp_path, change)
    assert "is quantised already: model.layers.1.self_attn.o_proj.weight (F8_E4M3)" in text
    assert "Take the checkpoint in bfloat16, float16 or float32" in text


def test_checkpoint_whose_keys_are_those_of_a_quantiser(hub: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight_scale_inv"] = torch.ones(1, 1)

    text = broken(hub, tmp_path, change, quantization_config={"quant_method": "fp8"})
    assert (
        "broken is quantised already: config.json has a quantization_config.\nTake the checkpoint in bfloat16" in text
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("key", "named"),
    [
        (
            "model.layers.2.mlp.experts.6.up_proj.weight",
            r"model\.layers\.2\.mlp\.experts\.gate_up_proj, expert 6: 1 of its 8192 values are",
        ),
        (
            "model.layers.0.self_attn.o_proj.weight",
            r"model\.layers\.0\.self_attn\.o_proj\.weight: 1 of its 8192 values are",
        ),
        ("model.embed_tokens.weight", r"model\.embed_tokens\.weight: some of its values are"),
    ],
)
def test_values_that_are_not_finite(hub: Path, tmp_path: Path, key: str, named: str, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][-1, -1] = value

    text = broken(hub, tmp_path, change)
    assert re.search(f"broken: {named} inf or NaN", text)
    assert not Manifest.load(tmp_path / "out").complete
    assert not list((tmp_path / "out").glob("*.partial"))


def test_shape_that_does_not_divide_into_blocks(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path / "odd", q_lora_rank=48)
    with pytest.raises(NibbleError, match=r"model\.layers\.0\.self_attn\.q_b_proj\.weight"):
        convert(tmp_path / "odd", tmp_path / "out", NF4)
    convert(tmp_path / "odd", tmp_path / "out", StorageSpec("int8", False))


def test_unknown_architecture(hub: Path, tmp_path: Path) -> None:
    text = broken(hub, tmp_path, lambda tensors: None, model_type="llama")
    assert "config.json: model_type 'llama' is not supported. Supported: " in text
