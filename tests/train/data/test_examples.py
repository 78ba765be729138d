"""Rows to examples: cutting, splitting, bad rows and reports, the held-out part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from quant.common.errors import NibbleError
from tests.text_helpers import (
    Setup,
    say,
    write_json,
)
from train.data.chat import ChatTemplate
from train.data.examples import build_examples, split_examples
from train.data.tokenizer import load_tokenizer


def gsm8k_rows(count: int) -> list[dict[str, str]]:
    rows = []
    for i in range(count):
        a, b = 3 + i % 50, 2 + i % 7
        answer = f"She sold {a}*{b} = <<{a}*{b}={a * b}>>{a * b} clips.\n#### {a * b}"
        rows.append({"question": f"Natalia sold {a} clips to {b} friends each. How many clips?", "answer": answer})
    return rows


GSM8K = {"prompt": "question", "completion": "answer"}


def test_gsm8k_shaped_rows(tmp_path: Path) -> None:
    setup = Setup(tmp_path, "glm")
    rows = gsm8k_rows(1200)
    done: list[float] = []
    examples, report = setup.build(*rows, form="prompt_completion", fields=GSM8K, progress=done.append)
    assert len(examples) == report.rows == 1200
    assert report.skipped_rows == []
    for index in (0, 511, 512, 1199):
        assert setup.learnt(examples, index) == [rows[index]["answer"] + "<|user|>"]
    assert done == sorted(done)
    assert done[-1] == 1.0
    assert len(done) == 3
    assert (examples.tokens.dtype, examples.mask.dtype) == (np.int32, np.bool_)
    again, _ = setup.build(*rows, form="prompt_completion", fields=GSM8K)
    assert again.fingerprint() == examples.fingerprint()
    other, _ = setup.build(*rows[:-1], form="prompt_completion", fields=GSM8K)
    assert other.fingerprint() != examples.fingerprint()


def test_long_documents_are_cut_and_counted(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    told: list[str] = []
    row = {"prompt": "1 2 3 4 5", "completion": " 6 7 8 9 10 11"}
    whole, _ = setup.build(row, form="prompt_completion")
    examples, report = setup.build(
        row, row, {**row, "prompt": "1"}, form="prompt_completion", sequence_length=12, warn=told.append
    )
    assert examples.lengths.tolist() == [12, 12, 12]
    assert examples[0][0].tolist() == whole[0][0][:12].tolist()
    assert (report.cut, report.lost) == (3, 0)
    assert told[1] == (
        f"{setup.path}:2: {len(whole[0][0])} tokens, cut to data.sequence_length 12. 2 such rows so far."
    )


def test_a_long_text_is_split_and_every_token_of_it_learnt(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    told: list[str] = []
    text = " ".join(map(str, range(40)))
    whole, _ = setup.build({"text": text}, form="text")
    ids = whole[0][0].tolist()
    for limit in (2, 7, len(ids) - 1, len(ids)):
        examples, report = setup.build({"text": "1"}, {"text": text}, form="text", sequence_length=limit)
        parts = [examples[index] for index in range(1, len(examples))]
        assert all(2 <= len(tokens) <= limit for tokens, _ in parts)
        assert all(len(tokens) == limit for tokens, _ in parts[:-1])
        assert [int(token) for tokens, mask in parts for token in tokens[mask]] == ids[1:], "each once, in order"
        assert [*parts[0][0], *(token for tokens, _ in parts[1:] for token in tokens[1:])] == ids
        assert examples.rows.tolist() == [0] + [1] * len(parts)
        assert (report.split, report.cut, report.lost) == (int(limit < len(ids)), 0, 0)
        assert examples.total_labelled == 1 + len(ids) - 1
    setup.build({"text": text}, form="text", sequence_length=len(ids) - 1, warn=told.append)
    assert told == [
        f"{setup.path}:1: {len(ids)} tokens, split into 2 documents of at most data.sequence_length {len(ids) - 1}. "
        "1 such row so far."
    ]


def test_documents_with_nothing_left_after_cutting_are_bad_rows(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    told: list[str] = []
    long, short = {"prompt": "1 2 3 4 5 6", "completion": " 7"}, {"prompt": "1", "completion": " 2"}
    examples, report = setup.build(long, short, form="prompt_completion", sequence_length=5, warn=told.append)
    assert examples.rows.tolist() == [1]
    assert [row.reason for row in report.skipped_rows] == ["too_long"]
    count = len(setup.tokenizer.encode("1 2 3 4 5 6 7</s>"))
    assert told == [
        f"{setup.path}:1: nothing to learn within data.sequence_length 5 (the row has {count} tokens); row skipped "
        "(data.on_bad_row: skip). 1 such row so far."
    ]


def test_a_row_that_loses_some_of_its_examples_says_so(tmp_path: Path) -> None:
    glm = Setup(tmp_path, "glm")
    told: list[str] = []
    messages = say("q1", "a1", "q2 is a much longer question, with many tokens", "a2")
    messages[1]["reasoning_content"] = "r"
    examples, report = glm.build(messages, sequence_length=20, warn=told.append)
    assert (len(examples), report.lost, report.skipped_rows) == (1, 1, [])
    assert told == [
        f"{glm.path}:1: 1 of its 2 examples have nothing to learn within data.sequence_length 20. 1 such row so far."
    ]


def test_bad_rows_are_skipped_and_reported(tmp_path: Path) -> None:
    setup = Setup(tmp_path, "mistral")
    told: list[str] = []
    good = {"messages": say("q", "a")}
    rows = [
        good,
        {"messages": say("q", "a", "b")[::2]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "user", "content": "q"}, *say("q", "a")]},
        {"messages": say("q", "\ud800")},
        good,
    ]
    lines = [json.dumps(row) for row in rows]
    setup.path.write_text("\n".join([*lines, '{"messages"', ""]))
    examples, report = build_examples(
        setup.path,
        form="messages",
        tokenizer=setup.tokenizer,
        template=setup.template,
        sequence_length=64,
        warn=told.append,
    )
    assert examples.rows.tolist() == [0, 4]
    assert report.rows == 6
    assert [(row.line, row.reason) for row in report.skipped_rows] == [
        (2, "nothing_to_learn"),
        (3, "template_error"),
        (4, "malformed_json"),
        (6, "malformed_json"),
    ]
    assert told[1] == (
        f"{setup.path}:3: the chat template refuses the row: Conversation roles must alternate "
        "user/assistant/user/assistant/...; row skipped (data.on_bad_row: skip). 1 such row so far."
    )
    assert told[2].startswith(f"{setup.path}:4: not valid JSON: half of a surrogate pair ")

    with pytest.raises(NibbleError) as caught:
        setup.build(*rows, on_bad_row="error")
    assert str(caught.value) == (
        f"{setup.path}:2: messages has no assistant message, so there is nothing to learn (data.on_bad_row: error).\n"
        "Fix the row, or set data.on_bad_row: skip."
    )


def test_a_text_of_one_token_has_nothing_to_learn(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    (setup.folder / "generation_config.json").unlink()
    write_json(setup.folder / "tokenizer_config.json", {})  # no eos, which would be a second token
    setup.tokenizer = load_tokenizer(setup.folder)
    told: list[str] = []
    examples, report = setup.build({"text": "a"}, {"text": "ab"}, form="text", warn=told.append)
    assert examples.rows.tolist() == [1]
    assert [row.reason for row in report.skipped_rows] == ["nothing_to_learn"]
    assert told[1:] == [
        f"{setup.path}:1: no token is left to learn; row skipped (data.on_bad_row: skip). 1 such row so far."
    ]


def test_turns_of_which_the_template_writes_nothing(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.template = ChatTemplate("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(NibbleError, match=r"rows.jsonl:1: the chat template writes nothing for the assistant's turns"):
        setup.build(say("q", "a"))


def test_no_usable_row(tmp_path: Path) -> None:
    setup = Setup(tmp_path, "glm")
    with pytest.raises(NibbleError) as caught:
        setup.build(*gsm8k_rows(3))
    assert str(caught.value) == (
        f"data.train: none of the 3 rows of {setup.path} can be used (data.format, data.fields). The first:\n"
        f"{setup.path}:1: no field 'messages'; the row has question, answer. Set data.format: "
        "prompt_completion and data.fields: {prompt: question, completion: answer}"
    )
    with pytest.raises(NibbleError, match=r"^data.eval: .*rows.jsonl holds no rows\.$"):
        setup.build(key="data.eval")
    with pytest.raises(NibbleError, match=r"^data.eval: /nowhere/rows.jsonl: no such file"):
        build_examples(
            "/nowhere/rows.jsonl",
            form="text",
            tokenizer=setup.tokenizer,
            template=None,
            sequence_length=9,
            key="data.eval",
        )
    setup.template = None
    with pytest.raises(NibbleError, match=r"/model: no chat template \(chat_template.jinja, or chat_template in"):
        setup.build(say("q", "a"))


def test_held_out_rows(tmp_path: Path) -> None:
    glm = Setup(tmp_path, "glm")
    conversations = []
    for i in range(50):
        conversations.append(say(f"q{i}", f"a{i}", f"Q{i}", f"A{i}"))
        conversations[-1][1]["reasoning_content"] = f"r{i}"  # two examples of every row
    examples, _ = glm.build(*conversations)
    train, held_out = split_examples(examples, 0.1, seed=3)
    assert (train.total_rows, held_out.total_rows) == (45, 5)
    assert not set(train.rows) & set(held_out.rows)
    assert len(train) + len(held_out) == len(examples) == 100
    assert train.rows.tolist() == sorted(train.rows)
    assert train.total_labelled + held_out.total_labelled == examples.total_labelled
    assert f"Q{held_out.rows[1]}" in glm.text(held_out, 1), "a subset still finds its tokens"

    again, other = split_examples(examples, 0.1, seed=3)[1], split_examples(examples, 0.1, seed=4)[1]
    assert again.rows.tolist() == held_out.rows.tolist() != other.rows.tolist()
    assert again.fingerprint() == held_out.fingerprint() != other.fingerprint()
    assert split_examples(examples, 0.0001, seed=0)[1].total_rows == 1
    assert len(split_examples(examples, 0.0, seed=0)[1]) == 0

    one, _ = glm.build(say("q", "a"))
    with pytest.raises(NibbleError) as caught:
        split_examples(one, 0.1, seed=0)
    assert str(caught.value) == (
        "data.eval_fraction: 0.1 of 1 usable row leaves none to train on. Set it to null, or give held-out rows in "
        "data.eval."
    )
    with pytest.raises(IndexError, match="example 1 of 1"):
        one[1]
