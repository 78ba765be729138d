"""A tiny checkpoint of an architecture and an adapter of all that can be adapted, for tests of exports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from models.adapters.files import save_adapter
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec, adaptable, groups_of
from models.checkpoint.keymap import key_map_of
from tests.helpers import random_tokens, relative_error
from tests.peft_helpers import config_of, logits_of, native, randomise
from tests.tiny import save_tiny

TOKENS = random_tokens((2, 24), 64)
# Each group has a rank and a scale of its own, so that padding and folding show; 8 is the largest rank.
RANKS = {"attention": 4, "linear_attention": 3, "experts": 2, "shared_experts": 8, "dense_mlp": 1, "router": 5}
ALPHAS = {
    "attention": 7.0,
    "linear_attention": 3.0,
    "experts": 5.0,
    "shared_experts": 4.0,
    "dense_mlp": 1.0,
    "router": 9.0,
}
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
PREFIX = "base_model.model."


class World:
    """A tiny checkpoint, an adapter of all that can be adapted, and the logits with it."""

    def __init__(self, folder: Path, model_type: str, **changes: Any) -> None:
        self.base, self.adapter = folder / "base", folder / "adapter"
        self.model_type = model_type
        layers = 2 if "qwen3_5" not in model_type else 4
        experts = {"n_routed_experts" if model_type.startswith("glm") else "num_experts": 4}
        self.reference = save_tiny(
            self.base,
            model_type,
            **{"vocab_size": 64, "num_hidden_layers": layers, "moe_intermediate_size": 32, **experts, **changes},
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
    return copy.deepcopy(world.reference)
