"""The peer's side of `benchmarks.step`, run in the peer's environment: transformers, PEFT and bitsandbytes.

Set up as its users set it up: `from_pretrained` with bitsandbytes' 4-bit Linear layers, the stacked experts quantised
by `bitsandbytes.nn.parametrize.replace_parameter_4bit`, gradient checkpointing, LoRA on modules and on parameters,
torch's fused AdamW. The backend is transformers' `experts_implementation`, with these words behind a plus sign:
`+autocast` trains under bfloat16 autocast, as the Trainer's `bf16=True` does (without it PEFT's LoRA computes in
float32); `+repaired` makes both expert adapters work, see `forget_dequantised`.

The last line of standard output is the result as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from benchmarks.measure import Measured, begin, loaded, note_trained, run_steps
from benchmarks.setting import ALPHA, EXPERTS, LEARNING_RATE, MAX_GRAD_NORM, RANK, SETTINGS, Request


def measure(request: Request) -> Measured:
    import bitsandbytes
    import peft
    import transformers
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    measured = begin("peer", request)
    for library in (transformers, peft, bitsandbytes):
        measured.versions[library.__name__] = library.__version__
    start = time.perf_counter()
    backend, *words = request.backend.split("+")
    dtype = getattr(torch, request.dtype)
    setting = SETTINGS[request.arch]
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(setting.dense),
    )
    model = AutoModelForCausalLM.from_pretrained(
        request.checkpoint,
        dtype=dtype,
        quantization_config=quantisation,
        experts_implementation=backend,
        attn_implementation="sdpa",
    )
    stacks = []
    for name, module in list(model.named_modules()):
        if name.endswith(".mlp.experts"):
            for part in EXPERTS:
                leaf = part.rpartition(".")[2]
                replace_parameter_4bit(module, leaf, compress_statistics=True, quant_type="nf4")
                # A parameter that is parametrised already is only found by its full name.
                stacks.append(f"{name}.{leaf}")
            if "repaired" in words:
                module.register_forward_pre_hook(forget_dequantised)
    measured.parameters, measured.frozen_bytes, measured.notes["stacks"] = count_stored(model)
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(setting.attention),
        target_parameters=stacks,
    )
    model = peft.get_peft_model(model, adapter)
    model.train()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    loaded(measured, start)

    def step(tokens: Tensor) -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in words):
            loss = model(input_ids=tokens[None], labels=tokens[None]).loss
        loss.backward()
        value = loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value, norm

    before = [parameter.detach().clone() for parameter in trained]
    run_steps(measured, request, model.config.vocab_size, step)
    note_trained(measured, trained, before)
    measured.notes["unmoved"] = [
        name for name, now, then in zip(names, trained, before, strict=True) if torch.equal(now, then)
    ]
    return measured


def forget_dequantised(module: nn.Module, inputs: Any) -> None:
    """Before the experts read their weights: drop what was cached before the adapters were put on top.

    PEFT's wrapper of one expert parameter opens the cache of parametrised tensors, and then the wrapper of the other
    reads its own, still without its adapter, into that cache. The experts get that one, so the adapter has no effect
    and no gradient.
    """
    parametrize._cache.clear()


def count_stored(model: nn.Module) -> tuple[int, int, dict[str, int]]:
    """Parameters and bytes of the model as it is stored, and the same of the 4-bit stacks alone."""
    states: dict[int, Any] = {}  # of parametrised tensors, by the tensor that holds their bytes
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            states[id(module.original)] = module[0].quant_state
    parameters = stored = 0
    stacks = {"parameters": 0, "bytes": 0}
    for parameter in model.parameters():
        stack = states.get(id(parameter))
        state = stack or getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        size = parameter.nbytes + _state_bytes(state)
        parameters, stored = parameters + count, stored + size
        if stack is not None:
            stacks = {"parameters": stacks["parameters"] + count, "bytes": stacks["bytes"] + size}
    return parameters, stored + sum(buffer.nbytes for buffer in model.buffers()), stacks


def _state_bytes(state: Any) -> int:
    """The scales of a 4-bit tensor; its constant tables are shared and not counted."""
    if state is None:
        return 0
    size: int = state.absmax.nbytes
    return size + (state.state2.absmax.nbytes + state.offset.nbytes if state.nested else 0)


if __name__ == "__main__":
    print(json.dumps(measure(Request.loads(sys.argv[1])).as_dict()))
