"""Chat templates: the same text as transformers' apply_chat_template, and the spans that carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any

import pytest

from quant.common.errors import NibbleError
from tests.text_helpers import TEMPLATES, byte_level_tokenizer, say
from train.data.chat import ChatTemplate, Message, RenderError, Rendering

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln <b>", "days": 2}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "'sunny' & <hot>"}}]
TOOL_USE = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None, "reasoning_content": "look it up", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "It rains.", "reasoning_content": "rain it is"},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "Welcome."},
]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": say("What is 2 + 3?", "5\n"),
    "system": [{"role": "system", "content": "Be brief."}, *say("hi", "hello", "bye", "see you")],
    "reasoning": say("q1", "a1", "q2", "a2", reasoning_content="\nbecause\n"),
    "reasoning field": say("q1", "a1", reasoning="why not", thinking=None),
    "tools": TOOL_USE,
    "prompt only": say("q1", "a1", "q2"),
}

REFUSED = {
    ("mistral", "system"): "Conversation roles must alternate",
    ("mistral", "tools"): "can only concatenate str|'dict object' has no attribute 'content'",
}


def template(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], TOKENS)


def trained(messages: list[dict[str, Any]]) -> list[bool]:
    return [message["role"] == "assistant" for message in messages]


def renderings(name: str, messages: list[dict[str, Any]]) -> list[Rendering]:
    return template(name).renderings(messages, trained(messages))


def learnt(rendering: Rendering) -> list[str]:
    return [rendering.text[start:end] for start, end in rendering.spans]


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), **TOKENS)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(reference: Any, name: str, conversation: str) -> None:
    messages, ours = CONVERSATIONS[conversation], template(name)
    for options in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
        for tools in (None, TOOLS):
            theirs = partial(
                reference.apply_chat_template, messages, tools, tokenize=False, chat_template=TEMPLATES[name], **options
            )
            if (name, conversation) in REFUSED:
                with pytest.raises(Exception, match=REFUSED[name, conversation]):
                    theirs()
                with pytest.raises(RenderError, match=REFUSED[name, conversation]):
                    ours.render(messages, tools, **options)
            else:
                assert ours.render(messages, tools, **options) == theirs()


def test_template_features_render_as_in_transformers(reference: Any) -> None:
    source = (
        "{{ strftime_now('%Y') }} {{ {'b': '<é>', 'a': [1]} | tojson }} {{ [1, 2] | tojson(indent=2) }}\n"
        "{% for i in range(9) %}\n    {% if i == 2 %}{% continue %}{% endif %}\n"
        "    {% if i == 4 %}{% break %}{% endif %}\n{{ i }}\n{% endfor %}\n"
        "{% set text = 'outer' %}{% generation %}{% set text = 'inner' %}{{ text }}{% endgeneration %}{{ text }}"
        "{{ eos_token }}{{ undefined_name }}{{ 'x' if tools is none }}{{ dict(a=1).a }}"
    )
    messages = say("hi")
    expected = reference.apply_chat_template(messages, tokenize=False, chat_template=source)
    assert ChatTemplate(source, TOKENS).render(messages) == expected


def test_the_date_can_be_fixed() -> None:
    fixed = ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=datetime(2024, 7, 26))
    assert fixed.render(say("hi")) == "26 Jul 2024"


@pytest.mark.parametrize("name", ["qwen", "glm", "think"])
def test_variables_are_in_every_rendering(reference: Any, name: str) -> None:
    messages = say("q", "a")
    for thinking in (False, True):
        ours = ChatTemplate(TEMPLATES[name], TOKENS, variables={"enable_thinking": thinking})
        for prompt in (False, True):
            assert ours.render(messages, None, prompt) == reference.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=TEMPLATES[name],
                add_generation_prompt=prompt,
                enable_thinking=thinking,
            )
    signed = "{% for m in messages %}{{ m.content }}{{ sign }}{{ style.end[0] }}{% endfor %}"
    made = ChatTemplate(signed, variables={"sign": "!", "style": {"end": ["</s>"]}})
    (rendering,) = made.renderings(messages, [False, True])
    assert (rendering.text, learnt(rendering)) == ("q!</s>a!</s>", ["a!</s>"])
    assert (made.closing(), made.following("user")) == ("!</s>", "z!</s>")


def test_a_variable_that_the_template_does_not_read() -> None:
    source = (
        "{% set mine = 1 %}{% for m in messages %}{{ m.content }}{% endfor %}{{ bos_token }}"
        "{{ 'x' if enable_thinking }}{% if preserve_thinking is defined and tools and add_generation_prompt %}"
        "{{ raise_exception(mine) }}{% endif %}"
    )
    fitting = ChatTemplate(source, variables={"enable_thinking": 1, "preserve_thinking": None, "bos_token": "<b>"})
    assert fitting.render(say("hi")) == "hi<b>x"
    for name in ("enable_thinkin", "mine", "messages", "tools", "raise_exception", "m"):
        with pytest.raises(NibbleError) as caught:
            ChatTemplate(source, where="t.jinja", variables={name: True, "enable_thinking": True})
        assert str(caught.value) == (
            f"data.template_variables: t.jinja reads no '{name}'. Those that it reads: bos_token, enable_thinking, "
            "preserve_thinking."
        )
    with pytest.raises(NibbleError, match=r"reads no 'x'\. Those that it reads: none\.$"):
        ChatTemplate("", variables={"x": 1})
    assert ChatTemplate("", tool_source="{{ x }}", variables={"x": 1}).render([], []) == "1"


def test_templates_are_sandboxed() -> None:
    for attack in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages.__init__.__globals__ }}"):
        with pytest.raises(RenderError):
            # An attribute that the sandbox hides is undefined; using it is an error.
            ChatTemplate(attack + "{{ ''.__class__.__base__.x }}").render(say("hi"))


def test_one_turn_learns_what_follows_the_prompt() -> None:
    (rendering,) = renderings("qwen", say("q", "answer"))
    assert learnt(rendering) == ["answer<|im_end|>\n"], "asked without thinking, the prompt already has </think>"
    assert rendering.text.startswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think>")
    (rendering,) = renderings("mistral", say("q", "answer"))
    assert learnt(rendering) == [" answer</s>"]
    (rendering,) = renderings("plain", say("q", "answer"))
    assert learnt(rendering) == [" answer\n"]


def test_turns_share_a_text_while_the_template_only_adds() -> None:
    (rendering,) = renderings("mistral", say("q1", "a1", "q2", "a2", "q3"))
    assert learnt(rendering) == [" a1</s>", " a2</s>"]
    assert rendering.text == "<s>[INST] q1 [/INST] a1</s>[INST] q2 [/INST] a2</s>"
    (rendering,) = renderings("glm", say("q1", "a1", "q2", "a2"))
    assert learnt(rendering) == ["a1", "a2"], "asked without thinking, the prompt already has </think>"
    assert rendering.text == "[gMASK]<sop><|user|>q1<|assistant|></think>a1<|user|>q2<|assistant|></think>a2"


def test_a_template_that_drops_reasoning_gives_each_turn_the_text_it_was_written_in() -> None:
    messages = say("q1", "a1", "q2", "a2", "q3", "a3")
    for index in (1, 3):
        messages[index]["reasoning_content"] = f"r{index}"
    first, second, third = renderings("glm", messages)
    assert first.text == "[gMASK]<sop><|user|>q1<|assistant|><think>r1</think>a1"
    assert learnt(first) == ["r1</think>a1"]
    assert second.text == "[gMASK]<sop><|user|>q1<|assistant|></think>a1<|user|>q2<|assistant|><think>r3</think>a2"
    assert learnt(second) == ["r3</think>a2"]
    assert learnt(third) == ["a3"]
    assert "r1" not in third.text
    assert "r3" not in third.text

    # Qwen writes an empty think block for the last turn only, so it rewrites even without reasoning.
    assert [learnt(rendering) for rendering in renderings("qwen", say("q1", "a1", "q2", "a2"))] == [
        ["a1<|im_end|>\n"],
        ["a2<|im_end|>\n"],
    ]


def test_turns_before_and_after_a_tool_keep_their_reasoning_together() -> None:
    messages = [{**message, "content": message["content"] or ""} for message in TOOL_USE]
    with_tool, after = renderings("glm", messages)
    assert learnt(with_tool) == [
        "look it up</think><tool_call>weather<arg_key>city</arg_key><arg_value>Köln <b></arg_value>"
        "<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>",
        "rain it is</think>It rains.",
    ]
    assert learnt(after) == ["Welcome."]
    assert with_tool.next_role == after.next_role == "user"
    (call,) = renderings("glm", messages[:2])
    assert call.next_role == "tool"
    (call,) = template("glm").renderings(messages[:3], [False, True, False])
    assert call.next_role == "tool"


@pytest.mark.parametrize(
    ("name", "conversation"),
    # Only these two can write a tool's answer.
    [(name, kind) for name in TEMPLATES for kind in ("one turn", "reasoning")] + [("glm", "tools"), ("qwen", "tools")],
)
def test_every_turn_is_learnt_exactly_once_in_the_text_of_its_own_moment(name: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [(rendering.text, span) for rendering in renderings(name, messages) for span in rendering.spans]
    assert len(spans) == len(turns)
    for turn, (text, (start, end)) in zip(turns, spans, strict=True):
        assert text[:end] == template(name).render(messages[: turn + 1])
        assert (messages[turn]["content"] or "weather").strip() in text[start:end]
        prompts = [
            template(name).render(messages[:turn], add_generation_prompt=True, **options)
            for options in ({}, {"enable_thinking": False})
        ]
        assert text[:start] in prompts


def test_only_the_chosen_turns_are_learnt() -> None:
    messages = say("q1", "a1", "q2", "a2", "q3", "a3")
    (rendering,) = template("mistral").renderings(messages, [False, True, False, False, False, True])
    assert learnt(rendering) == [" a1</s>", " a3</s>"]
    (rendering,) = template("mistral").renderings(messages, [False, True, False, False, False, False])
    assert rendering.text == "<s>[INST] q1 [/INST] a1</s>", "nothing after the last turn to learn is needed"
    assert template("mistral").renderings(messages, [False] * 6) == []


def test_the_longest_prompt_that_begins_the_text_counts() -> None:
    thinks = template("think")
    (rendering,) = thinks.renderings(say("q", "answer"), [False, True])
    assert learnt(rendering) == ["answer<|im_end|>\n"]
    asked = [rendering.text[:end] for end in (rendering.spans[0][0], *rendering.earlier[0])]
    assert asked == [
        thinks.render(say("q"), add_generation_prompt=True, **options) for options in ({"enable_thinking": False}, {})
    ]
    (rendering,) = thinks.renderings(say("q", "answer", reasoning_content="why"), [False, True])
    assert learnt(rendering) == ["why\n</think>\n\nanswer<|im_end|>\n"]
    assert rendering.earlier == ((),)


def test_a_prompt_that_contradicts_the_turn_ends_where_they_part() -> None:
    # No variable turns this <think> off.
    stubborn = ChatTemplate(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}</think>{% endif %}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    messages = say("q", "answer")
    (rendering,) = stubborn.renderings(messages, trained(messages))
    assert learnt(rendering) == ["/think>answer"], "the token </think> overlaps with this span and is learnt"


def test_a_prompt_that_differs_from_its_beginning_doesn_t_make_the_user_part_of_the_turn() -> None:
    odd = ChatTemplate(
        "{{ '<ask>' if add_generation_prompt else '<done>' }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = say("q", "answer")
    (rendering,) = odd.renderings(messages, trained(messages))
    assert rendering.text == "<done><|user|>q<|assistant|>answer"
    assert learnt(rendering) == ["<|assistant|>answer"]


def test_a_conversation_that_the_assistant_opens() -> None:
    opened = ChatTemplate(
        "{{ raise_exception('nobody spoke') if not messages }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = say("", "xylophone?", "yes", "good")[1:]
    (rendering,) = opened.renderings(messages, trained(messages))
    assert learnt(rendering) == ["xylophone?<|im_end|>", "good<|im_end|>"]


def test_what_ends_a_turn() -> None:
    assert template("glm").closing() == ""
    assert template("glm").following("user") == "<|user|>z"
    assert template("glm").following("tool").startswith("<|observation|>")
    assert template("qwen").closing() == "<|im_end|>\n"
    assert template("qwen").following("user") == "", "it rewrites the turn before, so this can't be told"
    assert template("mistral").closing() == "</s>"
    assert template("mistral").following("tool") == "", "it refuses tools"
    assert template("plain").closing() == "\n"


def test_the_templates_reason_is_passed_on() -> None:
    with pytest.raises(RenderError, match="Conversation roles must alternate"):
        template("mistral").render([*say("a"), *say("b")])
    with pytest.raises(RenderError, match="can only concatenate list"):
        ChatTemplate("{{ messages + 1 }}").render(say("hi"))


class Counting(ChatTemplate):
    """Counts the messages that it renders."""

    rendered = 0

    def render(self, messages: Sequence[Message], *arguments: Any, **options: Any) -> str:
        self.rendered += len(messages)
        return super().render(messages, *arguments, **options)


def chain(count: int, **last: Any) -> list[dict[str, Any]]:
    """One question, and calls of tools with their answers."""
    messages = [{"role": "system", "content": "Use tools."}, {"role": "user", "content": "go"}]
    for number in range(count // 2 - 1):
        call = {"function": {"name": "f", "arguments": {"x": number}}}
        messages.append({"role": "assistant", "content": "", "reasoning_content": f"r{number}", "tool_calls": [call]})
        messages.append({"role": "tool", "content": f"answer {number}"})
    return [*messages, {"role": "assistant", "content": "done"}]


def numbered(count: int, **every: Any) -> list[dict[str, Any]]:
    messages = say(*(f"{'qa'[i % 2]}{i}\n" * (i % 3 + 1) for i in range(count)))
    return [{**message, **(every if message["role"] == "assistant" else {})} for message in messages]


def with_a_system_message(count: int) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Be brief."}, *numbered(count)]


def parallel_calls(count: int) -> list[dict[str, Any]]:
    """As many tools' answers after each call as its number says."""
    messages = say("go")
    while len(messages) < count:
        call = {"function": {"name": "f", "arguments": {"x": len(messages)}}}
        calls = [call] * (1 + len(messages) % 3)
        messages.append({"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": calls})
        messages += [{"role": "tool", "content": f"answer {len(messages)}"} for _ in calls]
    return messages


