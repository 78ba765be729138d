"""The native side of `benchmarks.step`: loads the checkpoint as a run does and trains on it with the run's own step.

The last line of standard output is the result as JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import Tensor

from benchmarks.documents import one_document
from benchmarks.measure import CPU, Measured, begin, loaded, note_trained, run_steps
from benchmarks.profile import profile_step
from benchmarks.setting import ALPHA, EXPERTS, LEARNING_RATE, MAX_GRAD_NORM, RANK, SETTINGS, Request
from models.adapters.lora import add_lora
from models.adapters.targets import AdapterSpec
from models.load import load_model
from parallel.shards import Shards
from quant.fourbit import import_bitsandbytes
from quant.products import product_dtype
from train.loop import training_step
from train.optim import build_optimizer
from train.output.parameter_table import parameter_table


def measure(request: Request) -> Measured:
    library = import_bitsandbytes()  # here, so that it counts among the imports as it does on the peer's side
    measured = begin("nibble", request)
    measured.versions["bitsandbytes"] = library.__version__
    start = time.perf_counter()
    dtype = getattr(torch, request.dtype)
    model = load_model(request.checkpoint, storage="nf4", dtype=dtype)
    model.activation_checkpointing = True
    add_lora(model, AdapterSpec((*SETTINGS[request.arch].attention, *EXPERTS), RANK, ALPHA), seed=request.seed)
    model.train()
    shards = Shards(model)
    named = shards.parameters
    optimizer = build_optimizer("adamw", named, LEARNING_RATE)
    loaded(measured, start)

    def step(tokens: Tensor) -> tuple[float, float]:
        done = training_step(shards, optimizer, [one_document(tokens)], step=0, max_grad_norm=MAX_GRAD_NORM, device=CPU)
        return done.loss, done.grad_norm

    before = [parameter.detach().clone() for _, parameter in named]
    run_steps(measured, request, model.vocabulary, step)
    note_trained(measured, [parameter for _, parameter in named], before)
    total = parameter_table(model)[-1]
    measured.parameters, measured.frozen_bytes = total.parameters, total.nbytes
    measured.notes["products"] = str(product_dtype(CPU, dtype)).removeprefix("torch.")
    if request.profile:
        measured.notes["profile"] = profile_step(shards, optimizer, request)
    return measured


if __name__ == "__main__":
    print(json.dumps(measure(Request.loads(sys.argv[1])).as_dict()))
