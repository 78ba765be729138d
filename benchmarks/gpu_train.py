"""Cases of `benchmarks.gpu` on one model, in a process of their own: `python -m benchmarks.gpu_train REQUEST`.

The model is built on the meta device, given uninitialised tensors on the accelerator and filled there with random
values: nothing is downloaded or quantised, and memory and speed don't depend on the values. Each case puts its LoRA on
and takes it off again.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.gpu_cases import ALPHA, Case, Request, config_of
from benchmarks.gpu_steps import Result, Step, answer, begin, learning_tensors, run_steps
from benchmarks.measure import synchronise
from models.adapters.lora import attach_lora, trainable_parameters
from models.adapters.targets import AdapterSpec, resolve
from models.blocks.documents import Documents
from models.blocks.linear import ExpertWeights, Linear
from models.blocks.router import Router
from models.checkpoint.keymap import key_map_of
from models.decoder import CausalLM
from models.load import allocate
from models.registry import ARCHITECTURES
from models.use_kernels import use_kernels
from quant.choices import named_dtype
from quant.storage import Storage, StorageSpec
from train.demo.checkpoint import initial_value
from train.loss import linear_cross_entropy
from train.optim import build_optimizer, clip_gradients, measure_gradients
from train.output.parameter_table import parameter_table

Parameters = list[tuple[str, nn.Parameter]]
SPREAD = 0.02  # of random matrices


def build_random(request: Request, device: torch.device) -> CausalLM:
    """The group's model with random weights on `device`, frozen."""
    config = config_of(request.group.model, request.tiny)
    architecture = ARCHITECTURES[config["model_type"]]
    spec = StorageSpec(request.group.storage)  # type: ignore[arg-type]
    model = architecture.build(architecture.parse_config(config, "config.json"), spec, torch.bfloat16, "meta")
    allocate(model, device)
    generator = torch.Generator(device).manual_seed(0)
    on_host = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key in key_map_of(model).keys:
            owner, _, leaf = key.native.rpartition(".")
            target = getattr(model.get_submodule(owner), leaf)
            if isinstance(target, Storage):
                for name, tensor in target.named_parameters():
                    _fill(name, tensor, generator)
            elif key.group == "embedding":
                # Much larger than what a layer adds: tokens stay distinct through all layers, and so do their routes.
                target.normal_(generator=generator)
            elif math.prod(key.shape) > 2**20:  # the head: as below, without the CPU's seconds
                target.normal_(std=SPREAD, generator=generator)
            else:
                target.copy_(initial_value(model, key, SPREAD, on_host))
    model.requires_grad_(False)
    return model.train()


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Values as large as those of weights with a standard deviation of about SPREAD."""
    if name == "packed":
        low, high = (0, 256) if tensor.dtype == torch.uint8 else (-127, 128)
        tensor.random_(low, high, generator=generator)
    elif tensor.dtype == torch.uint8:  # doubly quantised scales: a signed number …
        tensor.random_(0, 256, generator=generator)
    elif name == "nested_absmax":  # … times this …
        tensor.fill_(0.01)
    elif name == "nested_offset":  # … plus this
        tensor.fill_(0.04)
    elif name == "value":
        tensor.normal_(std=SPREAD, generator=generator)
    else:  # absmax of a block, or the scale of a row
        tensor.uniform_(0.03, 0.05, generator=generator)


def loss_of(model: CausalLM, tokens: Tensor, documents: Documents) -> Tensor:
    """The mean loss of all tokens that another one of their document follows."""
    ends = documents.offsets[1:].long() - 1
    labels = torch.roll(tokens, -1)
    labels[ends] = -100
    labelled = len(tokens) - len(documents.lengths)

    def cross_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, labelled, labelled=labelled)

    return model.head.reduce(model.hidden(tokens, documents), cross_entropy)


def train_step(model: CausalLM, named: Parameters, optimizer: Optimizer, tokens: Tensor, documents: Documents) -> float:
    """One optimiser step, as a run makes it (train/loop.py, which needs the packages of a run)."""
    loss = loss_of(model, tokens, documents)
    loss.backward()
    measured = measure_gradients(named, loss.detach())
    clip_gradients(named, 1.0, 0, measured=measured)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return measured.loss


def run(request: Request) -> None:
    """Prints what each case found."""
    device = begin(request)
    start = time.perf_counter()
    model = build_random(request, device)
    model.activation_checkpointing = True
    synchronise(device)
    of_model = {
        "weights": sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())),
        "parameters": parameter_table(model)[-1].parameters,
        "build_seconds": time.perf_counter() - start,
    }
    print(json.dumps({"built": of_model}), flush=True)
    answer(request.group.cases, device, lambda case: of_model | measure(model, request, case, device))


def measure(model: CausalLM, request: Request, case: Case, device: torch.device) -> Result:
    """Trains a LoRA on `model`, which afterwards has none."""
    use_kernels(device, case.kernels, first=case == request.group.cases[0])
    try:
        put_lora(model, case)
        named = trainable_parameters(model)
        optimizer = build_optimizer("adamw_8bit", named, learning_rate=2e-4)
        documents = Documents.from_lengths([case.length] * case.sequences, device)
        notes = list[str]()
        replayed = replayed_step(model, optimizer, case, device, notes) if case.graph else None

        def step(tokens: Tensor) -> float:
            if replayed is not None:
                return replayed(tokens)
            return train_step(model, named, optimizer, tokens.flatten(), documents)

        result, one = run_steps(device, request, case, model.vocabulary, step, optimizer)
        replayed = None  # a replay calls no module
        result["busiest_expert"] = _busiest(model, lambda: result.update(learning=learning_tensors(optimizer, one)))
        if notes:
            result["graph"] = "; ".join(notes)
        if request.profile:
            result["kernels"] = _kernels(device, one)
        return result
    finally:
        for module in model.modules():
            if isinstance(module, Linear | ExpertWeights):
                module.lora = None


def replayed_step(model: CausalLM, optimizer: Optimizer, case: Case, device: torch.device, notes: list[str]) -> Step:
    """A run's own step, whose passes are replayed where the device is CUDA. notes: gets what it says of that."""
    from parallel.shards import Shards
    from train.data.batches import make_batch
    from train.graph import PassGraph
    from train.loop import training_step

    shards, graph = Shards(model), None
    if device.type == "cuda":
        size = case.sequences * case.length
        graph = PassGraph(shards, device, tokens=size, longest=case.length, note=notes.append)

    def step(tokens: Tensor) -> float:
        rows = [(row, [True] * len(row)) for row in tokens.tolist()]
        batch = make_batch(rows, range(len(rows)))
        return training_step(shards, optimizer, [batch], step=0, max_grad_norm=1.0, device=device, graph=graph).loss

    return step


def put_lora(model: CausalLM, case: Case) -> None:
    """LoRA as `add_lora` gives it, drawn on the model's device, which takes no time."""
    spec = AdapterSpec(case.targets, case.rank, ALPHA, dtype=getattr(torch, case.adapter_dtype))
    targets = resolve(key_map_of(model), spec, model.model_type)
    with torch.no_grad():
        for lora in attach_lora(model, targets, spec.rslora, named_dtype(spec.dtype)):
            lora.A.uniform_(-(bound := lora.A.shape[-1] ** -0.5), bound)
            lora.B.zero_()


def _busiest(model: CausalLM, step: Any) -> float:
    """Rows of the busiest expert of any layer in a step, as a multiple of the mean."""
    shares: list[float] = []

    def look(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        assert isinstance(module, Router)
        rows = torch.bincount(output[0].flatten(), minlength=module.out_features)
        shares.append((rows.max() / rows.float().mean()).item())

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, Router)]
    step()
    for hook in hooks:
        hook.remove()
    return max(shares)


def _kernels(device: torch.device, step: Any) -> list[tuple[str, float, int]]:
    """Name, milliseconds and calls of the kernels that one step spends most time in."""
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        step()
        synchronise(device)
    field = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = [(event.key, getattr(event, field) / 1e3, event.count) for event in recorded.key_averages()]
    return sorted(events, key=lambda event: -event[1])[:25]


if __name__ == "__main__":
    run(Request.loads(sys.argv[1]))
