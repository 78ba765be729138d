"""Adapters of a text model and of the vision-language model around it: each spelling where it is meant to load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.adapter_names import main, rename_adapter
from models.adapters.files import load_adapter, save_adapter
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec
from models.checkpoint.layout import Spelling, respell, spelling_of
from quant.common.errors import NibbleError
from tests.helpers import assert_close, random_tokens, relative_error
from tests.peft_helpers import PATTERN_WARNING, config_of, logits_of, native, peft_load, peft_make, randomise
from tests.tiny import save_tiny, tiny

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = random_tokens((2, 24))
# Full names in the targets and in the patterns: of a matrix, of a stack, of parameters of some layers.
SPEC = AdapterSpec(
    ("attention", "experts", "model.layers.1.linear_attn.out_proj", "model.layers.2.mlp.gate"),
    {"attention": 3, "experts": 2, "linear_attention": 4, "router": 1, "model.layers.1.mlp.experts.down_proj": 5},
    8.0,
)


class Bases:
    """One set of weights as a checkpoint of the vision-language model, and as one of the text model alone."""

    def __init__(self, folder: Path) -> None:
        from transformers import Qwen3_5MoeForCausalLM

        self.folders: dict[Spelling, Path] = {"text": folder / "text", "vision-language": folder / "whole"}
        whole = save_tiny(self.folders["vision-language"], "qwen3_5_moe", vocab_size=64)
        # The text model as AutoModelForCausalLM gives it. Saved, it would keep the names of the file that it is from.
        text = Qwen3_5MoeForCausalLM.from_pretrained(self.folders["vision-language"], dtype=torch.float32).eval()
        alone = tiny("qwen3_5_moe_text", vocab_size=64)
        alone.load_state_dict(text.state_dict())
        alone.save_pretrained(self.folders["text"])
        self.references: dict[Spelling, Any] = {"text": text, "vision-language": whole}
        self.logits = logits_of(text, TOKENS % 64)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def saved(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Tensor]:
    """One adapter of each base in each spelling, by "base/names", and the logits of all of them."""
    folder = tmp_path_factory.mktemp("saved")
    logits, paths = [], {}
    for base, path in bases.folders.items():
        model = native(path)
        add_lora(model, SPEC)
        randomise(trainable_parameters(model))
        logits.append(logits_of(model, TOKENS % 64))
        for names in ("checkpoint", "text", "vision-language"):
            paths[f"{base}/{names}"] = folder / base / names
            save_adapter(model, folder / base / names, "org/base", names=names)  # type: ignore[arg-type]
    assert torch.equal(*logits), "the bases are the same model"
    return paths, logits[0]


def same_files(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in (CONFIG, WEIGHTS))


def test_names_that_are_written(saved: tuple[dict[str, Path], Tensor]) -> None:
    paths, _ = saved
    for base in ("text", "vision-language"):
        assert same_files(paths[f"{base}/checkpoint"], paths[f"{base}/{base}"])
    for names, model in (("text", "model"), ("vision-language", "model.language_model")):
        assert same_files(paths[f"text/{names}"], paths[f"vision-language/{names}"])
        tensors = load_file(paths[f"text/{names}"] / WEIGHTS)
        assert len(tensors) == 2 * (4 + 4 * 2 + 1 + 1)
        assert all(name.startswith(f"base_model.model.{model}.layers.") for name in tensors)
        config = config_of(paths[f"text/{names}"])
        assert f"{model}.layers.1.linear_attn.out_proj" in config["target_modules"]
        assert f"{model}.layers.2.mlp.gate.weight" in config["target_parameters"]
        assert config["rank_pattern"][re.escape(f"{model}.layers.1.mlp.experts.down_proj")] == 5


@pytest.mark.parametrize("names", ["text", "vision-language"])
def test_peft_applies_an_adapter_to_the_class_of_its_names(
    bases: Bases, saved: tuple[dict[str, Path], Tensor], names: Spelling
) -> None:
    paths, logits = saved
    assert relative_error(logits, bases.logits) > 1e-2
    peft, warned = peft_load(bases.references[names], paths[f"text/{names}"])
    assert [text for text in warned if PATTERN_WARNING not in text] == []
    assert_close(logits_of(peft, TOKENS % 64), logits)


def test_config_entries_of_other_types(saved: tuple[dict[str, Path], Tensor], tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    shutil.copytree(saved[0]["text/text"], path)
    config = config_of(path)

    def renamed(number: int, change: dict[str, object]) -> dict[str, object]:
        (path / CONFIG).write_text(json.dumps({**config, **change}))
        rename_adapter(path, tmp_path / str(number), "vision-language")
        return config_of(tmp_path / str(number))

    pattern = r"model\.layers\.\d+\.self_attn\.o_proj"
    assert renamed(1, {"target_modules": pattern})["target_modules"] == r"model\.language_model" + pattern[5:]
    assert renamed(2, {"target_modules": "all-linear"})["target_modules"] == "all-linear"
    for number, change in enumerate(({"target_modules": True}, {"rank_pattern": [1]}), 3):
        with pytest.raises(NibbleError, match=rf"{next(iter(change))} must be (a list of texts|an object), got "):
            renamed(number, change)


def test_peft_applies_nothing_to_the_other_class(
    bases: Bases, saved: tuple[dict[str, Path], Tensor], tmp_path: Path
) -> None:
    """Why this project reads both spellings and writes either: PEFT warns, and computes without the adapter."""
    model = native(bases.folders["vision-language"])
    add_lora(model, AdapterSpec(("attention", "experts"), 2, 4.0))
    randomise(trainable_parameters(model))
    save_adapter(model, tmp_path, "org/base")
    peft, warned = peft_load(bases.references["text"], tmp_path)
    assert len(warned) == 1
    assert warned[0].startswith("Found missing adapter keys while loading the checkpoint")
    assert torch.equal(logits_of(peft, TOKENS % 64), bases.logits)


def test_both_spellings_load_in_both_bases(bases: Bases, saved: tuple[dict[str, Path], Tensor]) -> None:
    paths, logits = saved
    for base in bases.folders.values():
        for names in bases.folders:
            model = native(base)
            load_adapter(model, paths[f"text/{names}"], expected=SPEC)
            assert torch.equal(logits_of(model, TOKENS % 64), logits)


@pytest.mark.parametrize("trained", ["text", "vision-language"])
def test_an_adapter_that_peft_trained_on_either_class(bases: Bases, tmp_path: Path, trained: Spelling) -> None:
    peft = peft_make(
        bases.references[trained],
        tmp_path,
        r=4,
        target_modules=["q_proj", "in_proj_qkv", "shared_expert.up_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={r"^model\.(language_model\.)?layers\.0\.linear_attn\.in_proj_qkv": 6},
    ).eval()
    expected = logits_of(peft, TOKENS % 64)
    for base in bases.folders.values():
        model = native(base)
        load_adapter(model, tmp_path)
        assert_close(logits_of(model, TOKENS % 64), expected)


# --- the command


@pytest.mark.parametrize(("to", "source"), [("text", "vision-language"), ("vision-language", "text")])
def test_command(
    saved: tuple[dict[str, Path], Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, source: str
) -> None:
    paths, _ = saved
    before = {name: (paths[f"text/{source}"] / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    out = tmp_path / "new" / "adapter"
    assert main([str(paths[f"text/{source}"]), str(out), "--to", to]) == 0
    assert capsys.readouterr().out == f"{out}: 28 tensors with the names of the {to} model\n"
    assert same_files(out, paths[f"text/{to}"]), "what save_adapter writes in that spelling"
    assert before == {name: (paths[f"text/{source}"] / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, WEIGHTS]


def test_command_keeps_every_dtype_and_all_of_the_config(saved: tuple[dict[str, Path], Tensor], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(saved[0]["text/text"], source)
    tensors = {name: value.to(torch.bfloat16) for name, value in load_file(source / WEIGHTS).items()}
    save_file(tensors, source / WEIGHTS)
    config = config_of(source)
    config.update(layers_to_transform=[0, 1], revision="abc", base_model_name_or_path="model.layers/x")
    (source / CONFIG).write_text(json.dumps(config))
    assert main([str(source), str(tmp_path / "out"), "--to", "vision-language"]) == 0
    assert main([str(tmp_path / "out"), str(tmp_path / "back"), "--to", "text"]) == 0
    assert config_of(tmp_path / "back") == config
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "model.layers/x"
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == torch.bfloat16 for name, value in tensors.items())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "model.language_model.layers" in text
    assert "--to {text,vision-language}" in text


def rename(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors.pop(min(tensors))


FIRST = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "to", "expected"),
    [
        (
            lambda tensors: None,
            "text",
            "{source}: its names are those of the text model already; use it as it is.",
        ),
        (
            lambda tensors: rename(tensors, "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight"),
            "vision-language",
            "{source}: base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight is named neither like the text "
            "model's layers (model.layers.…) nor like the vision-language model's (model.language_model.layers.…).\n"
            "Only adapters of a text model's layers can be renamed.",
        ),
        (
            lambda tensors: rename(tensors, "base_model.model.model.language_model.layers.0.x.lora_A.weight"),
            "vision-language",
            "{source}: some names are those of the text model, some of the vision-language model.",
        ),
        (lambda tensors: tensors.clear(), "text", "{source} has no tensors."),
        (
            lambda tensors: tensors.update({FIRST: torch.zeros(2, 2, dtype=torch.uint16)}),
            "vision-language",
            "{source}/adapter_model.safetensors holds U16, which can't be copied.",
        ),
    ],
)
def test_errors_of_names(
    saved: tuple[dict[str, Path], Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Tensor]], Any],
    to: str,
    expected: str,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(saved[0]["text/text"], source)
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    save_file(tensors, source / WEIGHTS)
    assert error_of(source, tmp_path / "out", to, capsys) == expected.format(source=source)
    assert not (tmp_path / "out").exists()


def error_of(source: Path, out: Path, to: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(source), str(out), "--to", to]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.removeprefix("error: ").replace("\n       ", "\n").removesuffix("\n")


def test_errors_of_folders(
    saved: tuple[dict[str, Path], Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved[0]["text/text"]
    assert error_of(tmp_path, tmp_path / "out", "text", capsys) == (
        f"{tmp_path} is no adapter: it has no {CONFIG}.\nAn adapter is {CONFIG} and {WEIGHTS}."
    )
    assert error_of(source, source, "vision-language", capsys) == (
        f"{source} holds {CONFIG} already. Name a folder that is empty or isn't there."
    )
    (tmp_path / "taken").write_text("")
    assert error_of(source, tmp_path / "taken", "vision-language", capsys) == (
        f"{tmp_path / 'taken'} is a file. Name a folder that is empty or isn't there."
    )


# --- names one by one


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("model.layers.3.self_attn.o_proj", "model.language_model.layers.3.self_attn.o_proj"),
        (
            "base_model.model.model.layers.0.x.lora_A.weight",
            "base_model.model.model.language_model.layers.0.x.lora_A.weight",
        ),
        (r"model\.layers\.1\.mlp\.experts\.down_proj", r"model\.language_model\.layers\.1\.mlp\.experts\.down_proj"),
        (r"^model.layers.[12].x", r"^model.language_model.layers.[12].x"),
        (r".*model\.layers\.1\.x", r".*model\.language_model\.layers\.1\.x"),
    ],
)
def test_respelling(text: str, whole: str) -> None:
    assert (respell(text, "vision-language"), respell(whole, "text")) == (whole, text)
    assert (respell(text, "text"), respell(whole, "vision-language")) == (text, whole)
    assert (spelling_of(text), spelling_of(whole)) == ("text", "vision-language")


@pytest.mark.parametrize("name", ["o_proj", "layers.3.self_attn.o_proj", "lm_head", "model.visual.blocks.0.x", "model"])
def test_names_that_both_models_spell_alike(name: str) -> None:
    assert spelling_of(name) is None
    assert (respell(name, "text"), respell(name, "vision-language")) == (name, name)


def test_an_ending_in_the_vision_language_spelling() -> None:
    assert respell("language_model.layers.3.self_attn.o_proj", "text") == "model.layers.3.self_attn.o_proj"
