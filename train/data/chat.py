"""The checkpoint's chat template, and which characters of a rendered conversation carry loss.

A template may write an earlier turn differently once the conversation goes on: GLM and Qwen drop the
reasoning of turns before the last user message. So the text of a whole conversation is not what the model
sees when it writes each turn. `ChatTemplate.renderings` therefore asks the template for every turn:

    R_i = render(messages up to and including turn i)             what was seen and written
    P_i = render(messages before turn i, add_generation_prompt)   what is seen before writing

The turn's own text is what R_i has after P_i. As long as each R_i is the beginning of the next one, the turns
share one rendering; where the template rewrites, a new rendering begins. Every turn carries loss exactly
once, in the text that the model will see.

A template may have several prompts. GLM-4.7 asks with `<think>`, and writes a turn without reasoning as
`</think>…`, which is what it asks with when `enable_thinking` is false; Qwen3.5 asks with `<think>\\n`, and writes
such a turn as `<think>\\n\\n</think>\\n\\n…`. So P_i is rendered without that variable, with false and with true, and
the longest P_i that is the beginning of R_i counts: what any prompt already says is not for the model to write. It has
to be so in tokens as well: `<think>\\n` is no beginning of `<think>\\n\\n</think>` where `\\n\\n` is one token, so
train.data.examples takes the longest prompt after which a token begins. Where no P_i is the beginning of R_i, the turn
begins where they part, which may be inside a token (`<think>` and `</think>` share `<`); a token with any character in
a span is labelled, so the token that differs is always learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quant.common.errors import NibbleError

Message = dict[str, Any]

# Older names of the field that templates read as reasoning_content.
_REASONING = ("reasoning_content", "thinking", "reasoning")


# The prompts that a template may have for the same turn.
_ASKED: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})

# A conversation to find out how a template ends a turn.
_ANSWER = "answer-yz"
_PROBE = ({"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER})


class RenderError(Exception):
    """The template refuses these messages; the text is the template's own reason."""


@dataclass(frozen=True)
class Rendering:
    """A conversation, or its beginning, as text.

    spans: character ranges [start, end) that carry loss, in order, one per trained turn.
    earlier: for each span the ends of other, shorter prompts for that turn, the longest first.
    next_role: the role after the last turn: the conversation's, else "tool" after tool calls and "user".
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    earlier: tuple[tuple[int, ...], ...]
    next_role: str


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for other trainers; here it is only read over."""

    tags = {"generation"}  # noqa: RUF012 - declared by the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatTemplate:
    """A compiled chat template.

    source: Jinja text. tool_source: the template to use when a row has tools, if the checkpoint has one.
    special_tokens: {"bos_token": …, "eos_token": …}, variables of the template.
    now: what `strftime_now` formats; None is the moment of the call.
    Raises NibbleError (naming `where`) when a template isn't valid Jinja.
    """

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, str] | None = None,
        *,
        tool_source: str | None = None,
        where: str = "chat template",
        now: datetime | None = None,
    ):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
        try:
            self._template = environment.from_string(source)
            self._tool_template = self._template if tool_source is None else environment.from_string(tool_source)
        except jinja2.TemplateSyntaxError as error:
            raise NibbleError(f"{where}: line {error.lineno}: not a valid Jinja template: {error.message}") from error
        self._special_tokens = dict(special_tokens or {})
        self._asked = _ASKED

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation, as transformers' `apply_chat_template(tokenize=False)` writes it.

        Raises RenderError when the template refuses the messages or can't handle them.
        """
        template = self._template if tools is None else self._tool_template
        try:
            return template.render(
                messages=[_prepared(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **variables},
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RenderError(str(error) or type(error).__name__) from error

    def renderings(
        self, messages: Sequence[Message], trained: Sequence[bool], tools: list[Any] | None = None
    ) -> list[Rendering]:
        """The texts in which the trained turns are learnt, each turn in exactly one of them.

        messages: the whole conversation. trained: for each message, whether it is a turn to learn.
        A turn of which the template writes nothing has no span. Raises RenderError.
        """
        result: list[Rendering] = []
        text, last = "", -1
        spans: list[tuple[int, int]] = []
        earlier: list[tuple[int, ...]] = []
        for turn, wanted in enumerate(trained):
            if not wanted:
                continue
            rendered = self.render(messages[: turn + 1], tools)
            if spans and not rendered.startswith(text):
                result.append(Rendering(text, tuple(spans), tuple(earlier), _next_role(messages, last)))
                spans, earlier = [], []
            text, last = rendered, turn
            start, *others = self._turn_starts(messages, turn, rendered, tools)
            if start < len(rendered):
                spans.append((start, len(rendered)))
                earlier.append(tuple(others))
        if spans:
            result.append(Rendering(text, tuple(spans), tuple(earlier), _next_role(messages, last)))
        return result

    def _turn_starts(self, messages: Sequence[Message], turn: int, rendered: str, tools: list[Any] | None) -> list[int]:
        """The characters of `rendered` where the turn may begin, the last first."""
        before = messages[:turn]
        prompts = [*self._texts_of(before, tools, [{"add_generation_prompt": True, **asked} for asked in self._asked])]
        fitting = {len(prompt) for prompt in prompts if rendered.startswith(prompt)}
        if fitting:
            return sorted(fitting, reverse=True)
        # A prompt that differs from its beginning on would make the whole conversation part of the turn.
        texts = [*prompts, *self._texts_of(before, tools, [{}])]
        if not texts:
            # Nothing can be asked here: a conversation that the assistant opens, or a template that insists on a
            # user message. The turn then begins where it differs from another answer in its place.
            content = str(messages[turn].get("content") or "").lstrip()
            other = {"role": "assistant", "content": "y" if content.startswith("x") else "x"}
            texts = [self.render([*before, other], tools)]
        return [max(_common(text, rendered) for text in texts)]

    def _texts_of(
        self, messages: Sequence[Message], tools: list[Any] | None, ways: list[dict[str, Any]]
    ) -> Iterator[str]:
        """The conversation rendered in each of these ways that the template doesn't refuse."""
        for way in ways:
            with suppress(RenderError):
                yield self.render(messages, tools, **way)

    def closing(self) -> str:
        """The text that the template writes after an assistant's text, to end the turn; "" if nothing."""
        try:
            text = self.render([*_PROBE])
        except RenderError:
            return ""
        return text.rpartition(_ANSWER)[2]

    def following(self, role: str) -> str:
        """The text that the template writes after an assistant's turn when `role` is next; "" if that can't be found.

        Some templates write no end-of-turn token: in GLM's a turn ends where `<|user|>` or `<|observation|>` begins,
        and generation stops at these. This is how one finds out which.
        """
        try:
            text, longer = self.render([*_PROBE]), self.render([*_PROBE, {"role": role, "content": "z"}])
        except RenderError:
            return ""
        return longer[len(text) :] if longer.startswith(text) else ""


