"""Exported adapters of every architecture: read back by each server's rule, they compute what base + adapter computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.adapters.files import save_adapter
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec, adaptable, groups_of
from models.checkpoint.keymap import key_map_of
from models.export.__main__ import main
from tests.helpers import assert_close, random_tokens, relative_error
from tests.peft_helpers import config_of, logits_of, native, peft_load, randomise
from tests.tiny import save_tiny

TOKENS = random_tokens((2, 24), 64)
# Each group has a rank and a scale of its own, so that padding and folding show; 8 is the largest rank.
RANKS = {"attention": 4, "linear_attention": 3, "experts": 2, "shared_experts": 8, "dense_mlp": 1, "router": 5}
ALPHAS = {"attention": 7.0, "linear_attention": 3.0, "experts": 5.0, "shared_experts": 4.0, "dense_mlp": 1.0, "router": 9.0}  # fmt: skip
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
MODEL_TYPES = ("glm4_moe_lite", "glm4_moe", "glm_moe_dsa", "afmoe", "qwen3_moe", "qwen3_5_moe_text", "qwen3_5_moe")
PREFIX = "base_model.model."


class World:
    """A tiny checkpoint, an adapter of all that can be adapted, and the logits with it."""

    def __init__(self, folder: Path, model_type: str) -> None:
        self.base, self.adapter = folder / "base", folder / "adapter"
        self.model_type = model_type
        layers = 2 if "qwen3_5" not in model_type else 4
        experts = {"n_routed_experts" if model_type.startswith("glm") else "num_experts": 4}
        self.reference = save_tiny(
            self.base, model_type, vocab_size=64, num_hidden_layers=layers, moe_intermediate_size=32, **experts
        )
        model = native(self.base)
        groups = tuple(groups_of(adaptable(key_map_of(model))))
        numbers = ({group: of[group] for group in groups} for of in (RANKS, ALPHAS))
        self.spec = AdapterSpec(groups, *numbers)
        add_lora(model, self.spec)
        randomise(trainable_parameters(model))
        save_adapter(model, self.adapter, str(self.base))
        self.logits = logits_of(model, TOKENS)
        assert relative_error(self.logits, logits_of(self.reference, TOKENS)) > 0.1


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    made: dict[str, World] = {}

    class Lazy(dict[str, World]):
        def __missing__(self, model_type: str) -> World:
            made[model_type] = self[model_type] = World(tmp_path_factory.mktemp(model_type), model_type)
            return self[model_type]

    return Lazy()


def served(reference: Any, folder: Path) -> Any:
    """The reference with W + B·A in place of W, for each pair of a file of LoRA per expert and matrix."""
    config, tensors = config_of(folder), load_file(folder / "adapter_model.safetensors")
    assert config["r"] == config["lora_alpha"]
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    state = reference.state_dict()
    for name in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        a, b = (tensors[f"{name}.lora_{letter}.weight"] for letter in "AB")
        assert a.shape[0] == b.shape[1] == config["r"], "one rank, to which all are padded"
        delta, parts = b @ a, name.removeprefix(PREFIX).split(".")
        if "experts" in parts:
            at = parts.index("experts")
            stack = ".".join(parts[: at + 1])
            expert, part = int(parts[at + 1]), parts[at + 2]
            if part == "down_proj":
                state[f"{stack}.down_proj"][expert] += delta
            else:
                rows = slice(None, len(delta)) if part == "gate_proj" else slice(len(delta), None)
                state[f"{stack}.gate_up_proj"][expert][rows] += delta
        else:
            key = f"{'.'.join(parts)}.weight"
            state[key if key in state else key.replace("mlp.gate", "mlp.router.gate")] += delta
    return reference


def copied(world: World) -> Any:
    import copy

    return copy.deepcopy(world.reference)


def refused(model_type: str, server: str) -> list[str]:
    """Options without which an adapter of everything is refused."""
    latent = model_type in ("glm4_moe_lite", "glm_moe_dsa")
    names: tuple[str, ...] = ()
    if latent:
        names = LATENT if server == "llamacpp" else LATENT[3:]
    elif model_type.startswith("qwen3_5") and server == "vllm":
        names = ("mlp.gate",)
    return [option for name in names for option in ("--keep", name)]


@pytest.mark.parametrize("server", ["vllm", "sglang", "llamacpp"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_adapter_of_everything(worlds: dict[str, World], tmp_path: Path, model_type: str, server: str) -> None:
    world, out = worlds[model_type], tmp_path / "out"
    assert main([str(world.adapter), str(out), "--for", server, *refused(model_type, server)]) == 0
    if server == "vllm" and model_type == "qwen3_5_moe":
        peft, _ = peft_load(world.reference, out)
        assert_close(logits_of(peft, TOKENS), world.logits)
        config = config_of(out)
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})
        return
    names = set(load_file(out / "adapter_model.safetensors"))
    prefix = "model.language_model" if model_type == "qwen3_5_moe" else "model"
    for part in ("gate", "up", "down"):
        assert f"{PREFIX}{prefix}.layers.1.mlp.experts.3.{part}_proj.lora_A.weight" in names
    router = "mlp.router.gate" if model_type == "afmoe" and server != "vllm" else "mlp.gate"
    assert f"{PREFIX}{prefix}.layers.1.{router}.lora_B.weight" in names
    assert_close(logits_of(served(copied(world), out), TOKENS), world.logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_for_peft(worlds: dict[str, World], tmp_path: Path, model_type: str) -> None:
    world, out = worlds[model_type], tmp_path / "out"
    assert main([str(world.adapter), str(out), "--for", "peft"]) == 0
    peft, _ = peft_load(world.reference, out)
    assert_close(logits_of(peft, TOKENS), world.logits)
