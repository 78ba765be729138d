"""The models whose steps `benchmarks.launches` counts. Free of torch, so that `--help` and errors are instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_cases import BOTH, MODELS, QWEN3, RANK, TRINITY

# By architecture: the model's name, and its sizes in config.json's words. What is absent has the defaults of models/.
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe_lite": ("GLM-4.7-Flash", {}),
    "glm4_moe": ("GLM-4.5-Air", {"head_dim": 128}),
    "glm_moe_dsa": ("GLM-5", {}),
    "afmoe": ("Trinity-Mini", {**MODELS[TRINITY], "num_hidden_layers": 32}),
    "qwen3_moe": (QWEN3, MODELS[QWEN3]),
    "qwen3_5_moe": ("Qwen3.5-35B-A3B", {"model_type": "qwen3_5_moe_text"}),
}
STORAGES = ("nf4", "int8", "none")
ADAPTER_DTYPES = ("float32", "bfloat16")
KERNELS = ("triton", "torch")  # our own kernels, each one launch, or torch's forms of them


@dataclass(frozen=True)
class LaunchCase:
    """config: as config.json has it. storage: nf4 (with double quantisation), int8 or none. targets, rank and
    adapter_dtype: of LoRA. kernels: one of KERNELS.
    optimizer: its states take memory. sequences of `length` tokens are packed into the step.
    processes: that the model is cut over with FSDP2, of which one is counted; expert: that the experts are distributed
    over.
    """

    config: dict[str, Any]
    storage: str = "nf4"
    adapter_dtype: str = "bfloat16"
    targets: tuple[str, ...] = BOTH
    rank: int = RANK
    optimizer: str = "adamw_8bit"
    kernels: str = "triton"
    sequences: int = 2
    length: int = 2048
    processes: int = 1
    expert: int = 1


def full_config(architecture: str, layers: int | None = None) -> dict[str, Any]:
    """layers: how many, where not all."""
    config = {"model_type": architecture} | FULL[architecture][1]
    return config if layers is None else config | {"num_hidden_layers": layers}


def targets_of(architecture: str) -> tuple[str, ...]:
    """All that mixes tokens, and the experts."""
    return ("linear_attention", *BOTH) if architecture == "qwen3_5_moe" else BOTH
