"""Adapter files: what is written, that loading gives it back, and every error of a wrong one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.adapters import patterns
from models.adapters.files import adapter_spec, load_adapter, save_adapter
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec
from models.decoder import CausalLM
from models.registry import ARCHITECTURES
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.helpers import TINY_GLM

PREFIX = "base_model.model.model.layers"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SPEC = AdapterSpec(("attention", "experts"), {"attention": 3, "experts": 2}, {"attention": 6.0, "experts": 8.0})


def model(**changes: Any) -> CausalLM:
    architecture = ARCHITECTURES["glm4_moe_lite"]
    config = architecture.parse_config({**TINY_GLM, "moe_intermediate_size": 192, **changes}, "tiny")
    return architecture.build(config, StorageSpec("none"), torch.float32, "cpu")


def adapted(spec: AdapterSpec = SPEC) -> CausalLM:
    made = model()
    add_lora(made, spec)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in trainable_parameters(made):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    save_adapter(adapted(), path, "org/base")
    return path


def changed(
    saved: Path,
    tmp_path: Path,
    config: Callable[[dict[str, Any]], Any] = lambda config: None,
    tensors: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
) -> Path:
    """A copy of an adapter with its config and its tensors changed."""
    path = tmp_path / "changed"
    shutil.copytree(saved, path)
    text = json.loads((path / CONFIG).read_text())
    config(text)
    (path / CONFIG).write_text(json.dumps(text))
    values = load_file(path / WEIGHTS)
    tensors(values)
    save_file(values, path / WEIGHTS)
    return path


def message(path: Path, into: CausalLM | None = None, **options: Any) -> str:
    into = into if into is not None else model()
    with pytest.raises(NibbleError) as error:
        load_adapter(into, path, **options)
    assert not any("lora" in name for name, _ in into.named_parameters()), "the model is as it was"
    return str(error.value)


# --- what is written


def test_layout_of_the_file(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    assert {name: list(value.shape) for name, value in tensors.items() if ".layers.1.mlp" in name} == {
        f"{PREFIX}.1.mlp.experts.base_layer.lora_A.weight": [8 * 2, 64],
        f"{PREFIX}.1.mlp.experts.base_layer.lora_B.weight": [384, 2 * 8],
        f"{PREFIX}.1.mlp.experts.lora_A.weight": [8 * 2, 192],
        f"{PREFIX}.1.mlp.experts.lora_B.weight": [64, 2 * 8],
    }
    assert tensors[f"{PREFIX}.0.self_attn.q_a_proj.lora_A.weight"].shape == (3, 64)
    assert tensors[f"{PREFIX}.0.self_attn.q_a_proj.lora_B.weight"].shape == (64, 3)
    assert len(tensors) == 2 * (3 * 5 + 2 * 2)
    lora = adapted().get_submodule("model.layers.1.mlp.experts.down_proj.lora")
    assert isinstance(lora.A, Tensor)
    assert isinstance(lora.B, Tensor)
    a, b = (tensors[f"{PREFIX}.1.mlp.experts.lora_{letter}.weight"] for letter in "AB")
    for expert in range(8):
        assert torch.equal(a[expert * 2 : (expert + 1) * 2], lora.A[expert])
        assert torch.equal(b[:, expert::8], lora.B[expert])


def test_a_single_stack_is_not_nested(tmp_path: Path) -> None:
    for stack in ("gate_up_proj", "down_proj"):
        save_adapter(adapted(AdapterSpec((f"experts.{stack}",), 2, 4.0)), tmp_path / stack, "org/base")
        names = load_file(tmp_path / stack / WEIGHTS).keys()
        assert set(names) == {f"{PREFIX}.{n}.mlp.experts.lora_{x}.weight" for n in (1, 2) for x in "AB"}


def test_saving_is_exact_and_repeatable(saved: Path, tmp_path: Path) -> None:
    loaded = model()
    assert load_adapter(loaded, saved) == adapter_spec(adapted())
    assert all(parameter.requires_grad == ("lora" in name) for name, parameter in loaded.named_parameters())
    for (name, ours), (_, theirs) in zip(trainable_parameters(loaded), trainable_parameters(adapted()), strict=True):
        assert torch.equal(ours, theirs), name
    save_adapter(loaded, tmp_path / "new" / "folder", "org/base")
    save_adapter(loaded, saved, "org/base")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "new" / "folder" / name).read_bytes() == (saved / name).read_bytes()
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS], "nothing else is left behind"


def test_spec_of_a_loaded_adapter(saved: Path) -> None:
    assert load_adapter(model(), saved) == AdapterSpec(
        (
            *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
            *("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        ),
        {"attention": 3, "experts": 2},
        {"attention": 6.0, "experts": 8.0},
    )


def test_rank_stabilised_scaling_of_rank_one_is_kept(tmp_path: Path) -> None:
    """alpha / √1 is alpha / 1: the numbers alone don't tell it."""
    spec = AdapterSpec(("experts",), 1, 8.0, rslora=True)
    save_adapter(adapted(spec), tmp_path, "org/base")
    assert load_adapter(model(), tmp_path, expected=spec).rslora


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    path = changed(saved, tmp_path, tensors=lambda values: values.update({k: v.to(dtype) for k, v in values.items()}))
    loaded = model()
    kept = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert load_adapter(loaded, path).dtype == kept
    assert {parameter.dtype for _, parameter in trainable_parameters(loaded)} == {kept}
    assert load_adapter(model(), path, dtype=torch.float32).dtype == torch.float32
    if dtype == torch.bfloat16:
        save_adapter(loaded, tmp_path / "again", "org/base")
        assert {value.dtype for value in load_file(tmp_path / "again" / WEIGHTS).values()} == {torch.bfloat16}


