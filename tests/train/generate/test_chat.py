"""The chat: its commands, what is remembered, and Ctrl-C."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.generate_helpers import BUTTONS, CUPS, PROSE, run
from train.data.tokenizer import load_tokenizer
from train.generate import answers
from train.generate.chat import HELP, as_message


@pytest.fixture(scope="module")
def base(taught_demo: Path) -> str:
    return str(taught_demo / "base-nf4")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, base: str) -> list[str]:
    """The prompts that the model gets, as text."""
    texts: list[str] = []
    tokenizer, real = load_tokenizer(base), answers.generate

    def generate(model: Any, prompts: Any, *arguments: Any, **options: Any) -> Any:
        texts.extend(map(tokenizer.decode, prompts))
        return real(model, prompts, *arguments, **options)

    monkeypatch.setattr(answers, "generate", generate)
    return texts


def chat(base: str, *lines: str, options: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """Lines of standard output, and of standard error after the first, which is of the settings."""
    code, shown, said = run([base, *options], lines)
    assert code == 0
    return shown.splitlines(), said.splitlines()[1:]


def test_answers_and_what_is_remembered(base: str, asked: list[str], tmp_path: Path) -> None:
    saved = tmp_path / "chat.jsonl"
    lines = [BUTTONS, "", "/system  Be short. ", "/reset", CUPS, f"/save {saved}", "/system", "/reset", BUTTONS]
    shown, said = chat(base, *lines, "/exit", "not read")
    assert len(shown) == 3 and shown[0] == shown[2] == PROSE[BUTTONS]  # with a system message it wasn't taught anything
    assert asked == [
        f"[gMASK]<sop><|user|>{BUTTONS}<|assistant|></think>",
        f"[gMASK]<sop><|system|>Be short.<|user|>{CUPS}<|assistant|></think>",
        f"[gMASK]<sop><|user|>{BUTTONS}<|assistant|></think>",
    ]
    assert json.loads(saved.read_text()) == {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": CUPS},
            {"role": "assistant", "content": shown[1]},
        ]
    }
    assert said == [
        "(The system message is set.)",
        "(The conversation is forgotten.)",
        f"(Saved in {saved}.)",
        "(No system message.)",
        "(The conversation is forgotten.)",
    ]


def test_a_conversation_goes_on(base: str, asked: list[str]) -> None:
    shown, said = chat(base, BUTTONS, "//More?", options=("--max-new-tokens", "3"))
    tokenizer = load_tokenizer(base)
    beginning = tokenizer.decode(tokenizer.encode(PROSE[BUTTONS])[:3])
    assert shown[0] == beginning
    assert said[0] == "(cut off: --max-new-tokens 3, or the model's last position)"
    assert asked[1] == (
        f"[gMASK]<sop><|user|>{BUTTONS}<|assistant|></think>{beginning.strip()}<|user|>/More?<|assistant|></think>"
    )


def test_mistakes_do_not_end_it(base: str, asked: list[str], tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("x")
    shown, said = chat(
        base, "/foo", "/save", f"/save {mine}", f"/save {tmp_path}/new", "/reset now", "x " * 600, BUTTONS,
        f"/save {tmp_path}/no/new", "/help",
    )  # fmt: skip
    assert shown == [PROSE[BUTTONS]]
    assert asked == [f"[gMASK]<sop><|user|>{BUTTONS}<|assistant|></think>"]  # the one that was too long is forgotten
    assert [line for line in said if line.startswith("error: ")] == [
        "error: /foo is no command. /help shows those that there are.",
        "error: /save needs the name of a file.",
        f"error: {mine} is there already. Choose another name.",
        "error: there is nothing to save yet.",
        "error: /reset now is no command. /help shows those that there are.",
        "error: the prompt has 1,204 tokens; the model is made for 512, the answer included.",
        f"error: /save: {tmp_path}/no/new is in a folder that is not there.",
    ]
    assert said[-len(HELP.splitlines()) :] == HELP.splitlines()
    assert mine.read_text() == "x" and [*tmp_path.iterdir()] == [mine]


@pytest.mark.usefixtures("signals_heeded")
def test_ctrl_c_stops_an_answer_not_the_chat(base: str, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = answers.TextStream.add
    count = 0

    def add(self: Any, token: int) -> str:
        nonlocal count
        count += 1
        if count == 4:
            signal.raise_signal(signal.SIGINT)
        return real(self, token)

    monkeypatch.setattr(answers.TextStream, "add", add)
    shown, said = chat(base, BUTTONS, CUPS)
    tokenizer = load_tokenizer(base)
    beginning = tokenizer.decode(tokenizer.encode(PROSE[BUTTONS])[:3])
    assert shown[0] == beginning and said == ["(stopped)"]
    # What was said stays in the conversation.
    assert asked[1] == (
        f"[gMASK]<sop><|user|>{BUTTONS}<|assistant|></think>{beginning.strip()}<|user|>{CUPS}<|assistant|></think>"
    )


@pytest.mark.parametrize(
    ("events", "answered"),
    [
        ([KeyboardInterrupt, KeyboardInterrupt, BUTTONS], 0),
        ([KeyboardInterrupt, BUTTONS, KeyboardInterrupt, EOFError], 1),
        ([BUTTONS, KeyboardInterrupt, KeyboardInterrupt], 1),
        ([EOFError, BUTTONS], 0),
    ],
)
def test_ctrl_c_twice_at_the_prompt_leaves(
    base: str, monkeypatch: pytest.MonkeyPatch, events: list[Any], answered: int
) -> None:
    left: Iterator[Any] = iter(events)

    def read(prompt: str) -> str:
        event = next(left)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("builtins.input", read)
    shown, said = chat(base)
    assert [line for line in shown if line] == [PROSE[BUTTONS]] * answered
    hints = sum(one is KeyboardInterrupt and before is not one for before, one in pairwise([None, *events]))
    assert said.count("(Ctrl-C again, Ctrl-D or /exit leaves.)") == hints


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "thought"),
    [
        ("Seven.", False, "Seven.", None),
        ("<think>4 + 3</think>\n\nSeven.", False, "Seven.", "4 + 3"),
        ("4 + 3</think>Seven.", True, "Seven.", "4 + 3"),
        ("4 + 3", True, "", "4 + 3"),  # stopped while it thought
        ("<think>4", False, "", "4"),
        ("</think>Seven.", True, "Seven.", None),
    ],
)
def test_reasoning_is_a_field_of_its_own(text: str, reasoning: bool, content: str, thought: str | None) -> None:
    message = as_message(text, reasoning)
    assert (message["role"], message["content"], message.get("reasoning_content")) == ("assistant", content, thought)
