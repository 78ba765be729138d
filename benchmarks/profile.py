"""Where the time of a native training step goes, by phase, by part of the model and by kind of operation."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from benchmarks.documents import one_document
from benchmarks.measure import CPU, batch
from benchmarks.setting import MAX_GRAD_NORM, Request
from models.attention.mla import LatentAttention
from models.blocks.linear import ExpertWeights, Linear
from models.blocks.mlp import SwiGLU
from models.blocks.router import SigmoidRouter
from models.decoder import CausalLM
from models.experts.block import Experts
from parallel.shards import Shards
from quant.products import product_dtype
from quant.storage import DenseStorage
from train.loop import training_step
from train.loss import linear_cross_entropy
from train.optim import clip_gradients

# What an operation is, by the first of these words that its name contains.
KINDS = (
    ("products", ("::mm", "::addmm", "::bmm", "::_grouped_mm", "::linear", "::matmul", "mkldnn")),
    ("attention", ("attention", "flash")),
    ("copies and casts", ("copy_", "::to", "_to_copy", "::cat", "::contiguous", "::clone")),
    ("gather and scatter", ("index", "gather", "scatter", "embedding", "sort", "topk")),
    ("optimiser", ("adam",)),
    ("own functions: dequantisation and Python", ("Backward", "Remember", "Compute", "LoRALinear", "LinearCross")),
)  # fmt: skip


def profile_step(shards: Shards, optimizer: Optimizer, request: Request) -> dict[str, Any]:
    """Milliseconds: {"phases": …, "parts": …, "operations": …}. Trains the model by a few steps."""
    model = shards.model

    def tokens(step: int) -> Tensor:
        return batch(request, model.vocabulary, 1000 + step)

    phases: dict[str, list[float]] = defaultdict(list)
    for number in range(3):
        for name, seconds in _phases(shards, optimizer, tokens(number)):
            phases[name].append(1e3 * seconds)
    return {
        "phases": {name: sorted(values)[len(values) // 2] for name, values in phases.items()},
        "parts": _parts(model, request),
        "operations": _operations(shards, optimizer, tokens(3)),
    }


def _phases(shards: Shards, optimizer: Optimizer, tokens: Tensor) -> Iterable[tuple[str, float]]:
    """One training step taken apart."""
    model = shards.model
    given, head = one_document(tokens), model.head.weight
    assert isinstance(head, DenseStorage)
    clock = time.perf_counter
    start = clock()
    hidden = model.hidden(given.tokens, given.documents)
    yield "forward", clock() - start
    start = clock()
    loss = linear_cross_entropy(hidden, head.value, given.labels, given.labelled, labelled=given.labelled)
    yield "head and loss, with their gradients", clock() - start
    start = clock()
    loss.backward()
    yield "recomputation and backward", clock() - start
    start = clock()
    clip_gradients(shards.parameters, MAX_GRAD_NORM, 0)
    yield "gradient norm and clipping", clock() - start
    start = clock()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    yield "optimiser", clock() - start


@dataclass
class _Part:
    forward: float = 0.0
    backward: float = 0.0
    recomputed: bool = True

    @property
    def step(self) -> float:
        return self.forward * (2 if self.recomputed else 1) + self.backward


def _parts(model: CausalLM, request: Request) -> dict[str, dict[str, float]]:
    """Every kind of part alone, on random inputs of the step's size, summed over the layers.

    "step" is what it takes in a step: forward twice where the layer is recomputed, which stops before the experts.
    """
    generator = torch.Generator().manual_seed(request.seed)
    documents = one_document(batch(request, model.vocabulary, 0)).documents
    tables = model.model.rope.tables(documents.positions)
    parts: dict[str, _Part] = defaultdict(_Part)

    def add(name: str, run: Callable[[Tensor], Tensor], recomputed: bool = True) -> None:
        x = torch.randn(request.tokens, model.config.hidden, generator=generator).to(model.dtype).requires_grad_()
        times = sorted(_both(run, x) for _ in range(3))
        part = parts[name]
        part.forward, part.backward = part.forward + times[1][0], part.backward + times[1][1]
        part.recomputed = recomputed

    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, LatentAttention):
                add("attention", lambda x, module=module: module(x, documents, tables))  # type: ignore[misc]
            elif isinstance(module, SigmoidRouter):
                add("router", lambda x, module=module: module(x)[1])  # type: ignore[misc]
            elif isinstance(module, SwiGLU):
                dense = module is layer.mlp
                add("dense MLP" if dense else "shared experts", module)
            elif isinstance(module, Experts):
                gate = next(part for part in layer.modules() if isinstance(part, SigmoidRouter))

                def experts(x: Tensor, module: Experts = module, gate: SigmoidRouter = gate) -> Tensor:
                    with torch.no_grad():
                        chosen, weights = gate(x)
                    return module(x, chosen, weights.requires_grad_())

                add("routed experts", experts, recomputed=False)
    model.zero_grad(set_to_none=True)
    found = {
        name: {"forward": 1e3 * part.forward, "backward": 1e3 * part.backward, "step": 1e3 * part.step}
        for name, part in parts.items()
    }
    return found | {"dequantisation, in the above": _dequantisation(model)}


def _both(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    y = run(x)
    middle = time.perf_counter()
    y.backward(torch.ones_like(y))
    return middle - start, time.perf_counter() - middle


def _dequantisation(model: CausalLM) -> dict[str, float]:
    """Making every quantised weight dense once, in the pieces in which the layers do it."""
    dtype = product_dtype(CPU, model.dtype)
    total = {"forward": 0.0, "backward": 0.0, "step": 0.0}
    for module in model.modules():
        if isinstance(module, Linear | ExpertWeights) and not isinstance(module.weight, DenseStorage):
            stacked = len(module.weight.shape) == 3
            best = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                if stacked:
                    out = torch.empty(1, *module.weight.shape[1:], dtype=dtype)
                    for expert in range(module.weight.shape[0]):
                        module.weight.dense(slice(expert, expert + 1), dtype=dtype, out=out)
                else:
                    module.weight.dense(dtype=dtype)
                best = min(best, time.perf_counter() - start)
            total["forward"] += 1e3 * best
            total["backward"] += 1e3 * best
            total["step"] += 1e3 * best * (2 if stacked else 3)
    return total


def _operations(shards: Shards, optimizer: Optimizer, tokens: Tensor) -> dict[str, float]:
    """Self time by kind of operation in one step, the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        training_step(shards, optimizer, [one_document(tokens)], step=0, max_grad_norm=MAX_GRAD_NORM, device=CPU)
    kinds: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        kinds[_kind(event.key)] += event.self_cpu_time_total / 1e3
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def _kind(name: str) -> str:
    for kind, words in KINDS:
        if any(word in name for word in words):
            return kind
    return "other element by element"
