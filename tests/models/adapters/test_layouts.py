"""Adapters in the layouts of other programs: what they mean is what those programs compute with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.adapters.adapter_file import AdapterFile
from models.adapters.files import load_adapter, read_adapter_weights, save_adapter
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec
from models.checkpoint.keymap import key_map_of
from quant.common.errors import NibbleError
from tests.helpers import assert_close, random_tokens, relative_error
from tests.hub_forms import save_form
from tests.peft_helpers import logits_of, native, peft_load, randomise

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULE = "base_model.model.model.layers.{}.mlp.experts"
TOKENS = random_tokens((2, 32))
EXPERTS = 8
# No two dimensions of a stack are alike.
SIZES: dict[str, Any] = {"moe_intermediate_size": 24, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("glm")
    return path, save_form(path, "glm4_moe_lite", **SIZES)


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": []}
    (folder / CONFIG).write_text(json.dumps({**plain, **config}))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)
    return folder


def drawn(shape: tuple[int, ...], name: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return 0.3 * torch.randn(shape, generator=generator)


def one_by_one(parts: tuple[str, ...], layers: range, rank: int = 2) -> dict[str, Tensor]:
    """As transformers 4 with PEFT has it, for the sizes above."""
    shapes = {"gate_proj": (24, 64), "up_proj": (24, 64), "down_proj": (64, 24)}
    tensors = {}
    for layer in layers:
        for expert in range(EXPERTS):
            for part in parts:
                rows, columns = shapes[part]
                prefix = f"{MODULE.format(layer)}.{expert}.{part}"
                tensors[f"{prefix}.lora_A.weight"] = drawn((rank, columns), f"{prefix}A")
                tensors[f"{prefix}.lora_B.weight"] = drawn((rows, rank), f"{prefix}B")
    return tensors


ONE_BY_ONE = {"target_modules": r".*\.experts\.\d+\.(gate|up|down)_proj"}


@pytest.mark.parametrize("rslora", [False, True])
def test_experts_one_by_one_are_what_peft_makes_of_them(glm: tuple[Path, Any], tmp_path: Path, rslora: bool) -> None:
    """Layers 1 and 2: layer 0 is dense, and its matrices' names end alike."""
    folder, reference = glm
    path = write(
        tmp_path / "adapter",
        one_by_one(("gate_proj", "up_proj", "down_proj"), range(1, 3)),
        use_rslora=rslora,
        **ONE_BY_ONE,
    )
    model = native(folder)
    spec = load_adapter(model, path)
    assert spec.rank == {"mlp.experts.gate_up_proj": 4, "mlp.experts.down_proj": 2}
    # PEFT fuses them when it reads target modules by these names (which mean all matrices that end so).
    names = ["gate_proj", "up_proj", "down_proj"]
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, "target_modules": names}))
    if rslora:
        # Fused, PEFT takes the root of the double rank; the alpha that keeps the scaling isn't what it sets.
        expected = merged(reference, path, 4 / 2**0.5)
    else:
        theirs, _ = peft_load(reference, path)
        expected = logits_of(theirs, TOKENS)
    assert_close(logits_of(model, TOKENS), expected)
    assert relative_error(expected, logits_of(reference, TOKENS)) > 1e-2


def merged(reference: Any, path: Path, scaling: float) -> Tensor:
    """Logits of the reference with each expert's update added, as transformers 4 computes it."""
    import copy

    tensors, model = load_file(path / WEIGHTS), copy.deepcopy(reference)
    for name, a in tensors.items():
        if ".lora_A." in name:
            module, _, rest = name.removeprefix("base_model.model.").partition(".experts.")
            expert, part = int(rest.split(".")[0]), rest.split(".")[1]
            stack = model.get_parameter(f"{module}.experts.{'down' if part == 'down_proj' else 'gate_up'}_proj")
            rows = slice(24, None) if part == "up_proj" else slice(0, 64 if part == "down_proj" else 24)
            with torch.no_grad():
                stack[expert, rows] += scaling * tensors[name.replace("_A", "_B")] @ a
    return logits_of(model, TOKENS)


def test_one_of_gate_and_up(glm: tuple[Path, Any], tmp_path: Path) -> None:
    folder, reference = glm
    for part in ("gate_proj", "up_proj"):
        path = write(
            tmp_path / part, one_by_one((part,), range(2, 3)), target_modules=rf".*\.2\..*experts\.\d+\.{part}"
        )
        model = native(folder)
        load_adapter(model, path)
        assert_close(logits_of(model, TOKENS), merged(reference, path, 2.0))


