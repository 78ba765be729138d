"""Checkpoints and adapters to be merged."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.adapters.files import save_adapter
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec, adaptable, groups_of
from models.checkpoint.hub import INDEX, SINGLE
from models.checkpoint.keymap import key_map_of
from models.checkpoint.stream import layout_of
from tests.hub_forms import tensors_in
from tests.peft_helpers import native


def random_adapter(hub: Path, folder: Path, groups: tuple[str, ...] = (), size: float = 0.1) -> set[str]:
    """Writes a random adapter of rank 3 and scaling 2 of these groups, or of all; the hub keys that it changes."""
    model = native(hub)
    there = tensors_in(hub)
    key_map = key_map_of(model)
    keys = adaptable(key_map.laid_out(layout_of(key_map, there)))
    groups = groups or tuple(groups_of(keys))
    add_lora(model, AdapterSpec(groups, 3, 6.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, folder, str(hub))
    return {name for key in keys if key.group in groups for name in (key.hub, *key.part_keys()) if name in there}


def shard(folder: Path, count: int) -> None:
    """Divide the one file of a checkpoint into shards, an expert's matrices among several."""
    tensors = tensors_in(folder)
    (folder / SINGLE).unlink()
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::count]}
        save_file(part, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
