"""What the tests of adapters against PEFT share. A reference is a model of transformers, in float32."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import load_model
from models.adapters.files import save_adapter
from models.adapters.lora import adapted, trainable_parameters
from models.adapters.targets import module_name
from models.decoder import CausalLM
from tests.helpers import assert_close, relative_error

# What PEFT says of patterns that fit parameters; it applies them all the same, as the logits show.
PATTERN_WARNING = "keys did not match any targeted module and were ignored"


def native(folder: Path) -> CausalLM:
    return load_model(folder, storage="none", dtype=torch.float32)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens) if isinstance(model, CausalLM) else model(input_ids=tokens).logits


def randomise(parameters: list[tuple[str, torch.nn.Parameter]], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def packed_by_expert(adapter: Path, folder: Path, experts: int) -> Path:
    """A copy in `folder` with unsloth's order of B: each expert's columns side by side."""
    shutil.copytree(adapter, folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, value in tensors.items():
        if ".experts." in name and ".lora_B." in name:
            tensors[name] = torch.cat([value[:, expert::experts] for expert in range(experts)], 1)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def peft_load(reference: Any, directory: Path) -> tuple[Any, list[str]]:
    """The reference with an adapter, and what PEFT warned of."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(copy.deepcopy(reference), str(directory))
    return model.eval(), [str(warning.message) for warning in caught if warning.category is not FutureWarning]


def peft_make(reference: Any, directory: Path, **config: Any) -> Any:
    """The reference with a random adapter that PEFT made, which is saved in `directory`."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{PATTERN_WARNING}")
        model = get_peft_model(copy.deepcopy(reference), LoraConfig(task_type="CAUSAL_LM", **config))
    randomise([(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad])
    model.save_pretrained(str(directory))
    return model


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "adapter_config.json").read_text())


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients_as_peft_has_them(model: CausalLM) -> dict[str, Tensor]:
    """Of A and B, by PEFT's key, for an adapter of both stacks; written out from PEFT's layer.py."""
    found = {}
    for key, lora in adapted(model):
        module = module_name(key.hub)
        for letter, value in (("A", lora.A.grad), ("B", lora.B.grad)):
            assert value is not None, module
            if key.group == "experts":
                module = module.replace(".gate_up_proj", ".base_layer").removesuffix(".down_proj")
                value = torch.cat(list(value)) if letter == "A" else _expert_fastest(value)
            found[f"base_model.model.{module}.lora_{letter}.weight"] = value
    return found


def _expert_fastest(value: Tensor) -> Tensor:
    experts, out, rank = value.shape
    flat = torch.empty(out, rank * experts)
    for expert in range(experts):
        flat[:, expert::experts] = value[expert]
    return flat


def check_gradients(
    folder: Path, reference: Any, directory: Path, tokens: Tensor, recompute: bool, **config: Any
) -> int:
    """Compares the gradients of a random adapter, made by PEFT, with PEFT's; returns their number."""
    peft = peft_make(reference, directory, **config).train()
    model = load_model(folder, storage="none", dtype=torch.float32, adapter=directory)
    model.activation_checkpointing = recompute
    expected = cross_entropy(peft(input_ids=tokens).logits, tokens)
    loss = cross_entropy(model(tokens), tokens)
    assert_close(loss.detach(), expected.detach(), what="loss")
    expected.backward()
    loss.backward()
    ours = gradients_as_peft_has_them(model)
    theirs = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], what=name)
    return len(ours)


def check_training(
    folder: Path, reference: Any, directory: Path, tokens: Tensor, *, steps: int, rate: float, **config: Any
) -> None:
    """Compares steps of SGD on a random adapter, made by PEFT, with PEFT's: the losses, and all tensors at the end."""
    peft = peft_make(reference, directory / "start", **config).train()
    model = load_model(folder, storage="none", dtype=torch.float32, adapter=directory / "start")
    start = load_file(directory / "start" / "adapter_model.safetensors")
    theirs = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=rate)
    ours = torch.optim.SGD([p for _, p in trainable_parameters(model)], lr=rate)
    losses = []
    for _ in range(steps):
        pair = (cross_entropy(peft(input_ids=tokens).logits, tokens), cross_entropy(model(tokens), tokens))
        for loss, optimizer in zip(pair, (theirs, ours), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(pair[0].item())
        assert_close(pair[1].detach(), pair[0].detach(), what=f"loss after {len(losses) - 1} steps")
    assert losses[-1] < 0.97 * losses[0], losses
    peft.save_pretrained(str(directory / "theirs"))
    save_adapter(model, directory / "ours", "org/base")
    expected = load_file(directory / "theirs" / "adapter_model.safetensors")
    found = load_file(directory / "ours" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_close(value, expected[name], what=name)
        assert relative_error(value, start[name]) > 1e-3, f"{name} was trained"
