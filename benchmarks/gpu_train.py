"""One full-size case of `benchmarks.gpu` in a process of its own: `python -m benchmarks.gpu_train REQUEST`.

The model is built on the meta device, given uninitialised tensors on the accelerator and filled there with random
bytes: nothing is downloaded or quantised, and memory and speed don't depend on the values.
The last line of standard output is the result as JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.gpu_cases import ALPHA, MODELS, RANK, Case
from benchmarks.measure import synchronise
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec
from models.blocks.documents import Documents
from models.blocks.router import Router
from models.checkpoint.keymap import key_map_of
from models.decoder import CausalLM
from models.load import allocate
from models.registry import ARCHITECTURES
from models.use_kernels import use_kernels
from parallel.device import choose_device, peak_memory_bytes
from quant.storage import Storage, StorageSpec
from train.demo.checkpoint import initial_value
from train.demo.models import demo_model
from train.loss import linear_cross_entropy
from train.optim import build_optimizer, clip_gradients, measure_gradients

Parameters = list[tuple[str, nn.Parameter]]


def build_random(case: Case, device: torch.device) -> CausalLM:
    """The model with random weights on `device`, frozen."""
    given = MODELS[case.model]
    architecture = ARCHITECTURES[given["model_type"]]
    config = architecture.parse_config(demo_model(given["model_type"]).config if case.tiny else given, "config.json")
    model = architecture.build(config, StorageSpec(case.storage), torch.bfloat16, "meta")  # type: ignore[arg-type]
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
            else:
                target.copy_(initial_value(model, key, 0.02, on_host))
    model.requires_grad_(False)
    return model.train()


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Values as large as those of weights with a standard deviation of about 0.02."""
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
        tensor.normal_(std=0.02, generator=generator)
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


def measure(case: Case) -> dict[str, Any]:
    device = choose_device(case.device)
    if case.memory_limit is not None and device.type == "cuda":
        total_memory = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.memory_limit * 2**30 / total_memory), device)
    use_kernels(device, case.kernels)
    start = time.perf_counter()
    model = build_random(case, device)
    model.activation_checkpointing = True
    add_lora(model, AdapterSpec(case.targets, RANK, ALPHA, dtype=getattr(torch, case.adapter_dtype)))
    named = trainable_parameters(model)
    optimizer = build_optimizer(case.optimizer, named, learning_rate=2e-4)
    synchronise(device)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    adapter = sum(parameter.numel() * parameter.element_size() for _, parameter in named)
    result: dict[str, Any] = {
        "weights": weights - adapter,
        "trainable": sum(parameter.numel() for _, parameter in named),
        "build_seconds": time.perf_counter() - start,
    }

    generator = torch.Generator(device).manual_seed(1)
    documents, total = Documents.from_lengths([case.length] * case.sequences, device), case.length * case.sequences

    def step() -> float:
        tokens = torch.randint(0, model.vocabulary, (total,), generator=generator, device=device)
        return train_step(model, named, optimizer, tokens, documents)

    seconds, losses = [], []
    for number in range(case.warmup + case.steps):
        synchronise(device)
        began = time.perf_counter()
        losses.append(step())
        synchronise(device)
        if number >= case.warmup:
            seconds.append(time.perf_counter() - began)
    result |= {
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": total / statistics.median(seconds),
        "peak": peak_memory_bytes(device),
        "reserved": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
        "in_use": _in_use(device),
        "busiest_expert": _busiest(model, step),
    }
    if case.profile:
        result["kernels"] = _kernels(device, step)
    return result


def _in_use(device: torch.device) -> int:
    """Bytes of the device that are taken, the CUDA context and other processes included."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


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
    print(json.dumps(measure(Case.loads(sys.argv[1]))))
