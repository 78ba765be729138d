"""Tiny checkpoints in every form in which the hub, or transformers, has the supported architectures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint.hub import INDEX, SINGLE
from tests.tiny import TINY, save_tiny

# The same tensors in several forms are several entries. "vision-language" has model_type qwen3_5_moe.
FORMS = (
    *(model_type for model_type in TINY if model_type != "qwen3_5_moe"),
    "qwen3_moe, fused",  # as transformers has it in memory
    "vision-language",  # as the hub has it: fused experts, a vision tower, layers for multi-token prediction
    "vision-language, per expert",  # as transformers saves a model that was not read from fused experts
    "text out of vision-language",  # as transformers saves the text model that it has read from the above
)
STACK = re.compile(r"(.*\.mlp\.experts)\.\d+\.gate_proj\.weight")


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def save_form(folder: Path, form: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Writes the checkpoint and returns the reference, a float32 model of transformers of the form's own class.

    dtype: of the tensors in the file; the reference has the same values. changes: to the config of the text model.
    """
    model_type = "qwen3_5_moe" if "vision-language" in form else form.removesuffix(", fused")
    reference = save_tiny(folder, model_type, **changes)
    reference.load_state_dict({name: value.to(dtype) for name, value in reference.state_dict().items()})
    reference.save_pretrained(folder)
    if form == "text out of vision-language":
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(folder)
        reference.save_pretrained(folder)
    tensors = {name: value.to(dtype) for name, value in tensors_in(folder).items()} | predicting(form)
    stacked = form == "vision-language" or form.endswith(", fused")
    save_file(fused(tensors) if stacked else tensors, folder / "model.safetensors", {"format": "pt"})
    if dtype != torch.float32:
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace("float32", str(dtype).removeprefix("torch.")))
    return reference


def predicting(form: str) -> dict[str, Tensor]:
    """What a file has for multi-token prediction, if it has any: in bfloat16, experts one by one."""
    prefix = {"vision-language": "mtp."}.get(form, "model.layers.4." if form.startswith("glm") else None)
    if prefix is None:
        return {}
    layer = prefix if prefix != "mtp." else "mtp.layers.0."
    experts = [f"{layer}mlp.experts.{e}.{part}_proj.weight" for e in range(2) for part in ("gate", "up", "down")]
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(3, 5, generator=generator).bfloat16()
        for name in (*experts, f"{layer}input_layernorm.weight", f"{prefix}eh_proj.weight")
    }


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with the experts of decoder layers in stacks; those of `mtp.*` stay as they are."""
    result = dict(tensors)
    names = {found[1] for key in tensors if key.startswith("model.") and (found := STACK.fullmatch(key))}
    for name in sorted(names):
        count = sum(key.startswith(f"{name}.") and key.endswith(".up_proj.weight") for key in tensors)
        gate, up, down = (
            torch.stack([result.pop(f"{name}.{e}.{part}_proj.weight") for e in range(count)])
            for part in ("gate", "up", "down")
        )
        result[f"{name}.gate_up_proj"], result[f"{name}.down_proj"] = torch.cat((gate, up), 1), down
    return result


def write_checkpoint(folder: Path, shards: int = 2) -> dict[str, torch.Tensor]:
    """A little folder in the hub's layout; not a model."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tensors = {f"layer.{index}.weight": torch.randn(6, 4, 8).bfloat16() for index in range(2 * shards)}
    tensors["layer.0.scale"] = torch.tensor(1.5)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    if shards == 1:
        save_file(tensors, folder / SINGLE)
        return tensors
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors
