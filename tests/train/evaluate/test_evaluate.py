"""`python -m train.evaluate` on rows: against the run's own loss, and against transformers with PEFT."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from models import convert
from tests.peft_helpers import packed_by_expert, peft_load
from tests.processes import run_commands
from tests.run_helpers import ROOT, World, make_world, messages, questions, settings
from train import __main__ as training
from train.config.sections import DataConfig
from train.data.load import Texts
from train.data.template_files import load_chat_template
from train.data.tokenizer import load_tokenizer
from train.evaluate.__main__ import main, parser

Run = tuple[World, Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A world, and the folder of a finished run whose config lies beside it."""
    world = make_world(tmp_path_factory.mktemp("world"))
    out = world.model.parent / "out"
    changes = {"train__max_steps": 3, "train__learning_rate": 3e-2, "model__storage": "none"}
    assert training.main(settings(world, out, **changes)) == 0
    return world, out


def evaluated(tmp_path: Path, *arguments: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The JSON of a command, and its rows."""
    written = tmp_path / "scores.json", tmp_path / "rows.jsonl"
    options = ["--device", "cpu", "--json", str(written[0]), "--by-row", str(written[1])]
    assert main([*map(str, arguments), *options]) == 0
    return json.loads(written[0].read_text()), [json.loads(line) for line in written[1].read_text().splitlines()]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments), "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    return shown[shown.index("error: ") :]


def near(found: float, expected: float, tolerance: float = 1e-5) -> bool:
    return abs(found - expected) <= tolerance * abs(expected)


def test_a_run_s_own_held_out_rows(run: Run, tmp_path: Path) -> None:
    """The rows that it split off, whatever the batches."""
    figures = json.loads((run[1] / "run.json").read_text())
    found, rows = evaluated(tmp_path, "--config", run[1] / "config.yaml", "--batch-tokens", 50)
    assert near(found["loss"], figures["held_out_loss_after"], 1e-6)
    assert near(found["base"]["loss"], figures["held_out_loss_before"], 1e-6)
    assert not near(found["loss"], found["base"]["loss"], 1e-2)
    assert found["rows"] == len(rows) == 10
    whole, _ = evaluated(tmp_path, "--config", run[1] / "config.yaml")
    assert near(found["loss"], whole["loss"]) and found["token_accuracy"] == whole["token_accuracy"]


def test_equals_transformers_and_peft(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    world, out = run
    file = tmp_path / "held.jsonl"
    file.write_text("\n" + messages(questions(12, seed=5)))
    options = ["--adapter", out / "adapter", "--data", file, "--storage", "none", "--dtype", "float32"]
    found, rows = evaluated(tmp_path, world.model, *options)
    tokenizer = load_tokenizer(world.model)
    template = load_chat_template(world.model, tokenizer.special_tokens)
    texts = Texts(DataConfig(train=str(file), sequence_length=512), tokenizer, template, 0)
    (examples, _), _ = texts.read(str(file), "data.train", lambda text: None)
    reference = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32).eval()
    with torch.no_grad():
        for model, figures, column in (
            (reference, found["base"], "base_loss"),
            (peft_load(reference, out / "adapter")[0], found, "loss"),
        ):
            losses, correct = dict[int, float](), 0
            for index in range(len(examples)):
                ids, mask = (torch.tensor(array[None].tolist()) for array in examples[index])
                labels = ids.masked_fill(~mask, -100)
                output = model(input_ids=ids, labels=labels)
                losses[index + 2] = float(output.loss)
                correct += int((output.logits[:, :-1].argmax(-1) == labels[:, 1:]).sum())
            tokens = examples.labelled
            mean = sum(loss * count for loss, count in zip(losses.values(), tokens, strict=True)) / tokens.sum()
            assert near(figures["loss"], mean) and near(figures["perplexity"], math.exp(mean), 1e-4)
            assert figures["token_accuracy"] == correct / tokens.sum()
            assert (figures["tokens"], figures["rows"]) == (tokens.sum(), 12)
            for row in rows:
                assert row["file"] == str(file) and near(row[column], losses[row["line"]])
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
    shown = capsys.readouterr().out
    assert "the base   with the adapter" in shown and f"{found['loss']:.4f}" in shown


def test_an_adapter_in_another_layout(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluated, asked, and trained on from: its option makes it what it was."""
    world, out = run
    packed = packed_by_expert(out / "adapter", tmp_path / "packed", 4)
    config, layout = ["--config", out / "config.yaml"], ("--layout", "expert-major")
    expected = evaluated(tmp_path, *config)[0]["loss"]
    assert near(evaluated(tmp_path, *config, "--adapter", packed, *layout)[0]["loss"], expected, 1e-6)
    assert not near(evaluated(tmp_path, *config, "--adapter", packed)[0]["loss"], expected, 1e-4)
    assert error_of(capsys, *config, *layout) == "error: --layout is about an adapter: give --adapter.\n"

    changes = {"train__max_steps": 1, "train__learning_rate": 1e-9, "model__storage": "none"}
    changes |= {"adapter__init_from": str(packed), "adapter__init_layout": "expert-major"}
    assert training.main(settings(world, tmp_path / "on", **changes)) == 0
    names = [folder / "adapter" / "adapter_model.safetensors" for folder in (out, tmp_path / "on")]
    before, after = map(load_file, names)
    assert all(torch.allclose(after[name], before[name], atol=1e-8) for name in before)


def test_a_converted_folder_is_read_as_it_is(run: Run, tmp_path: Path) -> None:
    world, _ = run
    for storage, dtype in (("nf4", "float32"), ("int8", "bfloat16")):
        folder = tmp_path / storage
        convert(world.model, folder, storage, dtype)
        options = ["--data", world.rows, "--set", "data.sequence_length=256"]
        found, _ = evaluated(tmp_path, folder, *options)
        assert (found["storage"], found["dtype"], found["base"]) == (storage, dtype, None)
        again, _ = evaluated(tmp_path, world.model, "--storage", storage, "--dtype", dtype, *options)
        assert found["loss"] == again["loss"]
    # Scales that aren't quantised again: asking for nf4 by name is asking for what is there.
    convert(world.model, tmp_path / "single", "nf4", "float32", double_quant=False)
    found, _ = evaluated(tmp_path, tmp_path / "single", "--data", world.rows, "--storage", "nf4", "--dtype", "float32")
    once, _ = evaluated(
        tmp_path, world.model, "--data", world.rows, "--dtype", "float32", "--set", "model.double_quant=false"
    )
    assert found["loss"] == once["loss"]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(run: Run, tmp_path: Path) -> None:
    world, out = run
    options = [world.model, "--adapter", out / "adapter", "--data", world.rows]
    options += ["--storage", "nf4", "--dtype", "float32", "--batch-tokens", 300]
    alone, rows = evaluated(tmp_path, *options)
    written = [str(tmp_path / "two.json"), str(tmp_path / "two.jsonl")]
    arguments = [*map(str, options), "--device", "cpu", "--json", written[0], "--by-row", written[1]]
    done = run_commands(2, "train.evaluate.__main__:main", arguments)
    assert [process.returncode for process in done] == [0, 0], done
    together = json.loads(Path(written[0]).read_text())
    assert near(together["loss"], alone["loss"]) and near(together["base"]["loss"], alone["base"]["loss"])
    assert together["rows"] == alone["rows"] == 96 and together["token_accuracy"] == alone["token_accuracy"]
    by_line = {row["line"]: row["loss"] for row in map(json.loads, Path(written[1]).read_text().splitlines())}
    assert all(near(by_line[row["line"]], row["loss"]) for row in rows)
    assert done[1].stdout == ""


def test_rows_that_do_not_fit_are_counted_and_said(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, _ = run
    turns = [("short", "fine"), ("long question " * 30, "never seen"), ("short too", "a long answer " * 30)]
    file = tmp_path / "held.jsonl"
    file.write_text(messages(turns) + "not JSON\n" + json.dumps({"messages": []}) + "\n")
    options = ["--data", file, "--storage", "none", "--set", "data.sequence_length=64"]
    found, rows = evaluated(tmp_path, world.model, *options)
    assert found["rows"] == 2 and [row["line"] for row in sorted(rows, key=lambda row: row["line"])] == [1, 3]
    assert found["skipped_rows"].pop("too_long") == found["skipped_rows"].pop("malformed_json") == 1
    assert sum(found["skipped_rows"].values()) == found["cut"] == 1
    shown = capsys.readouterr()
    assert "3 rows of 5 not used: " in shown.out and "1 too_long" in shown.out
    assert "1 example cut to 64 tokens (data.sequence_length)" in shown.out
    assert f"{file}:2: nothing to learn within data.sequence_length 64" in shown.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (lambda run, tmp: [run[0].model], "MODEL and --data FILE are needed, or --config of a run"),
        (lambda run, tmp: [run[0].model, "--data", tmp / "no.jsonl"], "no.jsonl: no such file"),
        (lambda run, tmp: [run[0].model, "--data", run[0].rows, "--adapter", tmp / "no"], "no: no such folder"),
        (
            lambda run, tmp: [run[0].model, "--data", run[0].rows, "--json", tmp / "no" / "x.json"],
            "--json: ",
        ),
        (lambda run, tmp: [run[0].model, "--data", run[0].rows, "--by-row", run[0].rows], "which this command reads"),
        (lambda run, tmp: [run[0].model, "--data", run[0].rows, "--adapter", ""], "adapter is given as an empty text"),
        (lambda run, tmp: ["", "--data", run[0].rows], "model is given as an empty text"),
        (
            lambda run, tmp: [run[0].model, "--data", run[0].rows, "--set", "data.eval_fraction=0.5"],
            "--set data.eval_fraction=0.5 has no effect on this evaluation: it is decided by what else is given",
        ),
        (
            lambda run, tmp: [run[0].model, "--data", run[0].rows, "--set", "train.learning_rate=5"],
            "--set train.learning_rate=5 has no effect on this evaluation: only a training reads that key",
        ),
        (lambda run, tmp: [run[0].model, "--data", run[0].rows, "--set", "model.path=x"], "--set model.path=x has no"),
        (
            lambda run, tmp: ["--config", run[1] / "config.yaml", "--storage", "nf4", "--set", "model.storage=int8"],
            "--set model.storage=int8 has no effect",
        ),
        (
            lambda run, tmp: [run[0].model, "--data", run[0].rows, "--set", "data.fromat=text"],
            "--set data.fromat=text: unknown key 'data.fromat'",
        ),
        (
            lambda run, tmp: [run[0].model, "--data", run[0].rows, "--set", "data.sequence_length=9999"],
            "9999 is more than the model is made for",
        ),
    ],
)
def test_what_is_wrong_is_said_before_the_weights_are_read(
    run: Run,
    tmp_path: Path,
    arguments: Callable[[Run, Path], list[Any]],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.evaluate.run.load_model", None)
    assert expected in error_of(capsys, *arguments(run, tmp_path))


def test_a_run_that_has_no_result_or_no_rows(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load((run[1] / "config.yaml").read_text())
    values["output"]["dir"] = str(tmp_path / "other")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert f"{path}: the run has no result yet: there is no {tmp_path}/other/adapter." in error_of(
        capsys, "--config", path
    )
    values["data"]["eval_fraction"] = None
    path.write_text(yaml.safe_dump(values))
    assert "has no held-out rows" in error_of(capsys, "--config", path)
    # With the files given it is what data.* says of them that is meant.
    options = ["--adapter", run[1] / "adapter", "--data", run[0].rows]
    found, _ = evaluated(tmp_path, run[0].model, "--config", path, *options)
    assert found["rows"] == 96


def test_weights_that_are_not_finite(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(run[1] / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.full_like(tensor, 1e30) for name, tensor in tensors.items()}, file)
    options = [run[0].model, "--adapter", tmp_path / "adapter", "--data", run[0].rows, "--storage", "none"]
    assert "rows.jsonl:1 is nan, and that of 96 documents of 96" in error_of(capsys, *options)


def test_the_commands_of_the_documentation_are_commands(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what its table and its JSON have is what is printed and written; the figures are those of the demo."""

    def masked(shown: str) -> str:
        table = shown[shown.index(" the base") :].partition("\n\n")[0]
        return re.sub(r"\d[\d.,]*", "#", " ".join(table.split()))

    text = (ROOT / "docs" / "evaluate.md").read_text()
    commands = re.findall(r"-m train\.evaluate (.*)", text.replace("\\\n", " "))
    assert len(commands) == 4
    for command in commands:
        parser().parse_args(shlex.split(command))
    shown = json.loads(text[text.index("    {\n") : text.index("    }\n") + 6])
    capsys.readouterr()
    found, rows = evaluated(tmp_path, "--config", run[1] / "config.yaml")
    assert masked(capsys.readouterr().out) == masked(text)
    assert list(shown) == list(found) and list(shown["base"]) == list(found["base"])
    row = json.loads(next(line for line in text.splitlines() if line.startswith('    {"file"')))
    assert list(row) == list(rows[0])
