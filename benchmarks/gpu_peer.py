"""The peer's side of `benchmarks.gpu`, run in the peer's environment: transformers, PEFT and bitsandbytes.

The model that `from_pretrained` gives with bitsandbytes' 4-bit Linear layers, its stacks of experts quantised as
`step_peer` has them quantised, but made of random values on the device, a matrix or stack at a time: the whole is never
there in bfloat16. Gradient checkpointing, LoRA on modules and on parameters, 8-bit AdamW of bitsandbytes (it has none
for a CPU: torch's AdamW there). Words of a case: `autocast` trains under bfloat16 autocast, as the Trainer's
`bf16=True` does; `repaired` makes both expert adapters work, see `step_peer.forget_dequantised`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_cases import ALPHA, Case, Request, config_of
from benchmarks.gpu_steps import Result, answer, begin, learning_tensors, run_steps
from benchmarks.measure import synchronise
from benchmarks.setting import EXPERTS, LEARNING_RATE, MAX_GRAD_NORM, SETTINGS
from benchmarks.step_peer import count_stored, forget_dequantised

SPREAD = 0.02
STACKS = tuple(name.rpartition(".")[2] for name in EXPERTS)


def build(request: Request, device: torch.device) -> Any:
    """The model with random 4-bit weights on `device`."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    config = AutoConfig.for_model(**config_of(request.group.model, request.tiny))
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    replace_with_bnb_linear(model, list(SETTINGS[config.model_type].dense), quantisation)
    _fill(model, device)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # what PEFT goes by
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    return model.train()


def _fill(model: nn.Module, device: torch.device) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    generator = torch.Generator(device).manual_seed(0)
    for name, module in list(model.named_modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            if parameter.dim() == 1:
                value.fill_(1.0)
            else:  # tokens stay distinct through all layers, and so do their routes, as in gpu_train
                value.normal_(std=1.0 if isinstance(module, nn.Embedding) else SPREAD, generator=generator)
            made: nn.Parameter = nn.Parameter(value, requires_grad=False)
            if isinstance(module, Linear4bit) and leaf == "weight":
                made = Params4bit(
                    value, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module
                ).to(device)
            setattr(module, leaf, made)
            if name.endswith(".mlp.experts") and leaf in STACKS:
                replace_parameter_4bit(module, leaf, compress_statistics=True, quant_type="nf4")
            del value, made
        if "inv_freq" in dict(module.named_buffers(recurse=False)):  # computed when the module is made
            owner, _, leaf = name.rpartition(".")
            with device:
                setattr(model.get_submodule(owner), leaf, type(module)(module.config))
            continue
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, torch.zeros(buffer.shape, dtype=buffer.dtype, device=device))


def measure(model: Any, request: Request, case: Case, device: torch.device) -> Result:
    """Trains a LoRA on `model`, which afterwards has none."""
    import peft

    modules = SETTINGS[model.config.model_type].attention
    stacks = [
        f"{name}.{leaf}" for name, module in model.named_modules() if name.endswith(".mlp.experts") for leaf in STACKS
    ]
    adapter = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=case.rank,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(modules),
        target_parameters=stacks if "experts" in case.targets else None,
    )
    hooks = []
    if "repaired" in case.words:
        experts = [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]
        hooks = [module.register_forward_pre_hook(forget_dequantised) for module in experts]
    adapted = peft.get_peft_model(model, adapter)
    try:
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = _optimizer(trained, device)

        def step(tokens: Tensor) -> float:
            with torch.autocast(device.type, torch.bfloat16, enabled="autocast" in case.words):
                loss = adapted(input_ids=tokens, labels=tokens).loss
            loss.backward()
            value: float = loss.item()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value

        result, one = run_steps(device, request, case, model.config.vocab_size, step, optimizer)
        result["learning"] = learning_tensors(optimizer, one)
        return result
    finally:
        for hook in hooks:
            hook.remove()
        adapted.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config


def _optimizer(trained: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    if device.type == "cpu":
        return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(trained, lr=LEARNING_RATE, weight_decay=0.0)
    return made


def run(request: Request) -> None:
    """Prints what each case found."""
    import bitsandbytes
    import peft
    import transformers

    transformers.utils.logging.set_verbosity_error()
    device = begin(request)
    start = time.perf_counter()
    model = build(request, device)
    synchronise(device)
    parameters, stored, _ = count_stored(model)
    of_model = {
        "weights": stored,
        "parameters": parameters,
        "build_seconds": time.perf_counter() - start,
        "versions": {library.__name__: library.__version__ for library in (transformers, peft, bitsandbytes, torch)},
    }
    print(json.dumps({"built": of_model}), flush=True)
    answer(request.group.cases, device, lambda case: of_model | measure(model, request, case, device))


if __name__ == "__main__":
    run(Request.loads(sys.argv[1]))
