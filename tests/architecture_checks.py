"""What is checked of every architecture, on a tiny checkpoint that transformers saved.

`folder` is the checkpoint's, `reference` the model of transformers that was saved there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models.experts.torch_form as experts
from models import load_model
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec
from models.blocks.documents import Documents
from models.blocks.router import Router
from models.checkpoint.keymap import key_map_of
from models.registry import architecture_for
from quant.common.errors import NibbleError
from quant.storage import Storage
from tests.helpers import assert_close, random_tokens, relative_error

# Kinds of storage, with or without double quantisation.
QUANTISED = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]
GRADIENT_FREE = ("e_score_correction_bias", "expert_bias")  # the ends of their names on the hub


def load(folder: Path, storage: str = "none", dtype: torch.dtype = torch.float32, double_quant: bool = True) -> Any:
    return load_model(folder, storage=storage, dtype=dtype, double_quant=double_quant)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def native_tensor(model: torch.nn.Module, native: str) -> Tensor:
    """The Parameter behind a key map's native name."""
    owner, _, leaf = native.rpartition(".")
    found = getattr(model.get_submodule(owner), leaf)
    value = found.value if isinstance(found, Storage) else found
    assert isinstance(value, Tensor)
    return value


def check_parity(folder: Path, reference: Any, tokens: Tensor, not_computed: str | None = None) -> None:
    """Logits, loss and the gradient of every parameter.

    not_computed: how the names begin of what the reference has and the native model doesn't load.
    """
    model = load(folder)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    expected = reference(input_ids=tokens).logits
    logits = model(tokens)
    assert_close(logits, expected, what="logits")
    expected_loss, loss = cross_entropy(expected, tokens), cross_entropy(logits, tokens)
    assert_close(loss, expected_loss, what="loss")

    expected_loss.backward()
    loss.backward()
    theirs = dict(reference.named_parameters())
    compared, biases = set(), 0
    for key in key_map_of(model).keys:
        compared.add(key.hub)
        ours = native_tensor(model, key.native)
        if key.hub.endswith(GRADIENT_FREE):
            biases += 1
            assert ours.any() and ours.grad is None, f"{key.native} takes part, without a gradient"
            continue
        gradient = theirs[key.hub].grad
        assert ours.grad is not None and gradient is not None, key.native
        assert_close(ours.grad, gradient, what=key.native)
    skipped = {name for name in theirs if not_computed is not None and name.startswith(not_computed)}
    assert bool(skipped) == (not_computed is not None)
    buffers = {name for name, _ in reference.named_buffers() if name.endswith(GRADIENT_FREE)}
    assert compared == (set(theirs) | buffers) - skipped, "every parameter of the reference is compared"
    sigmoid = [m for m in model.modules() if isinstance(m, Router) and hasattr(m, "e_score_correction_bias")]
    assert biases == len(sigmoid)


def bitsandbytes_round_trip(matrix: Tensor, storage: str, double_quant: bool) -> Tensor:
    import bitsandbytes.functional as bnb

    if storage == "int8":
        rows, scales, _ = bnb.int8_vectorwise_quant(matrix)
        return bnb.int8_vectorwise_dequant(rows, scales)
    packed, state = bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=double_quant, quant_type=storage)
    return bnb.dequantize_4bit(packed, state)


def check_quantised(folder: Path, reference: Any, storage: str, double_quant: bool) -> None:
    """The quantised model equals the reference with the weights that bitsandbytes gives back. Changes the reference."""
    model = load(folder, storage, double_quant=double_quant)
    parameters = dict(reference.named_parameters())
    quantised = 0
    with torch.no_grad():
        for key in key_map_of(model).keys:
            if key.spec is None or key.spec.kind == "none":
                continue
            quantised += 1
            stack = parameters[key.hub].data
            for matrix in stack if stack.dim() == 3 else [stack]:
                matrix.copy_(bitsandbytes_round_trip(matrix, storage, double_quant))
    assert quantised > 20
    tokens = random_tokens((2, 48))
    logits = reference(input_ids=tokens).logits
    assert_close(model(tokens), logits, what=storage)
    assert relative_error(load(folder)(tokens), logits) > 1e-3, "quantisation has an effect that the comparison sees"


