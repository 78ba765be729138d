"""A random GLM-4.7-Flash-architecture checkpoint in the hub's format: one tensor per expert and projection.

`ensure_checkpoint` writes it once, in a process of its own (`python -m benchmarks.checkpoint FOLDER`).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAMP = "benchmark.json"  # written last: a folder without it is unfinished


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Key and shape of every tensor of the checkpoint."""
    c = config
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    key_dim = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for index, kind in enumerate(c["mlp_layer_types"]):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        attention = f"{layer}.self_attn"
        yield f"{attention}.q_a_proj.weight", (c["q_lora_rank"], hidden)
        yield f"{attention}.q_a_layernorm.weight", (c["q_lora_rank"],)
        yield f"{attention}.q_b_proj.weight", (heads * key_dim, c["q_lora_rank"])
        yield f"{attention}.kv_a_proj_with_mqa.weight", (c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden)
        yield f"{attention}.kv_a_layernorm.weight", (c["kv_lora_rank"],)
        yield f"{attention}.kv_b_proj.weight", (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"])
        yield f"{attention}.o_proj.weight", (hidden, heads * c["v_head_dim"])
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if kind == "dense":
            yield from _swiglu(f"{layer}.mlp", hidden, c["intermediate_size"])
            continue
        yield f"{layer}.mlp.gate.weight", (c["n_routed_experts"], hidden)
        yield f"{layer}.mlp.gate.e_score_correction_bias", (c["n_routed_experts"],)
        width = c["moe_intermediate_size"]
        yield from _swiglu(f"{layer}.mlp.shared_experts", hidden, width * c["n_shared_experts"])
        for expert in range(c["n_routed_experts"]):
            yield from _swiglu(f"{layer}.mlp.experts.{expert}", hidden, width)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)


def _swiglu(name: str, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.gate_proj.weight", (width, hidden)
    yield f"{name}.up_proj.weight", (width, hidden)
    yield f"{name}.down_proj.weight", (hidden, width)


def parameters_of(config: dict[str, Any]) -> int:
    """The model's parameters; the routers' correction biases are buffers."""
    total = 0
    for name, shape in tensor_shapes(config):
        if not name.endswith("e_score_correction_bias"):
            size = 1
            for length in shape:
                size *= length
            total += size
    return total


def ensure_checkpoint(config: dict[str, Any], root: Path) -> Path:
    """The folder of this config's checkpoint under `root`; written there first if it isn't."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"random-{digest}"
    if not (folder / STAMP).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        subprocess.run([sys.executable, "-m", "benchmarks.checkpoint", str(folder)], check=True)
    return folder


def write(folder: Path, seed: int = 0) -> None:
    """Fill a folder that holds config.json: normal weights, norms of 1, router biases near 0; bfloat16."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config):
        if "norm" in name:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            drawn = torch.randn(shape, generator=generator).mul_(config["initializer_range"])
            bias = name.endswith("e_score_correction_bias")
            tensors[name] = drawn.mul_(0.1) if bias else drawn.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / STAMP).write_text("{}\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
