"""docs/research.md: its snippets run, one after another, and what they compute is compared with transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import models
import train
from models import Experts, load_model, save_adapter
from tests.helpers import assert_close
from train.demo.__main__ import main as demo

PAGE = Path(__file__).parent.parent / "docs" / "research.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("research")


@pytest.fixture(scope="module")
def after(folder: Path) -> dict[str, dict[str, Any]]:
    """The names that there are after each section of the page; what they stand for may change later on."""
    names: dict[str, Any] = {"__name__": "research"}
    found: dict[str, dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare = re.search(r"^    python -m train\.demo (.*)$", TEXT, re.M)
        assert prepare is not None
        assert demo(prepare[1].split()) == 0
        for block in re.finditer(r"^```python\n(.*?)^```", TEXT, re.M | re.S):
            section = re.findall(r"^## (.*)$", TEXT[: block.start()], re.M)[-1]
            above = "\n" * TEXT[: block.start(1)].count("\n")  # for a traceback with the page's lines
            exec(compile(above + block[1], str(PAGE), "exec"), names)  # noqa: S102
            # Hooks go on writing to the dicts.
            found[section] = {name: dict(value) if isinstance(value, dict) else value for name, value in names.items()}
    return found


@pytest.fixture(scope="module")
def reference(after: dict[str, Any], folder: Path) -> nn.Module:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "outputs/demo/start", dtype=torch.float32)
    return model.eval()


def test_every_public_name_is_shown() -> None:
    for name in (*models._HOMES, "convert", *train._HOMES):
        assert re.search(rf"\b{name}\b", TEXT), name


@torch.no_grad()
def test_logits_and_tokens(after: dict[str, Any], reference: nn.Module) -> None:
    prompt = after["Logits"]["prompt"]
    assert_close(after["Logits"]["logits"], reference(prompt).logits)
    names = after["Generating"]
    assert names["texts"][0].startswith("Ben finds 6 buttons in the morning")
    for row, ids in enumerate(names["prompts"]):
        tokens = torch.tensor([ids])
        for step in range(8):
            logits = reference(tokens).logits[:, -1:]
            if step < 4:
                assert_close(names["steps"][step][row], logits[0, 0])
            tokens = torch.cat((tokens, logits.argmax(-1)), dim=1)
        assert names["greedy"][row].tokens == tokens[0, len(ids) :].tolist()
    assert names["kept"] > 0


@torch.no_grad()
def test_routers(after: dict[str, Any], reference: nn.Module) -> None:
    names = after["Router logits and chosen experts"]
    theirs: dict[str, Tensor] = {}
    handles = [
        reference.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: theirs.update(
                {name: F.linear(inputs[0].flatten(0, -2), module.weight)}
            )
        )
        for name in names["routers"]
    ]
    reference(names["prompt"])
    for handle in handles:
        handle.remove()
    assert len(theirs) == 3
    count = names["prompt"].numel()
    for name, logits in theirs.items():
        chosen = names["chosen_experts"][name]
        assert chosen.shape == (count, 2)
        scores = logits.sigmoid() + reference.get_submodule(name).e_score_correction_bias
        assert torch.equal(chosen.sort().values, scores.topk(2).indices.sort().values)
        assert int(names["load"][name].sum()) == 2 * count


def test_the_loss_of_a_loop(after: dict[str, Any], reference: nn.Module) -> None:
    names = after["One's own loss and loop"]
    with torch.no_grad():
        logits = torch.cat([reference(torch.tensor([row])).logits[0] for row in names["ids"]])
    expected = F.cross_entropy(logits, names["labels"])
    assert abs(names["losses"][0] - float(expected)) < 1e-5 * float(expected)
    assert len(names["losses"]) == 5
    assert all(loss == loss for loss in names["losses"])


def test_adapters_of_some_experts(after: dict[str, Any], tmp_path: Path) -> None:
    """In PEFT's file the others have nothing."""
    names = after["LoRA on some experts only"]
    save_adapter(names["model"], tmp_path, "base")
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        stacks = [file.get_tensor(name) for name in file.keys() if ".lora_B." in name]  # noqa: SIM118
    assert len(stacks) == 4
    for b in stacks:  # [out, R·E], column j·E + e is expert e's
        assert b.unflatten(1, (4, 8)).abs().amax((0, 1)).gt(0).tolist() == [expert in (0, 3) for expert in range(8)]


@torch.no_grad()
def test_a_storage_of_ones_own(after: dict[str, Any], folder: Path) -> None:
    """As if the dense weights were those that the three values stand for."""
    model = load_model(folder / "outputs/demo/start", "none", "float32")
    for module in model.modules():
        if isinstance(module, Experts):
            for projection in (module.gate_up_proj, module.down_proj):
                value = projection.weight.get_parameter("value")
                scale = value.abs().mean(-1, keepdim=True)
                value.copy_(torch.where(value.abs() < scale / 2, 0, value.sign()) * scale)
    names = after["A storage of one's own"]
    assert_close(names["ternary_logits"], model(names["prompt"]))
    assert names["ternary_logits"].sub(after["Logits"]["logits"]).abs().max() > 0.01


def test_checkpoints(after: dict[str, Any], folder: Path) -> None:
    assert after["Checkpoints"]["summary"].stored == "nf4 with double quantisation, bfloat16"
    with safe_open(folder / "outputs/research/tuned/model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("model.norm.weight"), torch.full((128,), 1.01))
