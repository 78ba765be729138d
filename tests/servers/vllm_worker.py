"""Log-probabilities of a prompt by vLLM, of a base and of adapters beside it; runs in vLLM's own environment.

    .servers/vllm/bin/python tests/servers/vllm_worker.py < job.json

A job has base (a folder), dtype, tokens, adapters ({name: folder}), options of the engine, and out, a folder in which
each one's float32 [T - 1, V] becomes NAME.npy. The file `failed` there has what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

import numpy as np
import torch
import torch.nn.functional as F


def experts_in_torch(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *_: Any,
    **__: Any,
) -> None:
    """What TritonExperts.apply computes, which no CPU runs: routed experts, with LoRA as vLLM has stacked it."""
    context = self._lora_context
    slots = context.punica_wrapper.token_lora_indices if context is not None else ()
    total = torch.zeros(hidden_states.shape, dtype=torch.float32)
    for token, x in enumerate(hidden_states.float()):
        slot = int(slots[token]) if token < len(slots) else -1
        for weight, expert in zip(topk_weights[token].tolist(), topk_ids[token].tolist(), strict=True):
            gate_up = w1[expert].float() @ x
            if slot >= 0:
                gate_up += torch.cat(
                    [
                        b[slot, expert].float() @ (a[slot, expert].float() @ x)
                        for a, b in zip(context.w13_lora_a_stacked, context.w13_lora_b_stacked, strict=True)
                    ]
                )
            gate, up = gate_up.chunk(2)
            inner = F.silu(gate) * up
            result = w2[expert].float() @ inner
            if slot >= 0:
                a, b = context.w2_lora_a_stacked[0], context.w2_lora_b_stacked[0]
                result += b[slot, expert].float() @ (a[slot, expert].float() @ inner)
            total[token] += weight * result
    output.copy_(total)


def run(job: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    TritonExperts.apply = experts_in_torch
    engine = LLM(
        model=job["base"],
        dtype=job["dtype"],
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_lora=True,
        max_lora_rank=16,
        max_loras=1,
        max_model_len=128,
        max_num_seqs=1,
        max_logprobs=-1,
        **job["options"],
    )
    tokens, out = job["tokens"], Path(job["out"])
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    for number, (name, folder) in enumerate({"base": None, **job["adapters"]}.items()):
        request = LoRARequest(name, number, folder) if folder else None
        if request is not None:
            engine.llm_engine.add_lora(request)
        done = engine.generate([{"prompt_token_ids": tokens}], sampling, lora_request=request, use_tqdm=False)
        rows = done[0].prompt_logprobs[1:]
        size = max(map(len, rows))
        found = np.array([[row[token].logprob for token in range(size)] for row in rows], dtype=np.float32)
        np.save(out / f"{name}.npy", found)
        if request is not None:
            engine.llm_engine.remove_lora(number)


if __name__ == "__main__":
    todo = json.load(sys.stdin)
    try:
        run(todo)
    except BaseException:
        (Path(todo["out"]) / "failed").write_text(traceback.format_exc())
        raise
