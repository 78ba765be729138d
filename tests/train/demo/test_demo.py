"""The demo: its checkpoint against transformers, its rows, and the whole job in a few steps."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import load_model
from models.checkpoint.hub import HubCheckpoint
from models.convert.__main__ import main as convert
from models.registry import architecture_for
from quant.storage import StorageSpec
from tests.helpers import key_map_for, relative_error
from tests.processes import LIMIT
from train.__main__ import main as train
from train.data.template_files import load_chat_template
from train.data.tokenizer import load_tokenizer
from train.demo import __main__ as demo
from train.demo import checkpoint as demo_checkpoint
from train.demo import models as demo_models
from train.demo.text import distinct_problems, in_prose, in_yaml, record_problem
from train.generate.__main__ import main as generate

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    demo.prepare(path)
    return path


def rows_of(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_problems_are_solved_rightly() -> None:
    for problem in distinct_problems(500, seed=3):
        first, sign, second = problem.record["sum"].split()
        result = int(first) + int(second) if sign == "+" else int(first) - int(second)
        assert problem.record["answer"] == str(result)
        assert f"{problem.record['sum']} = {result} {problem.record['unit']}" in problem.prose
        # The question gives the same numbers, in the same order, and the same things.
        assert re.findall(r"\d+", problem.question) == [first, second]
        assert f" {problem.record['unit']}" in problem.question
        messages = in_yaml(problem)["messages"]
        assert (
            messages[1]["content"]
            == f"{{sum: {first} {sign} {second}, answer: {result}, unit: {problem.record['unit']}}}"
        )
        assert in_yaml(record_problem(problem))["messages"][1] == messages[1]
        assert in_prose(problem)["messages"][0] == messages[0]


def test_no_held_out_question_is_trained_on(folder: Path) -> None:
    asked: dict[str, list[str]] = {}
    for name in ("base_train", "base_eval", "tuning_train", "tuning_eval"):
        asked[name] = [messages[0]["content"] for messages in rows_of(folder / "data" / f"{name}.jsonl")]
    seen = {*asked["base_train"], *asked["tuning_train"]}
    word_problems = [question for question in asked["base_eval"] if not question.startswith("Write")]
    assert len(word_problems) > 50
    assert not seen & {*word_problems, *asked["tuning_eval"]}
    assert len(asked["tuning_eval"]) == len(asked["base_eval"]) == demo.HELD_OUT_ROWS


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    demo.prepare(tmp_path)
    assert [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()] == files
    assert all((tmp_path / file).read_bytes() == (folder / file).read_bytes() for file in files)
    # Preparing again what is there already touches no file.
    times = [(tmp_path / file).stat().st_mtime_ns for file in files]
    demo.prepare(tmp_path)
    assert [(tmp_path / file).stat().st_mtime_ns for file in files] == times


# What the files of some hold beside the tensors that transformers' model has: a layer for multi-token prediction.
CARRIED = {
    "glm4_moe_lite": ("model.layers.4.", 42),
    "glm4_moe": ("model.layers.4.", 42),
    "glm_moe_dsa": ("model.layers.4.", 47),
    "qwen3_5_moe": ("mtp.", 41),
}
NOTHING = ("none", 0)


@pytest.mark.parametrize("model_type", demo_models.MODELS)
def test_the_checkpoint_is_one_of_the_hub(model_type: str, tmp_path: Path) -> None:
    import transformers

    start = tmp_path / "start"
    demo_checkpoint.write_checkpoint(start, model_type, seed=0)
    written = json.loads((start / "config.json").read_text())
    assert written["model_type"] == model_type
    reference = getattr(transformers, written["architectures"][0]).from_pretrained(start)
    reference.save_pretrained(tmp_path / "theirs")
    ours, theirs = HubCheckpoint(start), HubCheckpoint(tmp_path / "theirs")
    prefix, count = CARRIED.get(model_type, NOTHING)
    extra = {key for key in ours if key.startswith(prefix)}
    assert len(extra) == count
    assert set(ours) - extra == set(theirs)
    assert all(ours.shape(key) == theirs.shape(key) and ours.dtype(key) == "F32" for key in theirs)
    index = json.loads((start / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(ours)
    assert len(set(index.values())) == demo_checkpoint.SHARDS > 1

    # Longer than Trinity's window and than the number of keys that GLM-5's indexer selects.
    tokens = torch.randint(0, demo_models.VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))
    model = load_model(start, storage="none", dtype=torch.float32)
    assert 1_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    with torch.no_grad():
        assert relative_error(model(tokens), reference(tokens).logits) <= 1e-5


def test_every_matrix_can_be_quantised() -> None:
    for model_type, entry in demo_models.MODELS.items():
        architecture = architecture_for(entry.config, model_type)
        config = architecture.parse_config(entry.config, model_type)
        # A shape that can't be blocked would be an error.
        assert any(key.spec == StorageSpec("nf4") for key in key_map_for(architecture.build_model, config, "nf4").keys)


@pytest.mark.parametrize("model_type", ["afmoe", "qwen3_5_moe"])
def test_initial_values_suit_training_from_scratch(model_type: str, tmp_path: Path) -> None:
    demo_checkpoint.write_checkpoint(tmp_path, model_type, seed=0)
    model = load_model(tmp_path, storage="none", dtype=torch.float32)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        leaf = name.rpartition(".")[2]
        if "norm" in name:
            zero_centred = model_type == "qwen3_5_moe" and ".linear_attn." not in name
            assert torch.equal(tensor, torch.full_like(tensor, 0.0 if zero_centred else 1.0)), name
        elif leaf == "e_score_correction_bias":
            assert not tensor.any(), name
        elif leaf == "A_log":
            assert 0 <= tensor.min() < tensor.max() <= math.log(16), name
        elif leaf == "dt_bias":
            step = torch.nn.functional.softplus(tensor)
            assert 0.00099 < step.min() < step.max() < 0.1001, name
        elif ".conv1d." in name:
            assert 0.45 < tensor.std() < 0.55, name
        else:
            assert 0.07 < tensor.std() < 0.11, name
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    assert len(biases) == (3 if model_type == "afmoe" else 0)
    assert len([name for name in tensors if name.endswith("A_log")]) == (0 if model_type == "afmoe" else 3)


def test_an_architecture_that_the_demo_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["prepare", str(tmp_path / "demo"), "--arch", "llama"]) == 2
    assert capsys.readouterr().err == (
        "error: the demo has no architecture 'llama'. Choose one of afmoe, glm4_moe, glm4_moe_lite, glm_moe_dsa, "
        "qwen3_5_moe, qwen3_5_moe_text, qwen3_moe.\n"
    )
    assert not (tmp_path / "demo").exists()


def test_tokenizer_and_template_mean_the_same_to_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder / "start")
    tokenizer = load_tokenizer(folder / "start")
    template = load_chat_template(folder / "start", tokenizer.special_tokens)
    assert template is not None
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Mia has 4 pens and buys 3 more."},
        {"role": "assistant", "content": "7", "reasoning_content": "4 + 3"},
        {"role": "user", "content": "And now – 2 less? ½ of it?\n"},
        {"role": "assistant", "content": "{sum: 7 - 2, answer: 5}", "reasoning_content": "7 - 2"},
    ]
    for count in (2, 3, 5):
        for prompt in (False, True):
            text = template.render(turns[:count], add_generation_prompt=prompt)
            expected = reference.apply_chat_template(
                turns[:count], add_generation_prompt=prompt, tokenize=True, return_dict=False
            )
            assert tokenizer.encode(text) == expected
    text = template.render(turns)
    assert text.startswith("[gMASK]<sop><|system|>Be brief.<|user|>Mia")
    assert "<|assistant|></think>7<|user|>" in text, "earlier reasoning is dropped"
    assert text.endswith("<|assistant|><think>7 - 2</think>{sum: 7 - 2, answer: 5}")
    assert tokenizer.token(tokenizer.eos_id or 0) == "<|endoftext|>"
    assert {tokenizer.token(i) for i in tokenizer.eos_ids} == {"<|endoftext|>", "<|user|>", "<|observation|>"}


def test_the_template_refuses_roles_that_it_does_not_know(folder: Path) -> None:
    from train.data.chat import RenderError

    template = load_chat_template(folder / "start", {})
    assert template is not None
    with pytest.raises(RenderError, match="roles are system, user and assistant, not tool"):
        template.render([{"role": "tool", "content": "x"}])


# The architectures, and how the names of their configs begin.
DEMOS = re.findall(r"^TINY_(\w+) := (\w+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


# What every change is tried on; the others are alike, and marked slow.
QUICK = ("glm4_moe_lite",)


@pytest.mark.parametrize(
    ("model_type", "configs"),
    [pytest.param(*demo, id=demo[0], marks=() if demo[0] in QUICK else pytest.mark.slow) for demo in DEMOS],
)
def test_the_whole_demo_in_a_few_steps(
    model_type: str,
    configs: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("BASE_ROWS", 120), ("TUNING_ROWS", 80), ("HELD_OUT_ROWS", 10)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.chdir(tmp_path)
    folder = "outputs/demo" if model_type == demo_models.DEFAULT else f"outputs/demo-{model_type}"
    out = Path(folder)
    pretrain, qlora = (
        ["--config", str(ROOT / "configs" / f"{configs}_{step}.yaml"), "--set", "train.max_steps=3"]
        for step in ("pretrain", "qlora")
    )

    assert demo.main(["report", folder]) == 2
    message = capsys.readouterr().err
    command = "make demo" if model_type == demo_models.DEFAULT else f"make demo ARCH={model_type}"
    assert message == f"error: {folder}/base: this run has not finished. `{command}` goes on where it stopped.\n"

    def all_but_the_report() -> list[int]:
        return [
            demo.main(["prepare", folder, "--arch", model_type]),
            train(pretrain),
            convert([str(out / "base" / "model"), str(out / "base-nf4"), "--storage", "nf4"]),
            train(qlora),
        ]

    assert all_but_the_report() == [0, 0, 0, 0]
    assert demo.main(["report", folder]) == 0
    shown = capsys.readouterr().out
    for run, name in (("base", "base: word problems in prose"), ("qlora", "QLoRA: word problems in YAML")):
        figures = json.loads((out / run / "run.json").read_text())
        before, after = figures["held_out_loss_before"], figures["held_out_loss_after"]
        assert after < before
        assert re.search(rf"{name} +{before:.3f} +{after:.3f}\n", shown)
    for name in ("adapter", "metrics.jsonl", "loss.png"):
        assert str(out / "qlora" / name) in shown
        assert (out / "qlora" / name).exists()
    assert (out / "qlora" / "adapter" / "adapter_config.json").is_file()
    asked = [str(out / "base-nf4"), "--max-new-tokens", "4", "--prompt", "How many?"]
    assert [generate(asked), generate([*asked, "--adapter", str(out / "qlora" / "adapter")])] == [0, 0]
    assert capsys.readouterr().out.count("\n") >= 2
    # What nothing computed with has come through the base's training.
    start, base = HubCheckpoint(out / "start"), HubCheckpoint(out / "base" / "model")
    assert set(start) == set(base)
    assert any(key.startswith("model.visual.") for key in base) == (model_type == "qwen3_5_moe")
    for key in (key for key in base if key.startswith((CARRIED.get(model_type, NOTHING)[0], "model.visual."))):
        assert torch.equal(start.tensor(key), base.tensor(key)), key

    if model_type != demo_models.DEFAULT:
        return
    # Again: everything is there already, nothing is computed anew.
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert all_but_the_report() == [0, 0, 0, 0]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == written
    assert capsys.readouterr().out.count("there is nothing left to do") == 2


def test_the_question_that_it_ends_with_is_held_out(folder: Path) -> None:
    question = re.search(r"^QUESTION := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert question is not None
    assert rows_of(folder / "data" / "tuning_eval.jsonl")[0][0]["content"] == question[1]
    for name in ("base_train", "tuning_train"):
        assert all(messages[0]["content"] != question[1] for messages in rows_of(folder / "data" / f"{name}.jsonl"))


def test_help_has_an_example() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train.demo", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0
    assert "python -m train.demo prepare outputs/demo" in done.stdout
