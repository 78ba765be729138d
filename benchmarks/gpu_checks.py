"""A device's paths against the CPU reference, on tiny models: `python -m benchmarks.gpu_checks DEVICE`.

One JSON line on standard output for each check, as soon as it is known.

Tolerances, relative to the largest expected value (or, where it says norm, in the 2-norm over everything):
float32 differs from the CPU by the order of summation; bfloat16 is held against float32 on the same weights, where
every operation may add half a unit of its last place, 2^-9.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from models.attention import causal_attention
from models.decoder import CausalLM
from models.documents import Documents
from models.experts import Experts
from models.glm4_moe_lite import Glm4MoeLiteConfig, build
from models.linear import LoRA
from models.lora import AdapterSpec, add_lora, trainable_parameters
from quant.errors import NibbleError
from quant.storage import DenseStorage, Storage, StorageSpec, new_storage
from train.loss import linear_cross_entropy
from train.optim import build_optimizer, clip_gradients

FLOAT32, BFLOAT16, BFLOAT16_MODEL = 2e-5, 2e-2, 5e-2
SPECS = (
    StorageSpec("nf4", True),
    StorageSpec("nf4", False),
    StorageSpec("fp4", True),
    StorageSpec("fp4", False),
    StorageSpec("int8"),
    StorageSpec("none"),
)
CPU = torch.device("cpu")

# Small, with GLM-4.7-Flash's head sizes (they decide which attention kernel runs) and more experts than are dense at
# a time on an accelerator.
TINY = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 24,
    "num_experts_per_tok": 3,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
}
LENGTHS = (37, 5, 86)


@dataclass(frozen=True)
class Check:
    """passed None: could not be tried here, `figure` says why."""

    name: str
    figure: str
    passed: bool | None


def checks(device: torch.device) -> Iterator[Check]:
    """All of them; one that raises is a failure, and the others go on."""
    groups: list[Callable[[torch.device], Iterator[Check]]] = [
        _storages, _quantising, _experts, _attention, _loss, _model, _optimisers,
    ]  # fmt: skip
    for group in groups:
        try:
            yield from group(device)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is this check's result)
            lines = str(error).strip().splitlines() or [""]
            yield Check(group.__name__.strip("_"), f"{type(error).__name__}: {lines[0]}", False)


def _compare(name: str, pairs: list[tuple[Tensor, Tensor]], tolerance: float) -> Check:
    """Pairs of a result and what it should be."""
    errors = []
    for actual, expected in pairs:
        assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
        actual, expected = actual.detach().to(CPU, torch.float64), expected.detach().to(CPU, torch.float64)
        scale = expected.abs().max().item()
        errors.append((actual - expected).abs().max().item() / scale if scale else float("inf"))
    worst = float("nan") if any(math.isnan(error) for error in errors) else max(errors)
    return Check(name, f"{worst:.1e} of {tolerance:.0e}", worst <= tolerance)


def _compare_norm(name: str, pairs: list[tuple[Tensor, Tensor]], tolerance: float) -> Check:
    actual, expected = (
        torch.cat([pair[side].detach().to(CPU).double().flatten() for pair in pairs]) for side in (0, 1)
    )
    error = ((actual - expected).norm() / expected.norm()).item()
    return Check(name, f"{error:.1e} of {tolerance:.0e} (norm)", error <= tolerance)


def _random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------------------------------------------------- storages


def _storages(device: torch.device) -> Iterator[Check]:
    for spec in SPECS:
        name = spec.kind + (" with double quantisation" if spec.double_quant else "")
        for dtype in (torch.float32, torch.bfloat16):
            differ = total = 0
            for shape in ((192, 256), (20, 96, 128), (3, 33, 64)):
                here = new_storage(spec, shape, dtype, CPU, "matrix")
                here.load_dense(_random(shape, 1).mul_(0.02))
                there = copy.deepcopy(here).to(device)
                asked: list[int | slice | None] = [None] if len(shape) == 2 else [None, 1, slice(1, 3)]
                for which in asked:
                    expected, actual = here.dense(which), there.dense(which).to(CPU)
                    differ += int((expected != actual).sum())
                    total += expected.numel()
            yield Check(f"dense() of {name}, {_short(dtype)}", f"{differ} of {total:,} values differ", differ == 0)


def _quantising(device: torch.device) -> Iterator[Check]:
    """The bytes made on the device may differ from the CPU's where a value lies on the edge between two codes."""
    for spec in SPECS[:-1]:
        name = spec.kind + (" with double quantisation" if spec.double_quant else "")
        matrix = _random((512, 512), 2, torch.bfloat16)
        here = new_storage(spec, (512, 512), torch.bfloat16, CPU, "matrix")
        there = new_storage(spec, (512, 512), torch.bfloat16, device, "matrix")
        here.load_dense(matrix)
        there.load_dense(matrix.to(device))
        packed = dict(here.named_parameters())["packed"]
        differ = int((packed != dict(there.named_parameters())["packed"].to(CPU)).sum())
        bound = packed.numel() // 1000
        yield Check(f"quantising to {name}", f"{differ} of {packed.numel():,} bytes differ", differ <= bound)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------ experts


