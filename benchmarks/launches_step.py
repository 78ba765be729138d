"""One training step of a full-size model on meta tensors: `benchmarks.launches` counts what it would launch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_train import loss_of
from benchmarks.launches_cases import LaunchCase
from benchmarks.launches_cut import cut, make_tables
from benchmarks.operations import ALL_KINDS, Recorder, Total, kind_of
from models.adapters.lora import add_lora
from models.adapters.targets import AdapterSpec
from models.blocks.documents import Documents
from models.blocks.recomputed import kept
from models.decoder import CausalLM
from models.experts.block import Experts, LocalExperts
from models.registry import ARCHITECTURES
from parallel.shards import Shards, local_tensor
from quant.fourbit import code, dynamic_map
from quant.kernels.choice import KERNELS, using
from quant.storage import StorageSpec
from train.optim import build_optimizer

META = torch.device("meta")
UPDATE = "update"  # a place of the recorder


@dataclass
class Step:
    """What a step launches.

    layers: launches of each layer, forward, recomputation and backward together. moe: which layers have routed experts.
    rest: launches outside layers (embedding, rotary tables, final norm, head and loss). kinds: of the whole step, by
    kind of operation; moe_kinds: of the layers with experts. operators: of the whole step, by name of the operator.
    update: launches of the optimiser, which is in none of these. waits: how often a layer asks the device for a value.
    weights, trained: bytes of the frozen tensors, number of trained values. peak: bytes, the update included.
    """

    layers: list[int]
    moe: list[int]
    rest: int
    kinds: dict[str, Total]
    moe_kinds: dict[str, Total]
    operators: dict[str, Total]
    update: int
    waits: int
    weights: int
    trained: int
    peak: int
    cpu_seconds: float

    @property
    def total(self) -> Total:
        total = Total()
        for kind in self.kinds.values():
            total.add(kind)
        return total

    @property
    def per_moe_layer(self) -> float:
        """The mean over the layers with experts."""
        return sum(self.layers[index] for index in self.moe) / max(len(self.moe), 1)


def build(case: LaunchCase) -> CausalLM:
    """The model with its adapters, on the meta device."""
    architecture = ARCHITECTURES[case.config["model_type"]]
    config = architecture.parse_config(case.config, "config.json")
    model = architecture.build(config, StorageSpec(case.storage), torch.bfloat16, META)  # type: ignore[arg-type]
    model.requires_grad_(False)
    model.train()
    model.activation_checkpointing = True
    add_lora(model, AdapterSpec(case.targets, case.rank, case.rank, dtype=getattr(torch, case.adapter_dtype)))
    return model


class EqualShares:
    """An `Experts.exchange` of one process that says how many rows each expert has, equally many: on the meta device
    there are no values to count. waits: how often it was asked, where a run waits for the device (`Routing.on_host`).
    """

    def __init__(self, experts: int) -> None:
        self.experts, self.waits = experts, 0

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, compute: LocalExperts) -> Tensor:
        return compute(x, chosen, weights, kept(lambda: self._rows(chosen.numel())))

    def _rows(self, choices: int) -> tuple[int, ...]:
        self.waits += 1
        each, rest = divmod(choices, self.experts)
        return tuple(each + (index < rest) for index in range(self.experts))


def supply_rows(model: CausalLM) -> list[EqualShares]:
    """Of every layer with experts, in their order, but those that hear of their rows from an exchange."""
    shares = []
    for module in model.modules():
        if isinstance(module, Experts) and module.exchange is None:
            shares.append(EqualShares(module.experts))
            module.exchange = shares[-1]
    return shares


def measure(case: LaunchCase) -> Step:
    """One step with recomputation, without clipping; weights, adapters and optimiser states are there."""
    with using(KERNELS if case.kernels == "triton" else ()):
        return _measure(case)


def _measure(case: LaunchCase) -> Step:
    began = time.process_time()
    model = build(case)
    make_tables(model, META)
    with cut(model, case.processes, case.expert) if case.processes > 1 else nullcontext(Shards(model)) as shards:
        step = _count(case, shards)
    step.cpu_seconds = time.process_time() - began
    return step


def _count(case: LaunchCase, shards: Shards) -> Step:
    model, named = shards.model, shards.parameters
    # bitsandbytes reads its tables when an optimiser is made. Its update is that of one process, of smaller tensors.
    optimizer = build_optimizer(case.optimizer, named, learning_rate=2e-4) if case.processes == 1 else None
    parts = {name: local_tensor(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    device = next(iter(parts.values())).device
    if case.storage == "nf4":
        code(case.storage, device), dynamic_map(device)  # made once in a process: no part of a step
    # With our own kernels nobody asks for the rows; if anybody did, the meta device would raise.
    if case.kernels == "torch":
        supply_rows(model)

    recorder = Recorder()
    recorder.follow(parts.values())
    if optimizer is not None:
        states = [value for state in optimizer.state.values() for value in state.values()]
        recorder.follow(value for value in states if isinstance(value, Tensor))
    documents = Documents.from_lengths([case.length] * case.sequences, device)
    tokens = torch.empty(case.length * case.sequences, dtype=torch.int64, device=device)
    recorder.follow((documents.offsets, documents.positions, tokens))
    with _by_layer(model, recorder), recorder:
        loss = loss_of(model, tokens, documents)
        loss.backward()
        shards.take_gradients()
    del loss
    recorder.place = UPDATE
    if optimizer is not None:
        with recorder:
            optimizer.step()

    layers = list(model.model.layers)
    moe = [i for i, layer in enumerate(layers) if any(isinstance(module, Experts) for module in layer.modules())]
    kinds, moe_kinds = ({kind: Total() for kind in ALL_KINDS} for _ in range(2))
    counts, rest, update = [0] * len(layers), 0, 0
    operators: defaultdict[str, Total] = defaultdict(Total)
    for (place, name), total in recorder.totals.items():
        if place == UPDATE:
            update += total.launches
            continue
        kinds[kind_of(name)].add(total)
        operators[name].add(total)
        if place is None:
            rest += total.launches
            continue
        counts[place] += total.launches
        if place in moe:
            moe_kinds[kind_of(name)].add(total)
    return Step(
        counts, moe, rest, kinds, moe_kinds, dict(sorted(operators.items(), key=lambda item: -item[1].launches)),
        update=update,
        waits=sum(getattr(module.exchange, "waits", 0) for module in model.modules() if isinstance(module, Experts)),
        weights=sum(t.numel() * t.element_size() for name, t in parts.items() if name not in dict(named)),
        trained=sum(parameter.numel() for _, parameter in named),
        peak=recorder.peak,
        cpu_seconds=0.0,
    )  # fmt: skip


@contextmanager
def _by_layer(model: CausalLM, recorder: Recorder) -> Iterator[None]:
    """Tells the recorder which layer computes: forward from its call to its return, backward from the gradient of its
    output to that of the output of the layer before. A layer that is computed again is called within its backward pass.
    """
    hooks = []
    for index, layer in enumerate(model.model.layers):
        callers: list[Any] = []  # what computed when the layer was called: itself in a recomputation

        def enter(module: nn.Module, inputs: Any, index: int = index, callers: list[Any] = callers) -> None:
            callers.append(recorder.place)
            recorder.place = index

        def leave(
            module: nn.Module, inputs: Any, output: Any, index: int = index, callers: list[Any] = callers
        ) -> None:
            def begin_backward(gradient: Tensor) -> None:
                recorder.place = index

            recorder.place = callers.pop()
            for value in output if isinstance(output, tuple) else (output,):
                if recorder.place is None and isinstance(value, Tensor) and value.requires_grad:
                    value.register_hook(begin_backward)

        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
