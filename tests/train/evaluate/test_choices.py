"""Multiple choice: log-likelihoods against transformers, and what a row may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.peft_helpers import peft_load, peft_make
from tests.run_helpers import World, make_world
from train.evaluate.__main__ import main
from train.evaluate.choices import parse_question
from train.rows.bad_rows import BadRow

QUESTIONS = [
    {"question": f"add {a} and {b}:", "choices": [f"{a} {b} = {a + b + d}" for d in wrong], "answer": 1}
    for a, b, wrong in ((1, 2, (1, 0)), (3, 4, (5, 0, 2)), (9, 9, (1, 0, 3, 7)), (5, 2, (1, 0)))
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(tmp_path: Path, *arguments: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    written = tmp_path / "scores.json", tmp_path / "rows.jsonl"
    options = ["--storage", "none", "--dtype", "float32", "--device", "cpu"]
    options += ["--json", str(written[0]), "--by-row", str(written[1])]
    assert main([*map(str, arguments), *options]) == 0
    return json.loads(written[0].read_text()), [json.loads(line) for line in written[1].read_text().splitlines()]


def log_likelihood(model: Any, start: list[int], rest: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([start + rest])).logits[0, len(start) - 1 : -1]
    return float(logits.double().log_softmax(-1).gather(1, torch.tensor(rest)[:, None]).sum())


@pytest.mark.parametrize("templated", [True, False])
def test_equals_transformers_and_peft(
    world: World, tmp_path: Path, templated: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32).eval()
    peft_make(reference, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["o_proj"])
    folder = tmp_path / "model"
    folder.mkdir()
    for file in world.model.iterdir():
        (folder / file.name).symlink_to(file)
    if not templated:
        described = json.loads((world.model / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps({**described, "chat_template": None}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = write(tmp_path / "questions.jsonl", QUESTIONS)
    found, rows = evaluated(tmp_path, folder, "--adapter", tmp_path / "adapter", "--data", data)
    model = peft_load(reference, tmp_path / "adapter")[0]
    hits = {"sum": 0, "mean": 0, "base": 0}
    for line, question in enumerate(QUESTIONS, 1):
        row = next(row for row in rows if row["line"] == line)
        asked = question["question"]
        if templated:
            turn = [{"role": "user", "content": asked}]
            asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        start = tokenizer.encode(asked, add_special_tokens=False)
        sums, means, base = [], [], []
        for choice in question["choices"]:
            rest = tokenizer.encode(choice, add_special_tokens=False)
            # GLM's turns end where the next begins; this template has no token of its own for it.
            rest.append(tokenizer.eos_token_id)
            assert tokenizer.encode(asked + choice, add_special_tokens=False) == start + rest[:-1]
            sums.append(log_likelihood(model, start, rest))
            means.append(sums[-1] / len(rest))
            base.append(log_likelihood(reference, start, rest))
        assert row["log_likelihoods"] == pytest.approx(sums, rel=1e-5)
        assert row["base_log_likelihoods"] == pytest.approx(base, rel=1e-5)
        assert sums != pytest.approx(base, rel=1e-3)
        right = question["answer"]
        others = [value for index, value in enumerate(sums) if index != right]
        assert row["margin"] == pytest.approx(sums[right] - max(others), abs=1e-4)
        for name, values in (("sum", sums), ("mean", means), ("base", base)):
            hits[name] += values.index(max(values)) == right
        assert row["chosen"] == sums.index(max(sums))
    assert (found["accuracy"], found["accuracy_normalized"]) == (hits["sum"] / 4, hits["mean"] / 4)
    assert found["base"]["accuracy"] == hits["base"] / 4
    assert (found["rows"], found["choices"]) == (4, 11)
    assert [row["margin"] for row in rows] == sorted(row["margin"] for row in rows)
    assert "accuracy" in capsys.readouterr().out


def test_rows_that_can_not_be_used_are_counted(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [
        {"question": "add", "choices": ["1", "2"]},
        {"question": "add " * 200, "choices": ["1", "2"], "answer": 0},
        {"question": "add", "choices": ["1", "2"], "answer": 2},
    ]
    data = write(tmp_path / "questions.jsonl", [*QUESTIONS[:1], *bad])
    found, rows = evaluated(tmp_path, world.model, "--data", data, "--set", "data.sequence_length=64")
    assert found["skipped_rows"] == {"missing_field": 1, "too_long": 1, "wrong_answer": 1}
    assert found["rows"] == len(rows) == 1 and found["base"] is None
    assert "3 rows of 4 not used" in capsys.readouterr().out
    assert main([str(world.model), "--data", str(write(tmp_path / "bad.jsonl", bad[::2])), "--format", "choices"]) == 2
    assert "none of 2 rows is a question that can be used" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "number"), [(1, 1), ("B", 1), ("two", 1), ("A", 0), ("three", 2)])
def test_an_answer_is_a_number_a_letter_or_the_text(answer: object, number: int) -> None:
    row = {"question": "?", "choices": ["one", "two", "three"], "answer": answer}
    assert parse_question(row).answer == number


def test_a_choice_s_text_comes_before_its_letter() -> None:
    assert parse_question({"question": "?", "choices": ["B", "A"], "answer": "A"}).answer == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"answer": True}, "answer must be a choice's number (from 0), text or letter, got True"),
        ({"answer": -1}, "got -1"),
        ({"answer": "D"}, "got 'D'"),
        ({"answer": "a"}, "got 'a'"),
        ({"answer": 1.0}, "got 1.0"),
        ({"answer": None}, "got None"),
        ({"question": ["?"]}, "question must be text, got a list"),
        ({"question": " "}, "question is empty"),
        ({"choices": ["one"]}, "choices must be a list of two or more texts"),
        ({"choices": "one"}, "choices must be a list of two or more texts"),
        ({"choices": ["one", 2]}, "choices must be a list of two or more texts"),
        ({"choices": ["one", "one"]}, "two choices are the same"),
    ],
)
def test_what_is_wrong_with_a_question(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRow) as error:
        parse_question({"question": "?", "choices": ["one", "two", "three"], "answer": 0, **changes})
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.fields={messages: question}", "data.fields and data.eval_fraction have no meaning for it"),
        ("data.format=text", "--set data.format=text has no effect"),
    ],
)
def test_settings_of_rows_are_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    data = write(tmp_path / "questions.jsonl", QUESTIONS)
    assert main([str(world.model), "--data", str(data), "--format", "choices", "--set", setting]) == 2
    assert message in capsys.readouterr().err