def test_a_save_that_fails_leaves_the_old_adapter(saved: Path, tmp_path: Path) -> None:
    path = changed(saved, tmp_path)
    before = {name: (path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    (path / f"{WEIGHTS}.partial").mkdir()
    with pytest.raises(NibbleError, match=f"{WEIGHTS}.partial can't be written"):
        save_adapter(adapted(AdapterSpec(("experts",), 4, 8.0)), path, "org/base")
    assert {name: (path / name).read_bytes() for name in (CONFIG, WEIGHTS)} == before


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(NibbleError, match=r"taken can't be written: File exists\."):
        save_adapter(adapted(), tmp_path / "taken", "org/base")


def test_there_must_be_an_adapter() -> None:
    with pytest.raises(NibbleError, match="no adapter to save; add_lora or load_adapter gives it one"):
        save_adapter(model(), "unused", "org/base")
    with pytest.raises(NibbleError, match="this model has no adapter"):
        adapter_spec(model())


# --- errors of files


def test_files_that_are_not_there(saved: Path, tmp_path: Path) -> None:
    assert message(tmp_path) == f"{tmp_path} is no adapter: it has no {CONFIG}.\nAn adapter is {CONFIG} and {WEIGHTS}."
    path = changed(saved, tmp_path)
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    assert message(path) == (
        f"{path} is no adapter: it has no {WEIGHTS}. adapter_model.bin is a pickle and is not read."
    )
    (path / CONFIG).write_text("{")
    assert message(path).startswith(f"{path / CONFIG} is not valid JSON: ")
    (path / CONFIG).write_text('{"peft_type": "LOHA"}')
    assert message(path) == f"{path / CONFIG}: peft_type is 'LOHA'; only LORA adapters can be loaded."


def test_a_second_adapter_is_refused(saved: Path) -> None:
    with pytest.raises(NibbleError, match="this model has an adapter already; load the base model again"):
        load_adapter(adapted(), saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("kasa_config", {"beta": 1}),
        ("a_later_invention", True),
    ],
)
def test_features_beyond_plain_lora(saved: Path, tmp_path: Path, name: str, value: Any) -> None:
    path = changed(saved, tmp_path, lambda config: config.update({name: value}))
    assert message(path) == (
        f"{path / CONFIG}: {name} is {value!r}, which is not supported; only plain LoRA can be loaded."
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights is 'pissa', which changes the base weights too.\n"
            "Save it as an ordinary LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion).",
        ),
        ({"layers_pattern": "h"}, "layers_pattern is 'h'; only 'layers' is supported."),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'."),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1."),
        ({"peft_version": {"a": 1}}, "peft_version must be text, got {'a': 1}."),
        ({"lora_dropout": "x"}, "lora_dropout must be a positive number, got 'x'."),
    ],
)
def test_config_entries_that_can_not_be_read(
    saved: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    path = changed(saved, tmp_path, lambda config: config.update(change))
    assert message(path) == f"{path / CONFIG}: {expected}"


UNNAMED = f" in {WEIGHTS}, which {CONFIG} doesn't name.\n"
SLOW = r"(\w|\.|[a-z])*(\w|\.|[a-z])*(\w|\.|[a-z])*[A-Z]"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"target_modules": ["q_proj"]}, UNNAMED),
        ({"target_modules": ".*\\.1\\.self_attn\\.o_proj"}, UNNAMED),
        ({"target_modules": []}, UNNAMED),
        ({"target_parameters": ["experts.gate_proj"]}, UNNAMED),
        ({"exclude_modules": ["o_proj"]}, UNNAMED),
        ({"layers_to_transform": [7]}, UNNAMED),
        (
            {"target_parameters": ["o_proj.weight"]},
            "target_modules and target_parameters both name model.layers.0.self_attn.o_proj.",
        ),
        (
            {"target_modules": ["q_proj", "k_proj"], "target_parameters": None},
            "target_modules and target_parameters ('q_proj', 'k_proj') match nothing that LoRA can adapt in this "
            "glm4_moe_lite model: attention, experts, shared_experts, dense_mlp, router.",
        ),
        ({"target_modules": True}, "target_modules must be a list of texts, got True."),
        ({"target_parameters": [1]}, "target_parameters must be a list of texts, got [1]."),
        ({"layers_to_transform": ["a"]}, "layers_to_transform must be a list of layers' numbers, got ['a']."),
        ({"rank_pattern": "x"}, "rank_pattern must be an object, got 'x'."),
        ({"r": None}, "r must be a positive number, got None."),
        ({"layers_to_transform": ""}, "layers_to_transform must be a list of layers' numbers, got ''."),
        ({"rank_pattern": {"o_proj": 0}}, "rank_pattern: o_proj must be a positive number, got 0."),
        ({"rank_pattern": {"o_proj": 1.5}}, "model.layers.0.self_attn.o_proj has rank 1.5, which is no whole number."),
        ({"lora_alpha": "8"}, "lora_alpha must be a positive number, got '8'."),
        (
            {"alpha_pattern": {"(": 1}},
            "alpha_pattern has '(', which is no regular expression: missing ) at position 10.",
        ),
        (
            {"peft_version": "0.18.1"},
            "made by PEFT 0.18.1. "
            "Its expert tensors have the layout of PEFT before 0.19.1 (in and out swapped), "
            "which newer PEFT can't read.\n"
            "Merge it into its base with the PEFT that made it, and train from the merged weights.",
        ),
    ],
)
def test_configs_that_do_not_fit(saved: Path, tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = changed(saved, tmp_path, lambda config: config.update(change))
    told = message(path)
    assert expected in told if expected == UNNAMED else told == f"{path}: {expected}"


def test_a_pattern_that_never_ends(saved: Path, tmp_path: Path) -> None:
    """A matcher without a limit tries 3^40 ways."""
    for field in ("target_modules", "exclude_modules"):
        path = changed(saved, tmp_path / field, lambda config, field=field: config.update({field: SLOW}))
        begun = time.monotonic()
        assert f"{field} has {SLOW!r}, a regular expression that takes more than 2 s" in message(path)
        assert time.monotonic() - begun < 300
    path = changed(saved, tmp_path / "ranks", lambda config: config.update(rank_pattern={SLOW: 3}))
    assert "rank_pattern has " in message(path)


def test_many_patterns_have_one_limit_and_are_compiled_once(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    compiled = patterns.regex.compile

    def counting(text: str) -> object:
        made.append(text)
        return compiled(text)

    monkeypatch.setattr(patterns.regex, "compile", counting)
    more = {"rank_pattern": dict.fromkeys(("x", "y"), 3), "alpha_pattern": {"z": 3.0}}

    def add(config: dict[str, Any]) -> None:
        for field, numbers in more.items():
            config[field] |= numbers

    path = changed(saved, tmp_path / "few", add)
    load_adapter(model(), path)
    config = json.loads((path / CONFIG).read_text())
    assert len(made) == len(config["rank_pattern"]) + len(config["alpha_pattern"]) >= 3
    # Each of them fits nothing and takes a moment to find that out.
    monkeypatch.setattr(patterns, "_ALL_SECONDS", 1)
    slow = {rf"(\w|\.)*(\w|\.)*(\w|\.)*[!?]{{{number}}}": 3 for number in range(10_000)}
    path, begun = (
        changed(saved, tmp_path / "many", lambda config: config.update(rank_pattern=slow)),
        time.process_time(),
    )
    assert "or 1 s with all others of the file" in message(path)
    assert time.process_time() - begun < 60


def test_a_pattern_that_is_too_long(saved: Path, tmp_path: Path) -> None:
    path = changed(saved, tmp_path / "long", lambda config: config.update(target_modules="a" * 20_000))
    assert "a regular expression of 20,000 characters; it may have 10,000." in message(path)


def test_tensors_of_what_is_not_adapted(saved: Path, tmp_path: Path) -> None:
    def told(name: str) -> str:
        name = f"base_model.model.{name}.lora_A.weight"
        return message(
            changed(saved, tmp_path / name, tensors=lambda values: values.update({name: torch.zeros(2, 64)}))
        )

    assert "\nIt adapts the vision tower, which isn't computed here" in told("model.visual.blocks.0.attn.qkv")
    assert "\nlm_head is of the output head; LoRA is supported on attention, " in told("lm_head")


# --- errors of tensors


def test_tensors_missing_or_unknown(saved: Path, tmp_path: Path) -> None:
    name = f"{PREFIX}.1.mlp.experts.lora_A.weight"
    path = changed(saved, tmp_path, tensors=lambda values: values.pop(name))
    assert message(path) == f"{path}: {WEIGHTS} lacks {name}, which {CONFIG} names for this model."
    shutil.rmtree(path)
    path = changed(saved, tmp_path, lambda config: config.update(target_modules=["o_proj"]))
    assert message(path) == (
        f"{path}: {PREFIX}.0.self_attn.kv_a_proj_with_mqa.lora_A.weight, "
        f"{PREFIX}.0.self_attn.kv_a_proj_with_mqa.lora_B.weight, {PREFIX}.0.self_attn.kv_b_proj.lora_A.weight "
        f"and 21 more in {WEIGHTS}, which {CONFIG} doesn't name.\n"
        "The config and the tensors don't belong together, or the adapter is for another model."
    )


def test_experts_adapted_one_by_one(saved: Path, tmp_path: Path) -> None:
    name = f"{PREFIX}.1.mlp.experts.0.gate_proj.lora_A.weight"
    path = changed(saved, tmp_path, tensors=lambda values: values.update({name: torch.zeros(2, 64)}))
    assert message(path) == (
        f"{path}: {name} in {WEIGHTS}, which {CONFIG} doesn't name.\n"
        "It adapts the experts one by one, as transformers 4 has them. "
        "Load it with PEFT on transformers 5 and save it again."
    )


def test_shapes(saved: Path, tmp_path: Path) -> None:
    path = changed(saved, tmp_path, lambda config: config["rank_pattern"].update(o_proj=5))
    assert message(path) == (
        f"{path}: {PREFIX}.0.self_attn.o_proj.lora_A.weight is [3, 128]; this model and the rank make it [5, 128]."
    )
    assert f"{PREFIX}.1.mlp.experts.base_layer.lora_B.weight is [384, 16]" in message(
        saved, model(moe_intermediate_size=64)
    )


def test_layout_of_older_peft_is_known_by_its_shapes(saved: Path, tmp_path: Path) -> None:
    def swap(values: dict[str, Tensor]) -> None:
        for stack in ("experts.base_layer", "experts"):
            a, b = (f"{PREFIX}.1.mlp.{stack}.lora_{letter}.weight" for letter in "AB")
            values[a], values[b] = values[b].t().contiguous(), values[a].t().contiguous()

    path = changed(saved, tmp_path, lambda config: config.pop("peft_version"), swap)
    assert message(path) == (
        f"{path}: {PREFIX}.1.mlp.experts.base_layer.lora_A.weight is [16, 384]. "
        "Its expert tensors have the layout of PEFT before 0.19.1 (in and out swapped), which newer PEFT can't read.\n"
        "Merge it into its base with the PEFT that made it, and train from the merged weights."
    )


# --- an adapter that isn't the expected one


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (
            AdapterSpec(("attention", "experts", "router"), 3, 6.0),
            "adapter.targets adapts model.layers.1.mlp.gate, the adapter does not.",
        ),
        (
            AdapterSpec(("attention", "mlp.experts.down_proj"), 3, 6.0),
            "the adapter adapts model.layers.1.mlp.experts.gate_up_proj, adapter.targets does not.",
        ),
        (
            AdapterSpec(("attention", "experts"), 3, 6.0),
            "model.layers.1.mlp.experts.gate_up_proj has rank 2, adapter.rank says 3.",
        ),
        (
            AdapterSpec(("attention", "experts"), {"attention": 3, "experts": 2}, 6.0),
            "model.layers.1.mlp.experts.gate_up_proj has alpha 8.0, adapter.alpha says 6.0.",
        ),
        (
            AdapterSpec(SPEC.targets, SPEC.rank, SPEC.alpha, rslora=True),
            "use_rslora is False, adapter.rslora is True.",
        ),
    ],
)
def test_not_the_expected_adapter(saved: Path, spec: AdapterSpec, expected: str) -> None:
    assert message(saved, expected=spec) == (
        f"{saved}: {expected}\n"
        "Make adapter.targets, rank, alpha, rslora and layers those of the adapter, or leave init_from out."
    )
