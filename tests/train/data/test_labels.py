"""Which tokens carry loss, checked by decoding them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.text_helpers import (
    TEMPLATES,
    Setup,
    say,
    sentencepiece_model,
    write_json,
    write_lines,
)
from train.data.chat import ChatTemplate
from train.data.examples import build_examples
from train.data.tokenizer import load_tokenizer


def test_the_answer_and_the_end_of_the_turn_are_learnt(tmp_path: Path) -> None:
    qwen = Setup(tmp_path / "qwen", "qwen")
    examples, _ = qwen.build(say("What is 2 + 3?", "It is 5."))
    assert qwen.text(examples, 0).endswith("It is 5.<|im_end|>\n")
    assert qwen.learnt(examples) == ["It is 5.<|im_end|>"], "the newline is never generated"

    mistral = Setup(tmp_path / "mistral", "mistral")
    examples, _ = mistral.build(say("q1", "a1", "q2", "a2"))
    assert mistral.text(examples, 0) == "<s>[INST] q1 [/INST] a1</s>[INST] q2 [/INST] a2</s>"
    assert mistral.learnt(examples) == [" a1</s>", " a2</s>"]

    plain = Setup(tmp_path / "plain", "plain")
    examples, _ = plain.build(say("q1", "a1", "q2", "a2"))
    assert plain.learnt(examples) == [" a1\n", " a2\n</s>"], "no token ends a turn, so eos is appended to the last"


def test_a_template_without_end_of_turn_learns_the_next_speaker(tmp_path: Path) -> None:
    glm = Setup(tmp_path, "glm")
    examples, _ = glm.build(say("q1", "a1", "q2", "a2"))
    assert (
        glm.text(examples, 0)
        == "[gMASK]<sop><|user|>q1<|assistant|></think>a1<|user|>q2<|assistant|></think>a2<|user|>"
    )
    assert glm.learnt(examples) == ["a1<|user|>", "a2<|user|>"]

    call = {"function": {"name": "f", "arguments": '{"x": "1"}'}}
    tool = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "done", "reasoning_content": "s"},
    ]
    called = "r</think><tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call><|observation|>"
    examples, _ = glm.build(tool, tool[:2])
    assert glm.learnt(examples, 0) == [called, "s</think>done<|user|>"]
    assert glm.learnt(examples, 1) == [called]


def test_without_the_next_speaker_among_the_eos_ids_eos_is_appended(tmp_path: Path) -> None:
    glm = Setup(tmp_path, "glm")
    write_json(glm.folder / "generation_config.json", {"eos_token_id": 1})
    glm.tokenizer = load_tokenizer(glm.folder)
    examples, _ = glm.build(say("q1", "a1", "q2", "a2"))
    assert glm.learnt(examples) == ["a1", "a2</s>"]


def test_tokens_equal_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = None
    for name in TEMPLATES:
        setup = Setup(tmp_path / name, name)
        theirs = theirs or AutoTokenizer.from_pretrained(setup.folder)  # slow, and the same for all
        messages = say("What is 2 + 3?", "café 数学 🙂 5\n\n")
        expected = theirs.apply_chat_template(messages, chat_template=TEMPLATES[name], return_dict=False)
        ours = setup.build(messages)[0][0][0].tolist()
        assert ours[: len(expected)] == expected
        assert set(ours[len(expected) :]) <= setup.tokenizer.eos_ids
        assert len(ours) - len(expected) == (name in ("glm", "plain"))


def test_each_turn_of_a_rewriting_template_is_learnt_once_in_its_own_example(tmp_path: Path) -> None:
    glm = Setup(tmp_path, "glm")
    messages = say("q1", "a1", "q2", "a2", "q3", "a3")
    messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "r1", "r2"
    examples, report = glm.build(messages, say("q", "a"))
    assert examples.rows.tolist() == [0, 0, 0, 1]
    assert [glm.learnt(examples, i) for i in range(3)] == [
        ["r1</think>a1<|user|>"],
        ["r2</think>a2<|user|>"],
        ["a3<|user|>"],
    ]
    assert report.rows == 2


def test_turns_marked_not_to_train_are_context(tmp_path: Path) -> None:
    mistral = Setup(tmp_path, "mistral")
    messages = say("q1", "a1", "q2", "a2", "q3", "a3")
    messages[1]["train"], messages[5]["weight"] = False, 0
    examples, _ = mistral.build(messages)
    assert mistral.text(examples, 0) == "<s>[INST] q1 [/INST] a1</s>[INST] q2 [/INST] a2</s>"
    assert mistral.learnt(examples) == [" a2</s>"]


def test_a_token_that_begins_before_the_span_is_learnt(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    # One token, ' clips', straddles the prompt's last character.
    examples, _ = setup.build({"prompt": "sold 24 ", "completion": "clips"}, form="prompt_completion")
    assert setup.learnt(examples) == [" clips</s>"]
    examples, _ = setup.build({"prompt": "a", "completion": "🙂"}, form="prompt_completion")
    assert setup.learnt(examples) == ["🙂</s>"], "all four bytes of the character"


def test_what_a_prompt_without_thinking_says_is_not_learnt(tmp_path: Path) -> None:
    setup = Setup(tmp_path, "think")
    examples, report = setup.build(say("2 + 3?", "5"), say("2 + 3?", "5", reasoning_content="add"))
    assert setup.learnt(examples, 0) == ["5<|im_end|>"]
    assert setup.learnt(examples, 1) == ["add\n</think>\n\n5<|im_end|>"]

    # Cut before the answer nothing is left to learn, which is said.
    short = int(np.flatnonzero(examples[0][1])[0])
    examples, report = setup.build(say("2 + 3?", "5"), say("x", "5"), sequence_length=short)
    assert examples.rows.tolist() == [1]
    assert [row.reason for row in report.skipped_rows] == ["too_long"]


def test_a_prompt_counts_where_a_token_begins_after_it(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    head = "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{{ '<think>\n\n</think>' }}{% endif %}"
    tail = "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>%s{% endif %}"
    thinks = "{% if enable_thinking is defined %}{{ '<think>\n' }}{% endif %}"
    assert len(setup.tokenizer.encode("\n\n")) == 1 == len(setup.tokenizer.encode("\n"))
    # The longer prompt ends within the token of two newlines: it is another text to the model.
    setup.template = ChatTemplate(head + tail.replace("%s", thinks))
    assert setup.template.renderings(say("q", "a"), [False, True])[0].text.endswith("<think>\n\n</think>a")
    assert setup.learnt(setup.build(say("q", "a"))[0]) == ["<think>\n\n</think>a</s>"]
    # Where it is the only one, the token that differs is learnt.
    setup.template = ChatTemplate(head + tail.replace("%s", "{{ '<think>\n' }}"))
    assert setup.learnt(setup.build(say("q", "a"))[0]) == ["\n\n</think>a</s>"]


def test_masks_equal_those_of_a_template_that_marks_the_turns(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    setup = Setup(tmp_path, "marked")
    theirs = AutoTokenizer.from_pretrained(setup.folder)
    for messages in (say("q1", "a1", "q2", " a2 \n", "q3"), say("2 + 3?", "café 数学 🙂 5")):
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        tokens, mask = setup.build(messages)[0][0]
        assert tokens.tolist() == expected["input_ids"][: len(tokens)]
        assert mask.astype(int).tolist() == expected["assistant_masks"][: len(tokens)]
        assert not any(expected["assistant_masks"][len(tokens) :])


def test_prompt_and_completion_with_and_without_a_template(tmp_path: Path) -> None:
    row = {"prompt": "2 + 3 =", "completion": " 5"}
    plain = Setup(tmp_path / "plain")
    examples, _ = plain.build(row, form="prompt_completion")
    assert plain.text(examples, 0) == "2 + 3 = 5</s>"
    assert plain.learnt(examples) == [" 5</s>"]
    glm = Setup(tmp_path / "glm", "glm")
    examples, _ = glm.build(row, form="prompt_completion")
    assert glm.text(examples, 0) == "[gMASK]<sop><|user|>2 + 3 =<|assistant|></think>5<|user|>"
    assert glm.learnt(examples) == ["5<|user|>"]


def test_text_is_learnt_from_its_second_token(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    examples, _ = setup.build({"text": "The quick brown fox"}, form="text")
    tokens, mask = examples[0]
    assert setup.tokenizer.decode(tokens) == "The quick brown fox</s>"
    assert not mask[0]
    assert mask[1:].all()
    assert examples.total_labelled == examples.total_tokens - 1


def test_documents_begin_as_the_tokenizer_begins_them(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    rows = write_lines(tmp_path / "rows.jsonl", {"prompt": "Is 2 + 3 ", "completion": "naïve 🙂?"})
    settings: dict[str, Any] = {"tokenizer": tokenizer, "template": None, "sequence_length": 99}
    examples, _ = build_examples(rows, form="prompt_completion", **settings)
    tokens, mask = examples[0]
    assert tokens[0] == tokenizer.bos_id
    assert tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(tokens[mask]).strip() == "naïve 🙂?</s>"
    assert tokenizer.decode(tokens[1:-1]) == "Is 2 + 3 naïve 🙂?"


def test_sentencepiece_and_a_template(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    template = ChatTemplate(TEMPLATES["mistral"], tokenizer.special_tokens)
    rows = write_lines(tmp_path / "rows.jsonl", {"messages": say("數 q1", "say 🙂", "q2", "a2")})
    examples, _ = build_examples(rows, form="messages", tokenizer=tokenizer, template=template, sequence_length=99)
    tokens, mask = examples[0]
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0])))).reshape(-1, 2)
    pieces = ["".join(tokenizer.token(t) for t in tokens[a:b]) for a, b in edges]
    assert [piece.replace("▁", " ") for piece in pieces] == [" say <0xF0><0x9F><0x99><0x82></s>", " a2</s>"]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in (None, "plain", "glm", "mistral", "qwen")
        for form in ("messages", "prompt_completion", "text")
        if name is not None or form != "messages"
    ],
)
def test_where_no_token_ends_a_turn_it_is_said_that_stopping_is_not_learnt(
    tmp_path: Path, name: str | None, form: str
) -> None:
    setup = Setup(tmp_path, name)
    row = {
        "messages": {"messages": say("q", "a")},
        "prompt_completion": {"prompt": "q", "completion": " a"},
        "text": {"text": "q a"},
    }[form]
    told: list[str] = []
    setup.build(row, row, form=form, warn=told.append)
    assert told == []
    (setup.folder / "generation_config.json").unlink()
    write_json(setup.folder / "tokenizer_config.json", {})
    setup.tokenizer = load_tokenizer(setup.folder)
    if name == "mistral":  # its template then writes no eos_token either
        setup.template = ChatTemplate(TEMPLATES["mistral"], {"bos_token": "", "eos_token": ""})
    examples, _ = setup.build(row, row, form=form, warn=told.append)
    if name == "qwen" and form != "text":
        assert told == []
        assert setup.learnt(examples)[-1].endswith("<|im_end|>")
        return
    (line,) = told
    assert line.startswith(f"{setup.folder}: the model won't learn to stop. No token that ends a text is known: tok")
    assert line.endswith("the chat template ends a turn with none.") == (name is not None and form != "text")
    assert setup.learnt(examples)[-1].rstrip().endswith("a")
    setup.build(row, form=form, warn=told.append, key="data.eval")
    assert len(told) == 1, "said once, for the training rows"
