"""The command on a model that was taught a few answers, against transformers' generate on the same checkpoint."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from quant.common.errors import NibbleError
from tests.generate_helpers import BUTTONS, CUPS, PROSE, YAML, run, write_rows
from tests.peft_helpers import packed_by_expert
from tests.processes import LIMIT
from train.generate.answers import Answerer

ROOT = Path(__file__).parents[3]
GREEDY = "greedy, at most 512 new tokens, stops at <|endoftext|>, <|user|>, <|observation|>\n"


@pytest.fixture(scope="module")
def base(taught_demo: Path) -> str:
    return str(taught_demo / "base-nf4")


@pytest.fixture(scope="module")
def adapter(taught_demo: Path) -> str:
    return str(taught_demo / "qlora" / "adapter")


def test_a_prompt_is_answered(base: str, adapter: str) -> None:
    for question, answer in PROSE.items():
        assert run([base, "--prompt", question]) == (0, f"{answer}\n", GREEDY)
    assert run([base, "--adapter", adapter, "--prompt", BUTTONS]) == (0, f"{YAML[BUTTONS]}\n", GREEDY)


def test_an_adapter_in_another_layout(base: str, adapter: str, tmp_path: Path) -> None:
    packed = str(packed_by_expert(Path(adapter), tmp_path / "packed", 4))
    asked = [base, "--adapter", packed, "--prompt", BUTTONS]
    assert run([*asked, "--layout", "expert-major"])[:2] == (0, f"{YAML[BUTTONS]}\n")
    config = Path(packed, "adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_B_layout": "grouped_by_expert"}))
    assert "which is the layout expert-major, not peft" in run([*asked, "--layout", "peft"])[2]


def test_tokens_and_text_are_those_of_transformers(taught_demo: Path, tmp_path: Path) -> None:
    """Greedy, of prompts in the template and of plain ones, in batches, where the model was taught nothing too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = taught_demo / "base" / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).float()

    def theirs(ids: list[int]) -> dict[str, Any]:
        with torch.no_grad():
            new = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        ends = model.generation_config.eos_token_id
        stopped = new[-1] in ends
        new = new[:-1] if stopped else new
        text = tokenizer.decode(new, skip_special_tokens=True)
        return {"text": text, "tokens": new, "finish": "stop" if stopped else "length"}

    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "7 cups", "reasoning_content": "so many"},
        {"role": "user", "content": "And pens?"},
    ]
    rows: list[dict[str, Any]] = [
        {"id": 1, "prompt": "What are 7 pens?"},
        {"prompt": BUTTONS},
        {"messages": chat, "note": {"ünïcode": [1, None]}},
        {"prompt": CUPS, "id": "x"},
        {"prompt": "Lea"},
    ]
    prompts = write_rows(tmp_path / "prompts.jsonl", *rows)

    def templated(messages: list[dict[str, str]]) -> list[int]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer.encode(text, add_special_tokens=False))

    arguments = [str(folder), "--prompts", str(prompts), "--storage", "none", "--dtype", "float32"]
    arguments += ["--max-new-tokens", "12"]
    asked = [templated(row.get("messages") or [{"role": "user", "content": row["prompt"]}]) for row in rows]
    expected = [row | theirs(ids) for row, ids in zip(rows, asked, strict=True)]
    assert {row["finish"] for row in expected} == {"stop", "length"}
    for size in ("2", "8"):
        out = tmp_path / f"out{size}.jsonl"
        code, shown, said = run([*arguments, "--batch-size", size, "--out", str(out)])
        assert (code, shown) == (0, "")
        assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == expected
        new = sum(len(row["tokens"]) for row in expected)
        assert f"5 rows, {new} new tokens, " in said
    plain = write_rows(tmp_path / "plain.jsonl", {"prompt": "Lea has"})
    arguments[2] = str(plain)
    assert run([*arguments, "--plain", "--out", str(tmp_path / "p")])[0] == 0
    assert json.loads((tmp_path / "p").read_text()) == {"prompt": "Lea has"} | theirs(tokenizer.encode("Lea has"))


