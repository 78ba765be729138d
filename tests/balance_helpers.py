"""Tiny models of every kind of router."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models import load_model
from models.adapters.lora import trainable_parameters
from models.blocks.documents import Documents
from models.decoder import CausalLM
from parallel.shards import Shards
from tests.tiny import save_tiny
from train.config.load import Config, parse_config
from train.data.batches import IGNORED, Batch
from train.loop import StepResult, training_step

CPU = torch.device("cpu")


SOFTMAX, NOT_NORMALISED, SIGMOID = "qwen3_5_moe_text", "qwen3_moe", "glm4_moe_lite"


COEFFICIENT = 0.3  # large, so that gradients show it


def save_routed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and model of transformers, by model_type."""
    changes = {
        SOFTMAX: {
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "router_aux_loss_coef": COEFFICIENT,
        },
        # The first of these layers has no experts.
        NOT_NORMALISED: {
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
            "router_aux_loss_coef": COEFFICIENT,
        },
        SIGMOID: {"num_hidden_layers": 3},
    }
    made = {}
    for name, values in changes.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, save_tiny(folder, name, num_experts_per_tok=3, **values)
    return made


def trainable(folder: Path) -> CausalLM:
    model = load_model(folder, storage="none", dtype=torch.float32)
    model.requires_grad_(True)
    return model.train()


def biases(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return {name: tensor for name, tensor in tensors.items() if name.endswith(("correction_bias", "expert_bias"))}


def config_of(folder: Path, *overrides: str) -> Config:
    text = f"model: {{path: {folder}, storage: none, dtype: float32}}\nadapter: {{kind: none}}\n"
    text += "data: {train: x.jsonl, sequence_length: 128}\ntrain: {optimizer: adamw}\noutput: {dir: x}\n"
    return parse_config(text, overrides)


def micro_batch(lengths: Sequence[int], seed: int, multiple: int = 64) -> Batch:
    """Documents of random tokens, about half of them labelled, padded to `multiple`."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    padding = -count % multiple
    tokens = torch.randint(0, 128, (count,), generator=generator)
    labels = torch.randint(0, 128, (count,), generator=generator)
    labels[torch.rand(count, generator=generator) < 0.5] = IGNORED
    return Batch(
        torch.cat((tokens, tokens.new_zeros(padding))),
        torch.cat((labels, labels.new_full((padding,), IGNORED))),
        Documents.from_lengths([*lengths, *([padding] if padding else [])], padding=padding),
        count,
        int((labels != IGNORED).sum()),
    )


BATCHES = (micro_batch((20, 9, 41), seed=1), micro_batch((33,), seed=2))


def real_documents(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of each document that isn't padding."""
    lengths, real = list(batch.documents.lengths), batch.real_tokens
    if batch.documents.padding:
        lengths.pop()
    return list(zip(batch.tokens[:real].split(lengths), batch.labels[:real].split(lengths), strict=True))


def step(model: CausalLM, batches: Sequence[Batch] = BATCHES, rate: float = 0.0) -> StepResult:
    parameters = trainable_parameters(model)
    optimizer = torch.optim.SGD([parameter for _, parameter in parameters], lr=rate)
    return training_step(Shards(model), optimizer, batches, step=1, max_grad_norm=None, device=CPU)
