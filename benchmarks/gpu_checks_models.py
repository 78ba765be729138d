"""Tiny models of every architecture on a device against the CPU: loss and gradients, documents, balance."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_compare import BFLOAT16_MODEL, CPU, Check, Group, compare, compare_each_norm, random
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec, adaptable, groups_of
from models.blocks.balance import AuxiliaryLoss, Balance, BiasUpdate
from models.blocks.documents import Documents
from models.blocks.norm import ZeroCentredRMSNorm
from models.blocks.router import Router, SigmoidRouter
from models.checkpoint.keymap import Key, key_map_of
from models.decoder import CausalLM
from models.registry import ARCHITECTURES
from quant.storage import DenseStorage, Storage, StorageSpec
from train.loss import linear_cross_entropy

# Small, with the published models' head sizes (they decide which attention kernel runs) and more experts than are
# dense at a time on an accelerator.
_COMMON = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
}
_LATENT = {
    **_COMMON,
    "n_routed_experts": 24,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
}
TINY: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": _LATENT,
    "glm4_moe": {
        **_COMMON,
        "n_routed_experts": 24,
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    # Many heads: with few, scores of exactly zero are common, and which of equal ones topk takes is the device's own
    # choice. Fewer keys than the longest documents have.
    "glm_moe_dsa": {**_LATENT, "index_n_heads": 16, "index_head_dim": 128, "index_topk": 48},
    "afmoe": {
        **_COMMON,
        "num_experts": 24,
        "num_shared_experts": 1,
        "head_dim": 128,
        "num_dense_layers": 1,
        "global_attn_every_n_layers": 3,
        "sliding_window": 24,
        "mup_enabled": True,
        "route_scale": 2.8,
    },
    "qwen3_moe": {**_COMMON, "num_experts": 24, "head_dim": 128, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "qwen3_5_moe_text": {
        **_COMMON,
        "num_experts": 24,
        "shared_expert_intermediate_size": 64,
        "head_dim": 256,
        "full_attention_interval": 3,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        # The gated delta rule's output is normalised; where it is near zero, a small one would magnify round-off.
        "rms_norm_eps": 1e-2,
    },
}
NF4 = StorageSpec("nf4", True)
SPECS = (StorageSpec("none"), NF4, StorageSpec("int8"))
LENGTHS = (70, 5, 129)
PADDED, PADDING = (70, 5, 111, 18), 18


def groups() -> list[Group]:
    found: list[Group] = [
        ("bias update", functools.partial(balance, "glm4_moe_lite", BiasUpdate)),
        ("auxiliary loss", functools.partial(balance, "qwen3_5_moe_text", AuxiliaryLoss)),
    ]
    for model_type in TINY:
        for spec in SPECS:
            found.append((f"{model_type}, {spec.kind}", functools.partial(whole_model, model_type, spec)))
        found.append((f"{model_type}, documents", functools.partial(packed_documents, model_type)))
    return found


# ------------------------------------------------------------------------------------------------------------ a model


def tiny_model(
    model_type: str,
    spec: StorageSpec,
    dtype: torch.dtype,
    device: torch.device,
    *,
    adapter_dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> CausalLM:
    """Random weights, the same for every dtype and device; recomputing; LoRA on every group, with B not zero.

    changes: of config.json.
    """
    architecture = ARCHITECTURES[model_type]
    config = architecture.parse_config(TINY[model_type] | changes, "config.json")
    model = architecture.build(config, spec, dtype, CPU)
    model.requires_grad_(False)
    keys = key_map_of(model)
    for number, key in enumerate(keys.keys):
        owner, _, leaf = key.native.rpartition(".")
        target, value = getattr(model.get_submodule(owner), leaf), _value(model, key, 100 + number)
        if isinstance(target, Storage):
            target.load_dense(value)
        else:
            target.data.copy_(value)
    targets = tuple(groups_of(adaptable(keys)))
    add_lora(model, AdapterSpec(targets, rank=8, alpha=16, dtype=adapter_dtype))
    for number, (_, parameter) in enumerate(trainable_parameters(model)):
        if not parameter.any():
            parameter.data.copy_(random(tuple(parameter.shape), 1000 + number).mul_(0.05))
    model.activation_checkpointing = True
    return model.to(device).train()


def _value(model: CausalLM, key: Key, seed: int) -> Tensor:
    """Representable in bfloat16, so that a model in bfloat16 has the same weights."""
    owner, _, leaf = key.native.rpartition(".")
    noise = random(key.shape, seed)
    if leaf == "A_log":
        value = noise * 0.5 - 2
    elif len(key.shape) == 1:
        plain = leaf.endswith("bias") or isinstance(model.get_submodule(owner), ZeroCentredRMSNorm)
        value = noise * 0.1 + (0 if plain else 1)
    else:
        value = noise if key.group == "embedding" else noise * key.shape[-1] ** -0.5
    return value.bfloat16().float()


def everywhere(model_type: str) -> dict[str, Any]:
    """Changes of config.json after which rounding to bfloat16 has nothing to choose: between experts, or keys, that are
    nearly as good it would. Every token goes to all experts and sees all keys.
    """
    config = TINY[model_type]
    experts = next(config[key] for key in ("n_routed_experts", "num_experts") if key in config)
    return {"num_experts_per_tok": experts} | ({"index_topk": max(LENGTHS)} if "index_topk" in config else {})


def batch_loss(
    model: CausalLM, device: torch.device, seed: int = 60, lengths: tuple[int, ...] = LENGTHS, padding: int = 0
) -> Tensor:
    """The loss of packed documents of random tokens; nothing is learnt from padding."""
    total = sum(lengths)
    tokens = torch.randint(0, model.vocabulary, (total,), generator=torch.Generator().manual_seed(seed))
    labels = torch.cat((tokens[1:], tokens[:1]))
    labels[torch.tensor(lengths).cumsum(0) - 1] = -100
    labels[total - padding :] = -100
    labelled = int((labels != -100).sum())
    hidden = model.hidden(tokens.to(device), Documents.from_lengths(lengths, device, padding))
    head = model.head.weight
    assert isinstance(head, DenseStorage)
    return linear_cross_entropy(hidden, head.value, labels.to(device), labelled, labelled=labelled)


def gradients(model: CausalLM) -> list[Tensor]:
    return [parameter.grad for _, parameter in trainable_parameters(model) if parameter.grad is not None]


# ------------------------------------------------------------------------------------------------------------- checks


def whole_model(model_type: str, spec: StorageSpec, device: torch.device) -> Iterator[Check]:
    """In float32, with and without recomputation, and in bfloat16."""
    reference = tiny_model(model_type, spec, torch.float32, CPU)
    model = copy.deepcopy(reference).to(device)
    loss = batch_loss(reference, CPU)
    loss.backward()
    for recompute in (True, False) if spec == NF4 else (True,):
        model.activation_checkpointing = recompute
        model.zero_grad(set_to_none=True)
        actual = batch_loss(model, device)
        actual.backward()
        name = f"{model_type}, {spec.kind}, float32{'' if recompute else ', not recomputing'}"
        yield compare(f"{name}: loss", [(actual, loss)], 1e-5)
        pairs = list(zip(gradients(model), gradients(reference), strict=True))
        yield compare(f"{name}: gradients of LoRA", pairs, 1e-4)

    changes = everywhere(model_type)
    reference = tiny_model(model_type, spec, torch.float32, CPU, **changes)
    model = tiny_model(model_type, spec, torch.bfloat16, device, **changes)
    loss, actual = batch_loss(reference, CPU), batch_loss(model, device)
    loss.backward()
    actual.backward()
    name = f"{model_type}, {spec.kind}, bfloat16"
    yield compare(f"{name}: loss", [(actual, loss)], 5e-3)
    pairs = list(zip(gradients(model), gradients(reference), strict=True))
    yield compare_each_norm(f"{name}: gradients of LoRA", pairs, BFLOAT16_MODEL)


def packed_documents(model_type: str, device: torch.device) -> Iterator[Check]:
    """Documents packed together on the device against each alone on the CPU."""
    for dtype in (torch.float32, torch.bfloat16):
        changes = everywhere(model_type) if dtype == torch.bfloat16 else {}
        reference = tiny_model(model_type, NF4, torch.float32, CPU, **changes)
        model = tiny_model(model_type, NF4, dtype, device, **changes)
        generator = torch.Generator().manual_seed(61)
        tokens = torch.randint(0, model.vocabulary, (sum(LENGTHS),), generator=generator)
        with torch.no_grad():
            together = model.hidden(tokens.to(device), Documents.from_lengths(LENGTHS, device)).split(LENGTHS)
            alone = [reference.hidden(piece, Documents.from_lengths([len(piece)])) for piece in tokens.split(LENGTHS)]
        name = f"{model_type}, three documents packed against each alone"
        pairs = list(zip(together, alone, strict=True))
        if dtype == torch.float32:
            yield compare(f"{name}, float32", pairs, 1e-4)
        else:
            yield compare_each_norm(f"{name}, bfloat16", pairs, BFLOAT16_MODEL)


def balance(model_type: str, method: type[BiasUpdate | AuxiliaryLoss], device: torch.device) -> Iterator[Check]:
    """Two micro-batches with padding, recomputed: counts, what is logged, and what balancing changes."""
    name = {BiasUpdate: "bias update", AuxiliaryLoss: "auxiliary loss"}[method]
    expected, actual = (_balanced(model_type, method, on) for on in (CPU, device))
    differ = int((actual[0] != expected[0]).sum())
    total = int(expected[0].sum())
    yield Check(f"{name}: counts of {total:,} choices", f"{differ} of {expected[0].numel()} differ", differ == 0)
    yield compare(f"{name}: what is logged", list(zip(actual[1], expected[1], strict=True)), 1e-5)
    pairs = list(zip(actual[2], expected[2], strict=True))
    yield compare(f"{name}: routers' gradients and biases", pairs, 1e-4)


def _balanced(model_type: str, method: type[Balance], on: torch.device) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Counts int64 [L, E]; logged numbers; the routers' LoRA gradients and biases."""
    model = tiny_model(model_type, NF4, torch.float32, on)
    model.balance = method(model, 0.5)
    model.balance.begin_step()
    for seed in (62, 63):
        loss = batch_loss(model, on, seed, PADDED, PADDING)
        extra = model.balance.collect(0.5)
        (loss if extra is None else loss + extra).backward()
    logged = [torch.tensor(value) for value in model.balance.end_step().values()]
    routers = [module for module in model.modules() if isinstance(module, Router)]
    changed = [parameter.grad for router in routers for parameter in router.parameters() if parameter.grad is not None]
    biases = [router.e_score_correction_bias for router in routers if isinstance(router, SigmoidRouter)]
    assert changed, "routers have gradients"
    return model.balance.counts.cpu(), logged, [*changed, *biases]