def load_chat_template(
    folder: str | Path, special_tokens: dict[str, str], *, now: datetime | None = None
) -> ChatTemplate | None:
    """The chat template of a checkpoint folder, or None if it has none.

    Looked for in chat_template.jinja, then tokenizer_config.json, then chat_template.json (the last two may hold
    one template or a list of named ones, of which "default" and "tool_use" are used).
    """
    folder = Path(folder)
    path = folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"), special_tokens, where=str(path), now=now)
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        value = _chat_template_entry(path)
        if value is None:
            continue
        named = value if isinstance(value, dict) else {"default": value}
        if "default" not in named:
            raise NibbleError(
                f"{path}: chat_template has no template named 'default', only {', '.join(named) or 'none'}"
            )
        return ChatTemplate(
            named["default"], special_tokens, tool_source=named.get("tool_use"), where=f"{path}: chat_template", now=now
        )
    return None


def missing_template(folder: str | Path) -> NibbleError:
    """The error for rows of messages and a checkpoint that can't render them."""
    return NibbleError(
        f"{folder}: no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), "
        "which data.format messages needs.\nPut the template of the instruction-tuned model there as "
        "chat_template.jinja, or use data.format prompt_completion or text."
    )


def _chat_template_entry(path: Path) -> str | dict[str, str] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NibbleError(f"{path}: not valid JSON: {error}") from error
    value = value.get("chat_template") if isinstance(value, dict) else value
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    if value is not None and not isinstance(value, str | dict):
        raise NibbleError(f"{path}: chat_template is neither text nor a list of named templates")
    return value


def _prepared(message: Message) -> Message:
    """A message as templates expect it: no null fields, reasoning under the name that they read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _next_role(messages: Sequence[Message], turn: int) -> str:
    if turn + 1 < len(messages) and messages[turn + 1]["role"] != "assistant":
        return messages[turn + 1]["role"]
    return "tool" if messages[turn].get("tool_calls") else "user"


def _common(first: str, second: str) -> int:
    """Length of the longest common beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML; models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