def saved(folder: Path, path: Path) -> Tensor:
    """Saves a random adapter of the experts, and returns the logits with it."""
    model = native(folder)
    add_lora(model, AdapterSpec(("experts",), 2, 4.0))
    randomise(trainable_parameters(model))
    save_adapter(model, path, "org/base")
    return logits_of(model, TOKENS)


def rewrite(
    path: Path, change: Callable[[str, Tensor], tuple[str, Tensor]], config: dict[str, Any] | None = None
) -> None:
    tensors = dict(change(name, value) for name, value in load_file(path / WEIGHTS).items())
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / WEIGHTS)
    if config:
        (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | config))


def swap(name: str, value: Tensor) -> tuple[str, Tensor]:
    """What PEFT up to 0.19.0 would have trained to the same update: out and in exchanged, the factors transposed.

    Its update (ParamWrapper.get_delta_weight): einsum("o r e, e r i -> e i o", B, A), i being the first dimension.
    """
    if ".lora_A." in name:  # [E·R, in] to B [in, R·E]
        return name.replace("_A", "_B"), value.unflatten(0, (EXPERTS, -1)).permute(2, 1, 0).flatten(1)
    return name.replace("_B", "_A"), value.unflatten(1, (-1, EXPERTS)).permute(2, 1, 0).flatten(0, 1)