def adapted(folder: Path, storage: str, groups: Sequence[str]) -> Any:
    """The model with random LoRA in some groups."""
    model = load(folder, storage)
    add_lora(model, AdapterSpec(tuple(groups), rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def check_packing(folder: Path, storage: str, lengths: list[int], groups: Sequence[str]) -> None:
    """Packed documents equal documents alone: hidden states, loss, and gradients of LoRA in `groups`."""
    tokens = random_tokens((sum(lengths),))
    packed, alone = adapted(folder, storage, groups), adapted(folder, storage, groups)
    hidden = packed.hidden(tokens, Documents.from_lengths(lengths))
    pieces = tokens.split(lengths)
    separate = torch.cat([alone.hidden(piece, Documents.from_lengths([len(piece)])) for piece in pieces])
    assert_close(hidden, separate, what="hidden states")
    last = torch.tensor(lengths).cumsum(0) - 1
    labels = tokens.roll(-1).index_fill(0, last, -100)  # the next token of the same document
    losses = [
        torch.nn.functional.cross_entropy(model.lm_head(states), labels, reduction="sum")
        for model, states in ((packed, hidden), (alone, separate))
    ]
    assert_close(losses[0], losses[1], what="loss")
    for loss in losses:
        loss.backward()
    for (name, ours), (_, theirs) in zip(trainable_parameters(packed), trainable_parameters(alone), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert_close(ours.grad, theirs.grad, what=name)
    together = packed.hidden(tokens, Documents.from_lengths([len(tokens)]))
    assert relative_error(together, hidden.detach()) > 1e-2, "crossing documents would be seen"


def check_recomputation(folder: Path, groups: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Activation checkpointing gives the same loss and gradients, bit for bit.

    Returns how often experts' products were computed, for one step without it and one with it.
    """
    model = adapted(folder, "nf4", groups)
    tokens = random_tokens((2, 40))
    calls: list[Tensor] = []
    forward = experts.forward

    def counted(*args: Any) -> Tensor:
        calls.append(forward(*args))
        return calls[-1]

    monkeypatch.setattr(experts, "forward", counted)

    def step(recompute: bool) -> tuple[Tensor, dict[str, Tensor], int]:
        calls.clear()
        model.zero_grad()
        model.activation_checkpointing = recompute
        loss = cross_entropy(model(tokens), tokens)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in trainable_parameters(model)}
        return loss, {name: grad.clone() for name, grad in gradients.items() if grad is not None}, len(calls)

    loss, kept, calls_kept = step(False)
    again, recomputed, calls_recomputed = step(True)
    assert torch.equal(loss, again)
    assert kept.keys() == recomputed.keys() == {name for name, _ in trainable_parameters(model)}
    for name, gradient in kept.items():
        assert gradient.any(), name
        assert torch.equal(gradient, recomputed[name]), name
    return calls_kept, calls_recomputed


def check_cast(folder: Path) -> None:
    """`bfloat16()` rounds everything of a float32 model but its routers."""
    model = load(folder, "nf4")
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    assert routers
    before = {name: [tensor.clone() for tensor in _tensors(router)] for name, router in routers.items()}
    model.bfloat16()
    for name, router in routers.items():
        for tensor, kept in zip(_tensors(router), before[name], strict=True):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, kept), name
    assert native_tensor(model, "model.norm.weight").dtype == torch.bfloat16
    assert native_tensor(model, "lm_head.weight").dtype == torch.bfloat16
    assert model(random_tokens((1, 20))).isfinite().all()


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def float32_names(folder: Path) -> set[str]:
    """What is float32 in a model that was loaded in bfloat16, by its name in a layer."""
    model = load(folder, dtype=torch.bfloat16)
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name.split(".", 3)[-1] for name, tensor in tensors if tensor.dtype == torch.float32}


def check_bfloat16(folder: Path, storage: str) -> None:
    """Most tokens' logits are close to those in float32. A few tokens choose other experts after rounding."""
    tokens = random_tokens((2, 48))
    expected = load(folder, storage)(tokens)
    logits = load(folder, storage, torch.bfloat16)(tokens)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    errors = (logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert 1e-4 < errors.median().item() < 0.1, errors.median()


def check_bfloat16_against_transformers(folder: Path, reference: Any) -> None:
    """In bfloat16 the model errs no more than transformers does, both held against transformers in float32.

    The reference must choose all experts and all keys, so that no choice depends on rounding. Changes the reference.
    """
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))  # the same weights on all three sides
    reference.save_pretrained(folder)
    rounded = type(reference).from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = random_tokens((2, 48))
    exact = reference(input_ids=tokens).logits
    sides = (load(folder, dtype=torch.bfloat16)(tokens), rounded(input_ids=tokens).logits)
    ours, theirs = (((x.float() - exact).norm(dim=-1) / exact.norm(dim=-1)).mean().item() for x in sides)
    assert 1e-4 < ours <= 1.05 * theirs, (ours, theirs)


def check_refused(config: dict[str, Any], message: str) -> None:
    """Reading the config.json is refused with a message, which is a regular expression here."""
    with pytest.raises(NibbleError, match=message):
        architecture_for(config, "where").parse_config(config, "where")
