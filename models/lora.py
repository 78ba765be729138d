"""LoRA on a model: adding it, and listing what is adapted and what is trained.

Shapes: E experts, R rank, `in` and `out` features of a weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quant.errors import NibbleError

from .decoder import CausalLM
from .keymap import Key, KeyMap
from .linear import ExpertWeights, Linear, LoRA
from .registry import ARCHITECTURES
from .targets import AdapterSpec, Target, adaptable, module_name, resolve


def key_map_of(model: CausalLM) -> KeyMap:
    return ARCHITECTURES[model.model_type].key_map(model.config)


def add_lora(model: CausalLM, spec: AdapterSpec, seed: int = 0) -> None:
    """Freeze every parameter of `model` and give the matrices that `spec` names a LoRA, in place.

    B is zero, so the model computes what it did before, bit for bit. A is drawn as PEFT draws it (Kaiming uniform with
    a = sqrt(5): uniform within ±1/sqrt(in)), from a generator of its own per matrix, so it depends on the seed, the
    name and the shape: not on the device, nor on what else is adapted.
    """
    targets = resolve(key_map_of(model), spec, model.model_type)
    for lora, target in zip(attach_lora(model, targets, spec.rslora, spec.dtype), targets, strict=True):
        if lora.A.is_meta:
            continue
        with torch.no_grad():
            lora.A.copy_(initial_a(tuple(lora.A.shape), target.module, seed))
            lora.B.zero_()


def initial_a(shape: tuple[int, ...], name: str, seed: int) -> Tensor:
    """The starting A of the matrix called `name`: float32 [.., R, in] on the CPU."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def attach_lora(model: CausalLM, targets: Sequence[Target], rslora: bool, dtype: torch.dtype) -> list[LoRA]:
    """Freeze `model` and put an unset LoRA on every target, on its weight's device. Returns them in order."""
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise NibbleError("this model has an adapter already; load the base model anew to give it another.")
    model.requires_grad_(False)
    loras = []
    for target in targets:
        owner = model.get_submodule(target.module)
        assert isinstance(owner, Linear | ExpertWeights)
        owner.lora = LoRA(
            target.key.shape,
            target.rank,
            target.alpha,
            rslora=rslora,
            dtype=dtype,
            device=next(owner.weight.parameters()).device,
        )
        loras.append(owner.lora)
    return loras


def adapted(model: CausalLM, key_map: KeyMap | None = None) -> list[tuple[Key, LoRA]]:
    """The matrices of `model` that have a LoRA, in the model's order, by `key_map` (None: the checkpoint's)."""
    found = []
    for key in adaptable(key_map or key_map_of(model)):
        lora = getattr(model.get_submodule(module_name(key.native)), "lora", None)
        if lora is not None:
            found.append((key, lora))
    return found


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of all that has a gradient, in the model's order: the order of an optimiser's groups."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