LONG = {
    "turns": numbered,
    "reasoning": partial(numbered, reasoning_content="because"),
    "system": with_a_system_message,
    "tools": chain,
    "parallel": parallel_calls,
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("name", TEMPLATES)
def test_long_conversations_are_learnt_as_turn_by_turn(name: str, kind: str) -> None:
    messages = LONG[kind](70)
    made = Counting(TEMPLATES[name], TOKENS)
    turns = [i for i, wanted in enumerate(trained(messages)) if wanted]
    for chosen in (turns, turns[::3], turns[-2:]):
        try:
            expected = made._renderings(messages, chosen, None, shorten=False)
        except RenderError:
            with pytest.raises(RenderError):
                made.renderings(messages, [i in chosen for i in range(len(messages))])
        else:
            assert made.renderings(messages, [i in chosen for i in range(len(messages))]) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    # Where Qwen's and GLM's rewrite every turn, the texts themselves grow with the square.
    [("glm", "turns"), ("glm", "tools"), ("glm", "parallel"), ("qwen", "tools"), ("mistral", "turns")]
    + [(name, kind) for name in ("think", "marked", "plain") for kind in ("turns", "reasoning", "system")],
)
def test_the_work_for_a_conversation_grows_with_its_length(name: str, kind: str) -> None:
    work = []
    for count in (250, 500, 1000):
        made, messages = Counting(TEMPLATES[name], TOKENS), LONG[kind](count)
        assert len(made.renderings(messages, trained(messages))) <= 2
        work.append(made.rendered)
    assert work[2] < 60 * 1000, "turn by turn it is above 500 × 1000"
    assert work[2] < 2.5 * work[1] < 6.25 * work[0]


@pytest.mark.parametrize(("name", "kind"), [("glm", "reasoning"), ("qwen", "turns"), ("qwen", "system")])
def test_a_template_that_rewrites_renders_each_text_about_once(name: str, kind: str) -> None:
    made, messages = Counting(TEMPLATES[name], TOKENS), LONG[kind](250)
    found = made.renderings(messages, trained(messages))
    assert len(found) == sum(trained(messages))
    texts = sum(turn + 1 for turn, wanted in enumerate(trained(messages)) if wanted)
    assert made.rendered < 1.4 * texts, "with all prompts for each it is above 3"


def test_a_template_that_looks_back_far_is_rendered_whole() -> None:
    far = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ ' ' * (loop.index0 // 20) }}{% endfor %}"
    counts = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ loop.index }}{% endfor %}"
    first = "{% for m in messages %}{{ loop.index if loop.index > 40 }}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    for source in (far, counts, first):
        made, messages = ChatTemplate(source), numbered(70)
        turns = [i for i, wanted in enumerate(trained(messages)) if wanted]
        expected = made._renderings(messages, turns, None, shorten=False)
        assert made.renderings(messages, trained(messages)) == expected
