"""LoRA on a model: adding it, and listing what is adapted and what is trained.

Shapes: E experts, R rank, `in` and `out` features of a weight.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from models.adapters.targets import AdapterSpec, Target, adaptable, module_name, resolve
from models.blocks.linear import ExpertWeights, Linear, LoRA
from models.checkpoint.keymap import Key, KeyMap, key_map_of
from models.decoder import CausalLM
from quant.choices import named_dtype
from quant.common.errors import NibbleError

# Assigns a whole tensor to a parameter of the model; where the model is sharded, the part of it that is here.
Assign = Callable[[Tensor, Tensor], None]


def assign_whole(parameter: Tensor, whole: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(whole)


def add_lora(model: CausalLM, spec: AdapterSpec, seed: int = 0) -> None:
    """Freeze every parameter of `model` and give the matrices that `spec` names a LoRA, in place.

    B is zero, so the model computes what it did before, bit for bit. A is drawn as PEFT draws it (Kaiming uniform with
    a = sqrt(5): uniform within ±1/sqrt(in)), from a generator of its own per matrix, so it depends on the seed, the
    name and the shape: not on the device, nor on what else is adapted. On the meta device only shapes are given:
    `initialise_lora` is called when there is memory.
    """
    targets = resolve(key_map_of(model), spec, model.model_type)
    loras = attach_lora(model, targets, spec.rslora, named_dtype(spec.dtype))
    if not any(lora.A.is_meta for lora in loras):
        initialise_lora(model, seed)


def initialise_lora(model: CausalLM, seed: int, assign: Assign = assign_whole) -> None:
    """The starting values of every LoRA of `model`, a matrix or stack at a time; see `add_lora`."""
    for key, lora in adapted(model):
        *experts, out_features, in_features = key.shape
        assign(lora.A, initial_a((*experts, lora.rank, in_features), module_name(key.native), seed))
        assign(lora.B, torch.zeros(*experts, out_features, lora.rank))


def initial_a(shape: tuple[int, ...], name: str, seed: int) -> Tensor:
    """The starting A of the matrix called `name`: float32 [.., R, in] on the CPU."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def attach_lora(model: CausalLM, targets: Sequence[Target], rslora: bool, dtype: torch.dtype) -> list[LoRA]:
    """Freeze `model` and put an unset LoRA on every target, on its weight's device. Returns them in order."""
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise NibbleError("this model has an adapter already; load the base model again to give it another.")
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
            device="meta",  # where nothing is drawn
        ).to_empty(device=owner.weight.device)
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


@contextlib.contextmanager
def without_adapter(model: CausalLM) -> Iterator[None]:
    """While this is open `model` computes what its base computes, bit for bit; its adapter keeps its values.

    Not for a model that is being trained: what is computed meanwhile has no gradient for the adapter.
    """
    owners = [module for module in model.modules() if isinstance(module, Linear | ExpertWeights)]
    loras = [owner.lora for owner in owners]
    try:
        for owner in owners:
            owner.lora = None
        yield
    finally:
        for owner, lora in zip(owners, loras, strict=True):
            owner.lora = lora


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of all that has a gradient, in the model's order: the order of an optimiser's groups."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