@pytest.mark.parametrize("version", ["0.18.1", None])
def test_swapped_stacks_of_older_peft(
    glm: tuple[Path, Any], tmp_path: Path, version: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    expected = saved(glm[0], tmp_path)
    rewrite(tmp_path, swap, {"peft_version": version})
    assert load_file(tmp_path / WEIGHTS)[f"{MODULE.format(1)}.base_layer.lora_A.weight"].shape == (16, 48)
    model = native(glm[0])
    with caplog.at_level(logging.WARNING, "nibble"):
        load_adapter(model, tmp_path)
    assert_close(logits_of(model, TOKENS), expected)
    assert caplog.messages == [
        f"{tmp_path}: the tensors of its experts have the layout of PEFT up to 0.19.0, in and out swapped, and are "
        "read as such"
    ]


def test_square_stacks_are_told_apart_by_the_version(tmp_path: Path) -> None:
    save_form(tmp_path / "base", "glm4_moe_lite", moe_intermediate_size=64, num_hidden_layers=2)
    model = native(tmp_path / "base")
    add_lora(model, AdapterSpec(("experts.down_proj",), 2, 4.0))
    randomise(trainable_parameters(model))
    save_adapter(model, tmp_path / "adapter", "org/base")
    expected = logits_of(model, TOKENS)
    rewrite(tmp_path / "adapter", swap, {"peft_version": "0.19.0"})
    again = native(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert_close(logits_of(again, TOKENS), expected)
    rewrite(tmp_path / "adapter", lambda name, value: (name, value), {"peft_version": None})
    with pytest.raises(NibbleError) as error:
        load_adapter(native(tmp_path / "base"), tmp_path / "adapter")
    assert str(error.value) == (
        f"{tmp_path / 'adapter'}: the experts' matrices are square, so that no shape tells in which of PEFT's layouts "
        f"their tensors are, and {CONFIG} has no peft_version.\n"
        "Put in the version of PEFT that made it (PEFT up to 0.19.0 swapped in and out)."
    )


def expert_major(name: str, value: Tensor) -> tuple[str, Tensor]:
    """B with each expert's columns side by side."""
    return name, value.unflatten(1, (-1, EXPERTS)).mT.flatten(1) if ".lora_B." in name else value


@pytest.mark.parametrize("swapped", [False, True])
def test_expert_major(glm: tuple[Path, Any], tmp_path: Path, swapped: bool) -> None:
    expected = saved(glm[0], tmp_path)
    if swapped:
        rewrite(tmp_path, swap, {"peft_version": "0.18.1"})
    rewrite(tmp_path, expert_major)
    model = native(glm[0])
    load_adapter(model, tmp_path, layout="expert-major")
    assert_close(logits_of(model, TOKENS), expected)
    wrong = native(glm[0])
    load_adapter(wrong, tmp_path)
    assert relative_error(logits_of(wrong, TOKENS), expected) > 1e-2
    # What says so itself needs no option, and allows no other.
    rewrite(tmp_path, lambda name, value: (name, value), {"lora_B_layout": "grouped_by_expert"})
    model = native(glm[0])
    load_adapter(model, tmp_path)
    assert_close(logits_of(model, TOKENS), expected)
    with pytest.raises(NibbleError) as error:
        load_adapter(native(glm[0]), tmp_path, layout="peft")
    assert str(error.value) == (
        f"{tmp_path}: its lora_B_layout is 'grouped_by_expert', which is the layout expert-major, not peft.\n"
        "Leave the layout to it."
    )
    for value, quoted in (("new", "'new'"), (["rank_major"], r"\['rank_major'\]")):
        rewrite(tmp_path, lambda name, value: (name, value), {"lora_B_layout": value})
        with pytest.raises(NibbleError, match=f"lora_B_layout is {quoted}; known are rank_major, grouped_by_expert"):
            load_adapter(native(glm[0]), tmp_path)


def test_pairs_without_a_model_that_holds_them(glm: tuple[Path, Any], tmp_path: Path) -> None:
    saved(glm[0], tmp_path)
    model = native(glm[0])
    load_adapter(model, tmp_path)
    pairs = list(AdapterFile(tmp_path, key_map_of(native(glm[0])), "glm4_moe_lite"))
    assert [pair.target.module for pair in pairs] == [
        f"model.layers.{layer}.mlp.experts.{stack}" for layer in (1, 2) for stack in ("gate_up_proj", "down_proj")
    ]
    for pair in pairs:
        lora: Any = model.get_submodule(f"{pair.target.module}.lora")
        assert torch.equal(pair.a, lora.A) and torch.equal(pair.b, lora.B) and pair.scaling == 2.0
    expected = logits_of(model, TOKENS)
    randomise(trainable_parameters(model), seed=1)
    read_adapter_weights(model, tmp_path)  # once more, as where the model had no memory before
    assert torch.equal(logits_of(model, TOKENS), expected)


# --- errors


def told(folder: Path, path: Path) -> str:
    model = native(folder)
    with pytest.raises(NibbleError) as error:
        load_adapter(model, path)
    return str(error.value)


def test_what_lacks_or_differs_among_experts(glm: tuple[Path, Any], tmp_path: Path) -> None:
    parts = ("gate_proj", "up_proj", "down_proj")
    tensors = one_by_one(parts, range(1, 3))
    name = f"{MODULE.format(2)}.5.up_proj.lora_B.weight"
    lacking = write(tmp_path / "lacking", {k: v for k, v in tensors.items() if k != name}, **ONE_BY_ONE)
    assert told(glm[0], lacking) == f"{lacking}: {WEIGHTS} lacks {name}, which {CONFIG} names for this model."
    more = one_by_one(parts, range(1, 3)) | {f"{MODULE.format(1)}.8.up_proj.lora_A.weight": torch.zeros(2, 64)}
    spare = write(tmp_path / "spare", more, **ONE_BY_ONE)
    assert f"{MODULE.format(1)}.8.up_proj.lora_A.weight in {WEIGHTS}, which {CONFIG} doesn't name." in told(
        glm[0], spare
    )
    some = write(tmp_path / "some", tensors, target_modules=r".*experts\.[0-6]\.up_proj")
    assert told(glm[0], some) == (
        f"{some}: target_modules names model.layers.1.mlp.experts.0.up_proj, not model.layers.1.mlp.experts.7.up_proj."
        "\nOf a layer's experts, either all are adapted or none."
    )
    ranks = write(tmp_path / "ranks", tensors, rank_pattern={"up_proj": 3}, **ONE_BY_ONE)
    assert told(glm[0], ranks) == (
        f"{ranks}: the experts of model.layers.1.mlp.experts.gate_up_proj have several ranks or alphas; those of a "
        "layer must have one."
    )


def test_values_and_dtypes_that_can_not_be_used(glm: tuple[Path, Any], tmp_path: Path) -> None:
    saved(glm[0], tmp_path)
    name = f"{MODULE.format(1)}.lora_A.weight"
    rewrite(tmp_path, lambda key, value: (key, value.fill_(torch.nan) if key == name else value))
    assert f"{name}: some of its values are inf or NaN" in told(glm[0], tmp_path)
    rewrite(tmp_path, lambda key, value: (key, value.to(torch.int32) if key == name else value))
    assert told(glm[0], tmp_path) == (f"{tmp_path}: {name} is I32; only float32, bfloat16 and float16 are read.")
