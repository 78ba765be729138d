"""Converting and loading each architecture, in each form in which its files are found."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models import load_model
from models.checkpoint.content import verify
from models.checkpoint.conversion import Interrupted, convert
from models.checkpoint.hub import HubCheckpoint
from models.checkpoint.layout import Layout
from models.checkpoint.native import MANIFEST, Manifest
from models.checkpoint.stream import layout_of, sum_up
from models.convert import __main__ as command
from models.registry import architecture_for
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.helpers import assert_close, key_map_for, random_tokens
from tests.hub_forms import FORMS, fused, save_form, tensors_in

TOKENS = random_tokens((2, 24))  # longer than the windows and selections of the tiny models
STORAGES = [
    ("none", torch.float32),
    ("nf4", torch.bfloat16),
    ("fp4", torch.float32),
    ("int8", torch.bfloat16),
]
VISION_LANGUAGE = "vision-language"
LEFT_OUT = (
    "left out, as nothing here computes with them: model.visual.* (21 tensors, 136.38 KiB), mtp.* (8 tensors, 240 B)"
)


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Per form a folder, which is only read, and the model of transformers that it was saved from."""
    folders = {form: tmp_path_factory.mktemp("hub") / "inner" / "tiny" for form in FORMS}
    return {form: (folder, save_form(folder, form)) for form, folder in folders.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_logits_of_its_reference(hubs: dict[str, tuple[Path, Any]], form: str) -> None:
    hub, reference = hubs[form]
    with torch.no_grad():
        assert_close(load_model(hub, "none", torch.float32)(TOKENS), reference(TOKENS).logits)


@pytest.mark.parametrize(("storage", "dtype"), STORAGES)
@pytest.mark.parametrize("form", FORMS)
def test_converted_model_is_that_of_the_hub_bit_for_bit(
    hubs: dict[str, tuple[Path, Any]], tmp_path: Path, form: str, storage: Any, dtype: torch.dtype
) -> None:
    hub, _ = hubs[form]
    convert(hub, tmp_path / "native", StorageSpec(storage), dtype)
    verify(tmp_path / "native")
    streamed, converted = (load_model(folder, storage, dtype) for folder in (hub, tmp_path / "native"))
    assert torch.equal(converted(TOKENS), streamed(TOKENS))
    expected = dict(streamed.named_parameters()) | dict(streamed.named_buffers())
    for name, tensor in (dict(converted.named_parameters()) | dict(converted.named_buffers())).items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_forms_of_one_model_give_the_same_bytes(hubs: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    weights = []
    for number, form in enumerate(form for form in FORMS if VISION_LANGUAGE in form):
        convert(hubs[form][0], tmp_path / str(number), StorageSpec("nf4"))
        weights.append({file.name: file.read_bytes() for file in (tmp_path / str(number)).glob("*.safetensors")})
    assert len(weights) == 3
    assert len(weights[0]) == 5
    assert weights[0] == weights[1] == weights[2]


@pytest.mark.parametrize("in_file", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("form", "kept"),
    [
        ("afmoe", ("model.norm.weight", "model.layers.1.post_mlp_layernorm.weight", "model.layers.2.mlp.expert_bias")),
        (
            VISION_LANGUAGE,
            tuple(
                f"model.language_model.layers.1.{name}"
                for name in ("linear_attn.A_log", "linear_attn.dt_bias", "linear_attn.norm.weight", "mlp.gate.weight")
            ),
        ),
    ],
)
def test_what_stays_float32(tmp_path: Path, form: str, kept: tuple[str, ...], in_file: torch.dtype) -> None:
    save_form(tmp_path / "hub", form, in_file)
    convert(tmp_path / "hub", tmp_path / "native", StorageSpec("nf4"), torch.bfloat16)
    stored, native = tensors_in(tmp_path / "hub"), tensors_in(tmp_path / "native")
    for hub_name in kept:
        name = hub_name.replace("model.language_model.", "model.")
        name = name.replace("mlp.expert_bias", "mlp.gate.e_score_correction_bias")
        name = name.replace("gate.weight", "gate.weight.value")
        assert stored[hub_name].dtype == in_file
        assert native[name].dtype == torch.float32, name
        assert torch.equal(native[name], stored[hub_name].float()), name
    assert native["model.layers.3.self_attn.q_proj.weight.packed"].dtype == torch.uint8
    assert native["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_interrupted_conversion_of_fused_experts_goes_on(hubs: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    hub, _ = hubs[VISION_LANGUAGE]

    def stop(done: int, total: int, what: str) -> None:
        if what == "layer-00002.safetensors" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="interrupted: 3 of 5 files are finished and kept"):
        convert(hub, tmp_path / "stopped", StorageSpec("nf4"), progress=stop)
    assert convert(hub, tmp_path / "stopped", StorageSpec("nf4")).kept == 3
    convert(hub, tmp_path / "whole", StorageSpec("nf4"))
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("stopped", "whole")]
    assert contents[0] == contents[1]


# What is left out


def test_conversion_lists_what_it_leaves_out_and_keeps_note(
    hubs: dict[str, tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub, _ = hubs[VISION_LANGUAGE]
    for _ in range(2):  # also where all is done already
        assert command.main([str(hub), str(tmp_path / "native")]) == 0
        assert capsys.readouterr().out.splitlines()[1:] == [LEFT_OUT]
    carried = Manifest.load(tmp_path / "native").carried
    assert set(carried) == {name for name in tensors_in(hub) if name.startswith(("model.visual.", "mtp."))}
    assert command.main([str(hub), str(tmp_path / "json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["carried"] == len(carried) == 29


def test_loading_says_once_what_it_leaves_out(
    hubs: dict[str, tuple[Path, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nibble")
    hub, _ = hubs[VISION_LANGUAGE]
    load_model(hub, "nf4")
    assert caplog.messages == [f"{hub}: {LEFT_OUT}"]
    caplog.clear()
    load_model(hubs["qwen3_5_moe_text"][0], "nf4")
    assert caplog.messages == []


def test_summing_up_names_that_are_left_out() -> None:
    layers = [f"model.layers.{layer}.self_attn.indexer.{part}.weight" for layer in range(3, 6) for part in ("wk", "w")]
    assert sum_up([*layers, "lm_head.weight"]) == (
        "model.layers.3.self_attn.indexer.* (2 tensors), model.layers.4.self_attn.indexer.* (2 tensors), "
        "model.layers.5.self_attn.indexer.* (2 tensors), lm_head.weight (1 tensor)"
    )
    assert sum_up([f"model.layers.{layer}.x" for layer in range(8)]).endswith("model.layers.4.x (1 tensor) and 3 more")


# The forms


def test_layout_is_noted_in_the_manifest(hubs: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    expected = {
        "qwen3_5_moe_text": Layout(wrapped=False, fused=False),
        "vision-language": Layout(wrapped=True, fused=True),
        "text out of vision-language": Layout(wrapped=True, fused=False),
        "qwen3_moe": Layout(wrapped=False, fused=False),
        "qwen3_moe, fused": Layout(wrapped=False, fused=True),
    }
    for form, layout in expected.items():
        convert(hubs[form][0], tmp_path / form, StorageSpec("int8"))
        assert Manifest.load(tmp_path / form).layout == layout
    data = json.loads((tmp_path / "vision-language" / MANIFEST).read_text())
    del data["layout"]  # as earlier versions wrote it
    (tmp_path / "vision-language" / MANIFEST).write_text(json.dumps(data))
    assert Manifest.load(tmp_path / "vision-language").layout is None


def test_one_stack_in_parts_among_fused_ones(hubs: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    hub, _ = hubs["qwen3_5_moe_text"]
    parts = tensors_in(hub)
    mixed = fused(parts)
    for name in ("gate_up_proj", "down_proj"):
        del mixed[f"model.layers.2.mlp.experts.{name}"]
    mixed |= {key: value for key, value in parts.items() if key.startswith("model.layers.2.mlp.experts.")}
    (tmp_path / "mixed").mkdir()
    save_file(mixed, tmp_path / "mixed" / "model.safetensors")
    (tmp_path / "mixed" / "config.json").write_bytes((hub / "config.json").read_bytes())
    models = [load_model(folder, "none", torch.float32) for folder in (hub, tmp_path / "mixed")]
    assert torch.equal(models[0](TOKENS), models[1](TOKENS))


def test_vision_language_config_over_a_text_models_keys(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    save_form(hub, VISION_LANGUAGE)
    expected = load_model(hub, "none", torch.float32)(TOKENS)
    tensors = {name.replace("model.language_model.", "model."): value for name, value in tensors_in(hub).items()}
    save_file(tensors, hub / "model.safetensors")
    with pytest.raises(NibbleError) as caught:
        load_model(hub, "none", torch.float32)
    assert str(caught.value) == (
        f"{hub}: the keys are those of a text model (model.…); config.json says model_type qwen3_5_moe, whose keys are "
        "model.language_model.….\nMake what config.json has as text_config the whole of it, with its own model_type."
    )
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(config["text_config"]))
    assert torch.equal(load_model(hub, "none", torch.float32)(TOKENS), expected)

    # Where more than that is amiss, the keys are listed as for any checkpoint.
    (hub / "config.json").write_text(json.dumps(config))
    del tensors["model.norm.weight"]
    save_file(tensors, hub / "model.safetensors")
    with pytest.raises(
        NibbleError, match=r"the weights don't fit qwen3_5_moe .*\n159 missing: model\.language_model\."
    ):
        load_model(hub, "none", torch.float32)


# Beside the weights


def test_files_for_images_and_videos_come_along(hubs: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    save_form(hub, VISION_LANGUAGE)
    names = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "merges.txt")
    for name in names:
        (hub / name).write_text(f'{{"{name}": 1}}')
    convert(hub, tmp_path / "native", StorageSpec("nf4"))
    for name in names:
        assert (tmp_path / "native" / name).read_bytes() == (hub / name).read_bytes()
        assert name in Manifest.load(tmp_path / "native").files


def test_unknown_model_type_lists_the_supported_ones(tmp_path: Path) -> None:
    save_form(tmp_path / "hub", "afmoe")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(NibbleError) as caught:
        convert(tmp_path / "hub", tmp_path / "native", StorageSpec("nf4"))
    assert str(caught.value).endswith(
        "model_type 'llama' is not supported. Supported: afmoe, glm4_moe, glm4_moe_lite, glm_moe_dsa, qwen3_5_moe, "
        "qwen3_5_moe_text, qwen3_moe."
    )


def test_layout_counts_keys_of_the_key_map_alone(hubs: dict[str, tuple[Path, Any]]) -> None:
    """Matrices per expert in `mtp.*`, beside fused stacks, don't make the whole a layout of parts."""
    with HubCheckpoint(hubs[VISION_LANGUAGE][0]) as checkpoint:
        assert "mtp.layers.0.mlp.experts.1.up_proj.weight" in checkpoint
        architecture = architecture_for(checkpoint.config, "")
        key_map = key_map_for(architecture.build_model, architecture.parse_config(checkpoint.config, ""))
        assert layout_of(key_map, checkpoint) == Layout(wrapped=True, fused=True)
        assert layout_of(key_map, set(checkpoint) - {"model.language_model.layers.1.mlp.experts.down_proj"}) == Layout(
            wrapped=True, fused=False
        )
