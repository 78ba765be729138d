"""Runs of each architecture from a converted checkpoint: an adapter, resumed; and all weights, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import load_model
from models.checkpoint.conversion import convert
from quant.storage import StorageSpec
from tests.helpers import assert_close, random_tokens
from tests.hub_forms import FORMS as ALL_FORMS
from tests.hub_forms import save_form, tensors_in
from tests.run_helpers import World, curve, losses, messages, questions, settings, write_tokenizer
from tests.tiny import TINY
from train.__main__ import main

FORMS = [form for form in ALL_FORMS if form in TINY and form != "glm4_moe_lite"] + ["vision-language"]
pytestmark = pytest.mark.usefixtures("nothing_drawn")
TOKENS = random_tokens((2, 24), vocabulary=320)


@pytest.fixture(scope="module", params=FORMS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder, pairs = tmp_path_factory.mktemp("world"), questions(40, seed=0)
    save_form(folder / "hub", request.param, vocab_size=320)
    write_tokenizer(folder / "hub", [question + answer for question, answer in pairs])
    (folder / "rows.jsonl").write_text(messages(pairs))
    return World(folder / "hub", folder / "rows.jsonl", folder / "none")


def converted(world: World, storage: str) -> World:
    folder = world.model.with_name(storage)
    convert(world.model, folder, StorageSpec(storage), torch.float32)  # type: ignore[arg-type]
    return World(folder, world.rows, world.prompts)


def test_an_adapter_is_trained_and_resumed(world: World, tmp_path: Path) -> None:
    native = converted(world, "nf4")
    steps = {"train__max_steps": 4, "train__save_every": 2, "adapter__targets": ["attention", "experts"]}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(settings(native, whole, **steps)) == 0
    from_there = {"train__resume": str(whole / "checkpoints" / "step-000002")}
    assert main(settings(native, resumed, **steps, **from_there)) == 0
    assert curve(resumed) == curve(whole)
    adapters = [out / "adapter" for out in (whole, resumed)]
    files = [(adapter / "adapter_model.safetensors").read_bytes() for adapter in adapters]
    assert files[0] == files[1]
    base, with_adapter = (load_model(native.model, "nf4", torch.float32, adapter=a) for a in (None, adapters[0]))
    assert not torch.allclose(with_adapter(TOKENS), base(TOKENS), rtol=1e-2)


def test_all_weights_are_trained_and_exported(world: World, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    native = converted(world, "none")
    out = tmp_path / "run"
    # The rate of full fine-tuning, at which random weights learn something in a few steps.
    full = {"adapter__kind": "none", "model__storage": "none", "train__learning_rate": 2e-3, "train__max_steps": 4}
    assert main(settings(native, out, **full)) == 0
    assert losses(out, "train")[-1] < losses(out, "train")[0]
    before, after = tensors_in(world.model), tensors_in(out / "model")
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in before.items()}
    expected = AutoModelForCausalLM.from_pretrained(out / "model")(TOKENS).logits
    assert_close(load_model(out / "model", "none", torch.float32)(TOKENS), expected)
    assert not torch.allclose(load_model(world.model, "none", torch.float32)(TOKENS), expected, rtol=1e-2)