def test_a_stop_text_ends_the_answer_within_tokens(base: str, tmp_path: Path) -> None:
    assert run([base, "--prompt", BUTTONS, "--stop", "tons"])[1] == "That makes 6 + 3 = 9 but\n"
    prompts = write_rows(tmp_path / "prompts.jsonl", {"prompt": BUTTONS}, {"prompt": CUPS})
    out = tmp_path / "out.jsonl"
    assert run([base, "--prompts", str(prompts), "--out", str(out), "--stop", " = 9", "--max-new-tokens", "11"])[0] == 0
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert (first["text"], first["finish"]) == ("That makes 6 + 3", "stop")
    assert (second["finish"], len(second["tokens"])) == ("length", 11)


def test_the_same_seed_draws_the_same(base: str) -> None:
    def drawn(*options: str) -> str:
        return run([base, "--prompt", "Hello", "--temperature", "2", "--max-new-tokens", "6", *options])[1]

    assert drawn("--seed", "1") == drawn("--seed", "1") != drawn("--seed", "2")
    assert drawn() != drawn()
    # The one token that is left.
    assert drawn("--top-k", "1") == drawn("--min-p", "1") == drawn("--top-p", "1e-9") == drawn("--temperature", "0")


def test_a_prompt_without_a_template_is_continued(base: str, taught_demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (taught_demo / "base" / "model").iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).symlink_to(path)
    arguments = ["--max-new-tokens", "5", "--prompt", "Mia has 7"]
    assert run([str(folder), *arguments])[:2] == run([base, "--plain", *arguments])[:2]
    code, shown, said = run([str(folder)], ["Hello"])
    assert (code, shown) == (2, "")
    assert f"error: {folder}: no chat template (chat_template.jinja, " in said and "which a chat needs" in said
    rows = write_rows(tmp_path / "rows.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    code, _, said = run([str(folder), "--prompts", str(rows), "--out", str(tmp_path / "out")])
    assert code == 2 and f"{rows}:1: {folder}: no chat template" in said


def test_template_variables(base: str) -> None:
    thinking = run([base, "--prompt", BUTTONS, "--template-variable", "enable_thinking=true", "--max-new-tokens", "5"])
    assert thinking[0] == 0 and thinking[1] != f"{PROSE[BUTTONS]}\n"
    assert run([base, "--prompt", BUTTONS, "--template-variable", "enable_thinking=false"])[1] == f"{PROSE[BUTTONS]}\n"
    code, _, said = run([base, "--prompt", BUTTONS, "--template-variable", "thinking=1"])
    assert code == 2 and "error: --template-variable: " in said and "enable_thinking" in said


def test_a_run_by_its_config(base: str, taught_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "model": {"path": base, "storage": "nf4", "dtype": "float32"},
        "data": {"train": "rows.jsonl"},
        "output": {"dir": str(taught_demo / "qlora")},
    }
    file = tmp_path / "run.yaml"

    def asked(*options: str) -> tuple[int, str, str]:
        file.write_text(yaml.safe_dump(config))
        return run(["--config", str(file), "--prompt", BUTTONS, *options])

    code, shown, said = asked()
    assert (code, shown) == (0, f"{YAML[BUTTONS]}\n")
    assert said == f"result of the run: {taught_demo}/qlora/adapter\n{GREEDY}"
    code, _, said = asked("--storage", "int8")
    assert code == 2 and "is converted to nf4" in said
    config["adapter"] = {"kind": "none"}
    config["model"] = {"path": "not read", "storage": "none", "dtype": "float32"}
    config["output"] = {"dir": str(taught_demo / "base")}
    assert asked()[:2] == (0, f"{PROSE[BUTTONS]}\n")
    # Of two results the one with the lower held-out loss, as the run's last line and --push have it.
    run_folder = tmp_path / "kept"
    run_folder.mkdir()
    (run_folder / "model").symlink_to("nowhere", target_is_directory=True)
    (run_folder / "model-best").symlink_to(taught_demo / "base" / "model")
    config["output"] = {"dir": str(run_folder)}
    config["train"] = {"keep_best": True, "eval_every": 1}
    assert "no result yet" in asked()[2]
    (run_folder / "nowhere").mkdir()
    code, shown, said = asked()
    assert shown == f"{PROSE[BUTTONS]}\n" and said.startswith(f"result of the run: {run_folder}/model-best\n")
    config["output"] = {"dir": str(tmp_path / "unfinished")}
    code, _, said = asked()
    assert code == 2 and "the run has no result yet" in said and f"python -m train --config {file}" in said


@pytest.mark.parametrize("storage", ["none", "int8", "fp4"])
def test_a_hub_folder_in_any_storage(taught_demo: Path, storage: str) -> None:
    folder = str(taught_demo / "base" / "model")
    assert run([folder, "--prompt", CUPS, "--storage", storage, "--dtype", "float32"])[1] == f"{PROSE[CUPS]}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either MODEL or --config FILE is needed"),
        (["BASE", "--config", "x.yaml"], "either MODEL or --config FILE is needed"),
        (["BASE", "--prompt", "x", "--prompts", "y", "--out", "z"], "can't be given together"),
        (["BASE", "--prompts", "y"], "--prompts FILE and --out FILE go together"),
        (["BASE", "--out", "y"], "--prompts FILE and --out FILE go together"),
        (["BASE", "--prompts", "y", "--out", "nowhere/z"], "--out: nowhere/z is in a folder that is not there"),
        (["BASE", "--prompts", "y", "--out", "."], "--out: . is a folder"),
        (["", "--prompt", "x"], "model is given as an empty text"),
        (["BASE", "--adapter", "", "--prompt", "x"], "adapter is given as an empty text"),
        (["BASE", "--prompts", "y.parquet", "--out", "z"], "is a parquet file"),
        (["BASE", "--prompts", "y.jsonl", "--out", "z"], "--prompts: y.jsonl"),
        (["BASE", "--prompt", "x", "--batch-size", "0"], "--batch-size must be from 1"),
        (["BASE", "--prompt", "x", "--top-p", "3"], "--top-p must be above 0 and at most 1, got 3.0."),
        (["BASE", "--prompt", "x", "--adapter", "nowhere"], "--adapter: nowhere is no folder"),
        (["BASE", "--prompt", "x", "--storage", "int8"], "is converted to nf4"),
        (["BASE", "--prompt", "x", "--device", "tpu"], "device 'tpu' is not supported"),
        (["BASE", "--prompt", "x " * 600], "the model is made for 512, the answer included"),
        (["BASE", "--prompt", "", "--plain"], "the prompt is empty"),
        (["BASE", "--prompt", "\ud800"], "which is no character"),
        (["BASE", "--prompt", "x", "--template-variable", "x"], "expected NAME=VALUE"),
        (["nowhere", "--prompt", "x"], "nowhere doesn't exist"),
    ],
)
def test_what_cannot_be(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """All of it shows before the weights are read, but for a converted folder's storage."""
    monkeypatch.chdir(tmp_path)
    if "--storage" not in arguments:
        monkeypatch.setattr("train.generate.source.load_model", pytest.fail)
    code, shown, said = run([base if argument == "BASE" else argument for argument in arguments])
    assert (code, shown) == (2, "")
    error = said[said.index("error: ") :]
    assert message in error and len(error.splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


def test_an_answer_ends_at_the_models_last_position(base: str, tmp_path: Path) -> None:
    """Which is the 512th; a shorter prompt of the same batch goes on."""
    prompts = write_rows(tmp_path / "p.jsonl", {"prompt": "x " * 245}, {"prompt": "x"})
    arguments = [base, "--plain", "--prompts", str(prompts), "--temperature", "9", "--seed", "5", "--max-new-tokens"]
    assert run([*arguments, "30", "--out", str(tmp_path / "out")])[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    from train.data.tokenizer import load_tokenizer

    room = 512 - len(load_tokenizer(base).encode("x " * 245))
    assert 0 < room < 30
    assert [(len(row["tokens"]), row["finish"]) for row in rows] == [(room, "length"), (30, "length")]


def test_bad_rows_are_named_and_nothing_is_written(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.generate.source.load_model", pytest.fail)  # before the weights are read
    rows = write_rows(
        tmp_path / "rows.jsonl",
        {"prompt": "fine"},
        '{"prompt": "cut off',
        {"prompt": 7},
        {"question": "x"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"prompt": "x", "text": "mine"},
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"prompt": "x " * 600},
        {"prompt": "\ud800"},
    )
    out = tmp_path / "out.jsonl"
    code, shown, said = run([base, "--prompts", str(rows), "--out", str(out)])
    assert (code, shown) == (2, "")
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    lines = said.splitlines()[1:]
    for number, what in (
        (2, "not valid JSON"),
        (3, "prompt is a number, expected text"),
        (4, "no field 'prompt' or 'messages'; the row has question"),
        (5, "messages is empty"),
        (6, "messages ends with the assistant's turn"),
        (7, "the row has a field 'text'"),
        (8, "prompt and messages"),
        (9, "the chat template refuses the conversation: roles are"),
        (10, "the model is made for 512"),
        (11, "is no character"),
    ):
        assert lines[number - 2].startswith(f"{rows}:{number}: ") and what in lines[number - 2], lines[number - 2]
    assert lines[10] == f"error: {rows}: 10 rows can't be answered; nothing was generated."


@pytest.mark.usefixtures("signals_heeded")
def test_an_interrupted_file_goes_on(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same draws, whatever was done before; and not with another file's answers."""
    rows = [{"prompt": "x " * count, "id": count} for count in range(1, 6)]
    prompts, out = write_rows(tmp_path / "p.jsonl", *rows), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    command = [base, "--prompts", str(prompts), "--temperature", "3", "--seed", "4", "--batch-size", "2"]
    command += ["--max-new-tokens", "4", "--out"]
    assert run([*command, str(tmp_path / "whole.jsonl")])[0] == 0
    expected = (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "whole.jsonl"]

    real = Answerer.answer
    asked: list[int] = []

    def answer(self: Answerer, batch: Any, turn: int = 0, *rest: Any) -> Any:
        asked.append(turn)
        if asked == [0, 2]:
            signal.raise_signal(signal.SIGINT)
        return real(self, batch, turn, *rest)

    monkeypatch.setattr(Answerer, "answer", answer)
    code, _, said = run([*command, str(out)])
    assert code == 130 and said.endswith("interrupted; the same command goes on after the batches that are done\n")
    assert not out.exists()
    begun = partial.read_bytes()
    assert begun.count(b"\n") == 2

    for other in (["--top-k", "3"], ["--batch-size", "1"], ["--seed", "5"], ["--stop", "x"], ["--plain"]):
        code, _, said = run([*command, str(out), *other])
        assert code == 2 and f"error: {partial} is there already, and holds no answers to these prompts" in said, other
    write_rows(prompts, *rows[1:])
    assert run([*command, str(out)])[0] == 2 and partial.read_bytes() == begun
    write_rows(prompts, *rows)
    partial.write_bytes(begun + b'{"start": 2, "answers": [{"te')  # killed while it was written

    code, _, said = run([*command, str(out)])
    assert code == 0 and f"{partial}: 2 rows of 5 are done already\n" in said
    assert asked == [0, 2, 2, 4]
    assert out.read_bytes() == expected
    assert not partial.exists() and len(list(tmp_path.iterdir())) == 3

    out.unlink()
    partial.write_bytes(begun[:20])  # killed in its first line
    with monkeypatch.context() as full:
        full.setattr("train.generate.prompts.write_atomically", lambda *_: (_ for _ in ()).throw(NibbleError("full")))
        assert run([*command, str(out)])[0] == 2
    assert not out.exists() and partial.read_bytes().startswith(begun)
    monkeypatch.setattr("train.generate.source.load_model", pytest.fail)  # nothing is left to be computed
    assert run([*command, str(out)])[0] == 0 and out.read_bytes() == expected


def test_an_answer_that_is_cut_off_says_so(base: str) -> None:
    code, _, said = run([base, "--prompt", BUTTONS, "--max-new-tokens", "3"])
    assert code == 0 and said.splitlines()[1:] == ["(cut off: --max-new-tokens 3, or the model's last position)"]


def test_several_processes_are_refused(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, shown, said = run([base, "--prompt", "x"])
    assert (code, shown) == (2, "") and "error: generating is the work of one process" in said


def test_an_answer_file_is_not_overwritten(base: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    code, _, said = run([base, "--prompts", str(write_rows(tmp_path / "p.jsonl", {"prompt": "x"})), "--out", str(out)])
    assert code == 2 and said == f"error: --out: {out} is there already. Choose another name, or remove it.\n"
    assert out.read_text() == "mine"


def test_help_needs_no_torch() -> None:
    code = """import runpy, sys
sys.argv = ['', '--help']
try:
    runpy.run_module('train.generate', run_name='__main__')
finally:
    assert 'torch' not in sys.modules"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    assert "python -m train.generate outputs/demo/base-nf4 --adapter" in done.stdout