def _experts(device: torch.device) -> Iterator[Check]:
    count, hidden, width, tokens, chosen = 24, 128, 64, 80, 3
    for spec in (SPECS[0], SPECS[4], SPECS[5]):
        reference = Experts(count, hidden, width, spec=spec, dtype=torch.float32, device=CPU, name="experts")
        _fill_block(reference, spec)
        x, upstream = _random((tokens, hidden), 3), _random((tokens, hidden), 4)
        scores = _random((tokens, count), 5)
        scores[:, 7] = -10.0  # no token chooses this one
        picked = scores.topk(chosen, dim=-1)
        weights = picked.values.softmax(-1)
        expected = _run_block(reference, x, picked.indices, weights, upstream)
        for dtype, tolerance in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
            block = Experts(count, hidden, width, spec=spec, dtype=dtype, device=CPU, name="experts")
            _fill_block(block, spec)
            block.to(device)
            actual = _run_block(
                block, x.to(device, dtype), picked.indices.to(device), weights.to(device), upstream.to(device, dtype)
            )
            name = f"experts forward and backward, {spec.kind}, {_short(dtype)}"
            yield _compare(name, list(zip(actual, expected, strict=True)), tolerance)


def _fill_block(block: Experts, spec: StorageSpec) -> None:
    for number, projection in enumerate((block.gate_up_proj, block.down_proj)):
        shape = projection.weight.shape
        projection.weight.load_dense(_random(shape, 10 + number).mul_(shape[-1] ** -0.5))
        projection.lora = LoRA(shape, 8, 16.0)
        with torch.no_grad():
            projection.lora.A.copy_(_random(tuple(projection.lora.A.shape), 20 + number).mul_(shape[-1] ** -0.5))
            projection.lora.B.copy_(_random(tuple(projection.lora.B.shape), 30 + number).mul_(0.1))
        if isinstance(projection.weight, DenseStorage):
            projection.weight.value.requires_grad_()


def _run_block(block: Experts, x: Tensor, chosen: Tensor, weights: Tensor, upstream: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = block(x, chosen, weights)
    y.backward(upstream)
    gradients = [tensor.grad for tensor in (x, weights, *block.parameters()) if tensor.requires_grad]
    return [y, *(gradient for gradient in gradients if gradient is not None)]


# ----------------------------------------------------------------------------------------------- attention and the loss


def _attention(device: torch.device) -> Iterator[Check]:
    """On CUDA the flash kernel for documents of any length; the reference goes document by document."""
    tokens = sum(LENGTHS)
    for width, value_width, heads, kv_heads in ((256, 256, 4, 4), (24, 32, 4, 4), (64, 64, 4, 2)):
        shapes = ((tokens, heads, width), (tokens, kv_heads, width), (tokens, kv_heads, value_width))
        inputs = [_random(shape, 40 + number) for number, shape in enumerate(shapes)]
        upstream = _random((tokens, heads, value_width), 44)

        def run(
            on: torch.device, dtype: torch.dtype, inputs: list[Tensor], upstream: Tensor, scale: float
        ) -> list[Tensor]:
            q, k, v = (x.to(on, dtype).requires_grad_() for x in inputs)
            out = causal_attention(q, k, v, Documents.from_lengths(LENGTHS, on), scale)
            out.backward(upstream.to(on, dtype))
            return [out, *(x.grad for x in (q, k, v) if x.grad is not None)]

        for dtype, tolerance in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
            rounded = [x.to(dtype).float() for x in inputs]
            expected = run(CPU, torch.float32, rounded, upstream.to(dtype).float(), width**-0.5)
            actual = run(device, dtype, inputs, upstream, width**-0.5)
            name = f"attention in documents, heads {heads}/{kv_heads} of {width}/{value_width}, {_short(dtype)}"
            yield _compare(name, list(zip(actual, expected, strict=True)), tolerance)


def _loss(device: torch.device) -> Iterator[Check]:
    tokens, hidden, vocabulary = 200, 128, 1000
    labels = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(50))
    labels[::3] = -100
    labelled = int((labels != -100).sum())
    x, head = _random((tokens, hidden), 51), _random((vocabulary, hidden), 52).mul_(0.1)

    def run(on: torch.device, dtype: torch.dtype) -> list[Tensor]:
        h, w = x.to(dtype).to(on).requires_grad_(), head.to(dtype).to(on).requires_grad_()
        if on == CPU:
            h, w = (t.detach().float().requires_grad_() for t in (h, w))
        loss = linear_cross_entropy(h, w, labels.to(on), labelled, labelled=labelled, chunk_bytes=1 << 17)
        loss.backward()
        assert h.grad is not None and w.grad is not None
        return [loss, h.grad, w.grad]

    for dtype, tolerance in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
        yield _compare(
            f"loss in chunks, {_short(dtype)}", list(zip(run(device, dtype), run(CPU, dtype), strict=True)), tolerance
        )


# ------------------------------------------------------------------------------------------------------ the whole model


