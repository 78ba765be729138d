"""One case of `benchmarks.gpu`: the full-size model with random packed weights, and a few training steps.

`python -m benchmarks.gpu_case CASE_JSON` prints the measurement as its last line, JSON.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from models.decoder import CausalLM
from models.documents import Documents
from models.glm4_moe_lite import Glm4MoeLiteConfig, build
from models.load import allocate
from models.lora import AdapterSpec, add_lora, trainable_parameters
from models.router import SigmoidRouter
from parallel.device import peak_memory_bytes, reset_peak_memory, synchronise
from quant.storage import DenseStorage, Storage, StorageSpec
from train.batches import Batch
from train.loop import training_step
from train.optim import build_optimizer

from .gpu_checks import SMALL

FULL: dict[str, Any] = {"model_type": "glm4_moe_lite"}  # every size is GLM-4.7-Flash's own


@dataclass(frozen=True)
class Case:
    """What is built and trained. sequences × length tokens make one step; adapter_dtype is that of LoRA's A and B."""

    name: str
    storage: str
    targets: tuple[str, ...]
    rank: int = 32
    adapter_dtype: str = "float32"
    sequences: int = 2
    length: int = 2048
    warmup: int = 2
    steps: int = 5
    device: str = "cuda"
    tiny: bool = False

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Case:
        values = json.loads(text)
        return Case(**values | {"targets": tuple(values["targets"])})


@torch.no_grad()
def random_model(case: Case, device: torch.device) -> CausalLM:
    """The model made on the device itself: packed bytes at random, with scales that give weights of a usual size.

    Random codes spread as real ones do, so unpacking and multiplying cost what they cost with real weights; a random
    router spreads the tokens over the experts.
    """
    config = Glm4MoeLiteConfig.parse(SMALL if case.tiny else FULL, "benchmark")
    spec = StorageSpec(case.storage)  # type: ignore[arg-type]
    model = build(config, spec=spec, dtype=torch.bfloat16, device="meta")
    allocate(model, device)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, DenseStorage):
            module.value.normal_(0, 0.02)
        elif isinstance(module, Storage):
            _fill(module)
        elif isinstance(module, SigmoidRouter):
            module.e_score_correction_bias.zero_()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
    model.model.embed_tokens.weight.normal_(0, 0.02)
    return model.requires_grad_(False)


def _fill(storage: Storage) -> None:
    for name, tensor in storage.named_parameters():
        if name == "packed":
            for part in tensor:  # a row or an expert at a time: random_ needs no workspace then
                part.random_() if tensor.dtype == torch.uint8 else part.random_(-127, 128)
        elif tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        else:
            # With nested scales: map in [-1, 1] times 0.01, plus 0.05. int8: the row's largest value.
            tensor.fill_({"nested_absmax": 0.01, "nested_offset": 0.05, "scale": 0.06}.get(name, 0.05))


def batch(case: Case, vocabulary: int, step: int) -> Batch:
    """Packed sequences of random tokens, other ones in each step, each predicting its own next."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocabulary, (case.sequences * case.length,), generator=generator)
    labels = tokens.roll(-1)
    labels[case.length - 1 :: case.length] = -100
    documents = Documents.from_lengths([case.length] * case.sequences)
    return Batch(tokens, labels, documents, len(tokens), int((labels != -100).sum()))


def measure(case: Case) -> dict[str, Any]:
    device = torch.device(case.device)
    if device.type == "cuda":
        torch.cuda.init()
    model = random_model(case, device)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    add_lora(model, AdapterSpec(case.targets, case.rank, 16.0, dtype=getattr(torch, case.adapter_dtype)))
    model.activation_checkpointing = True
    model.train()
    named = trainable_parameters(model)
    optimizer = build_optimizer("adamw_8bit", named, 1e-4, (0.9, 0.999), 1e-8, 0.0)
    gc.collect()
    reset_peak_memory(device)
    seconds, losses = [], []
    for step in range(case.warmup + case.steps):
        given = batch(case, model.vocabulary, step)
        synchronise(device)
        start = time.perf_counter()
        done = training_step(model, named, optimizer, [given], step=step, max_grad_norm=1.0, device=device)
        synchronise(device)
        losses.append(done.loss)
        if step >= case.warmup:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {
        "case": case.name,
        "weights_bytes": weights,
        "trained": sum(parameter.numel() for _, parameter in named),
        "peak_bytes": peak_memory_bytes(device),
        "reserved_bytes": _reserved(device),
        "seconds_per_step": median,
        "slowest_step": max(seconds),
        "tokens_per_second": case.sequences * case.length / median,
        "losses": losses,
    }


def _reserved(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


if __name__ == "__main__":
    print(json.dumps(measure(Case.loads(sys.argv[1]))))
