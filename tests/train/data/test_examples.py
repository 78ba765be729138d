"""Rows to examples: which tokens carry loss (checked by decoding them), cutting, reports, the held-out part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.common.errors import NibbleError
from tests.text_helpers import TEMPLATES, save_checkpoint_texts, say, sentencepiece_model, write_json, write_lines
from train.data.chat import ChatTemplate
from train.data.examples import DataReport, Examples, build_examples, split_examples
from train.data.template_files import load_chat_template
from train.data.template_process import TemplateProcess
from train.data.tokenizer import Tokenizer, load_tokenizer


class Setup:
    """A tokenizer and a template, and what they make of rows."""

    def __init__(self, folder: Path, template: str | None = None):
        self.folder = save_checkpoint_texts(folder / "model", template)
        self.tokenizer: Tokenizer = load_tokenizer(self.folder)
        self.template: ChatTemplate | TemplateProcess | None = load_chat_template(
            self.folder, self.tokenizer.special_tokens
        )
        self.path = folder / "rows.jsonl"

    def build(self, *rows: Any, form: str = "messages", **options: Any) -> tuple[Examples, DataReport]:
        rows = tuple({"messages": row} if isinstance(row, list) else row for row in rows)
        write_lines(self.path, *rows)
        settings: dict[str, Any] = {"sequence_length": 4096, **options}
        return build_examples(self.path, form=form, tokenizer=self.tokenizer, template=self.template, **settings)  # type: ignore[arg-type]

    def text(self, examples: Examples, index: int) -> str:
        return self.tokenizer.decode(examples[index][0])

    def learnt(self, examples: Examples, index: int = 0) -> list[str]:
        """The text of each run of labelled tokens."""
        tokens, mask = examples[index]
        edges = np.flatnonzero(np.diff(np.concatenate(([0], mask, [0]))))
        return [self.tokenizer.decode(tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def gsm8k_rows(count: int) -> list[dict[str, str]]:
    rows = []
    for i in range(count):
        a, b = 3 + i % 50, 2 + i % 7
        answer = f"She sold {a}*{b} = <<{a}*{b}={a * b}>>{a * b} clips.\n#### {a * b}"
        rows.append({"question": f"Natalia sold {a} clips to {b} friends each. How many clips?", "answer": answer})
    return rows


GSM8K = {"prompt": "question", "completion": "answer"}


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
        (4, "not_utf8"),
        (6, "malformed_json"),
    ]
    assert told[1] == (
        f"{setup.path}:3: the chat template refuses the row: Conversation roles must alternate "
        "user/assistant/user/assistant/...; row skipped (data.on_bad_row: skip). 1 such row so far."
    )
    assert told[2].startswith(f"{setup.path}:4: half of a surrogate pair ('\\ud800') in the text; row skipped")

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


@pytest.mark.parametrize("form", ["messages", "prompt_completion", "text"])
@pytest.mark.parametrize("name", [None, "plain", "glm", "mistral", "qwen"])
def test_where_no_token_ends_a_turn_it_is_said_that_stopping_is_not_learnt(
    tmp_path: Path, name: str | None, form: str
) -> None:
    if name is None and form == "messages":
        pytest.skip("messages need a template")
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