def tiny_model(
    dtype: torch.dtype, device: torch.device, adapter_dtype: torch.dtype = torch.float32, **changes: int
) -> CausalLM:
    """Random weights in nf4 with double quantisation, the same for every dtype and device; LoRA with B not zero."""
    config = Glm4MoeLiteConfig.parse(TINY | changes, "config.json")
    model = build(config, spec=SPECS[0], dtype=dtype, device=CPU)
    model.requires_grad_(False)
    seed = 100
    for name, module in model.named_modules():
        seed += 1
        if isinstance(module, Storage):
            module.load_dense(_random(module.shape, seed).mul_(module.shape[-1] ** -0.5))
        elif name.endswith("norm"):
            module.weight.data.copy_(1 + 0.1 * _random(tuple(module.weight.shape), seed))
    model.model.embed_tokens.weight.data.copy_(_random(tuple(model.model.embed_tokens.weight.shape), 99))
    add_lora(model, AdapterSpec(("attention", "experts"), rank=8, alpha=16, dtype=adapter_dtype))
    for _, parameter in trainable_parameters(model):
        seed += 1
        if not parameter.any():
            parameter.data.copy_(_random(tuple(parameter.shape), seed).mul_(0.05))
    return model.to(device).train()


def _step(model: CausalLM, device: torch.device, seed: int = 60) -> Tensor:
    """The loss of three packed documents, after backward."""
    total = sum(LENGTHS)
    tokens = torch.randint(0, model.vocabulary, (total,), generator=torch.Generator().manual_seed(seed))
    labels = torch.cat((tokens[1:], tokens[:1]))
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    labels[ends] = -100
    labelled = total - len(LENGTHS)
    hidden = model.hidden(tokens.to(device), Documents.from_lengths(LENGTHS, device))
    head = model.head.weight
    assert isinstance(head, DenseStorage)
    loss = linear_cross_entropy(hidden, head.value, labels.to(device), labelled, labelled=labelled)
    loss.backward()
    return loss


def _gradients(model: CausalLM) -> list[Tensor]:
    return [parameter.grad for _, parameter in trainable_parameters(model) if parameter.grad is not None]


def _model(device: torch.device) -> Iterator[Check]:
    reference = tiny_model(torch.float32, CPU)
    loss = _step(reference, CPU)
    for recompute in (False, True):
        model = tiny_model(torch.float32, device)
        model.activation_checkpointing = recompute
        actual = _step(model, device)
        name = f"model, float32{', recomputing' if recompute else ''}"
        yield _compare(f"{name}: loss", [(actual, loss)], 1e-5)
        gradients = list(zip(_gradients(model), _gradients(reference), strict=True))
        yield _compare(f"{name}: gradients of LoRA", gradients, 1e-4)
    # Between experts that are nearly as good, rounding would choose: here every token goes to all of them.
    everywhere = TINY["n_routed_experts"]
    reference = tiny_model(torch.float32, CPU, num_experts_per_tok=everywhere)
    model = tiny_model(torch.bfloat16, device, num_experts_per_tok=everywhere)
    model.activation_checkpointing = True
    loss, actual = _step(reference, CPU), _step(model, device)
    yield _compare("model, bfloat16, recomputing: loss", [(actual, loss)], 5e-3)
    gradients = list(zip(_gradients(model), _gradients(reference), strict=True))
    yield _compare_norm("model, bfloat16, recomputing: gradients of LoRA", gradients, BFLOAT16_MODEL)


def _optimisers(device: torch.device) -> Iterator[Check]:
    """Three steps of each; how far the weights moved, against float32 AdamW on the CPU."""
    expected = _trained("adamw", CPU)
    for name, tolerance in (("adamw", 2e-2), ("adamw_8bit", 0.1), ("paged_adamw", 2e-2), ("paged_adamw_8bit", 0.1)):
        label = f"three steps of {name}"
        try:
            actual = _trained(name, device)
        except NibbleError as error:
            yield Check(label, str(error).splitlines()[0], None)
            continue
        yield _compare_norm(label, list(zip(actual, expected, strict=True)), tolerance)
    moved = _trained("adamw_8bit", device, torch.bfloat16)
    finite = all(bool(tensor.isfinite().all()) and bool(tensor.any()) for tensor in moved)
    yield Check("three steps of adamw_8bit on bfloat16 LoRA", "all finite, all moved" if finite else "not", finite)


def _trained(optimizer_name: str, device: torch.device, adapter_dtype: torch.dtype = torch.float32) -> list[Tensor]:
    model = tiny_model(torch.float32 if adapter_dtype == torch.float32 else torch.bfloat16, device, adapter_dtype)
    model.activation_checkpointing = True
    named = trainable_parameters(model)
    before = [parameter.detach().clone() for _, parameter in named]
    optimizer = build_optimizer(optimizer_name, named, learning_rate=1e-3)
    for number in range(3):
        _step(model, device, seed=60 + number)
        clip_gradients(named, 1.0, number)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return [parameter.detach() - then for (_, parameter), then in zip(named, before, strict=True)]


def main(device_name: str) -> None:
    for check in checks(torch.device(device_name)):
        print(json.dumps(asdict(check)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
