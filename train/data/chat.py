"""The checkpoint's chat template, and which characters of a rendered conversation carry loss.

A template may write an earlier turn differently once the conversation goes on: GLM and Qwen drop the
reasoning of turns before the last user message. So the text of a whole conversation is not what the model
sees when it writes each turn. `ChatTemplate.renderings` therefore asks the template for every turn:

    R_i = render(messages up to and including turn i)             what was seen and written
    P_i = render(messages before turn i, add_generation_prompt)   what is seen before writing

The turn's own text is what R_i has after P_i. As long as each R_i is the beginning of the next one, the turns
share one rendering; where the template rewrites, a new rendering begins. Every turn carries loss exactly
once, in the text that the model will see.

Rendering all that precedes it for every turn takes time with the square of a conversation's length. In a long one, what
a turn adds to the text is therefore taken from a short conversation, of its first and latest messages; where the
template rewrites, the text is rendered as a whole once, and only the turn's beginning is taken from the short one. Both
are compared with the whole at the turns 1, 2, 4, 8 … and the text at the end of each rendering too; where they differ,
everything is rendered as a whole.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quant.common.errors import NibbleError
from quant.common.words import printable, shown, some

Message = dict[str, Any]
Conversation = tuple[Sequence[Message], Sequence[bool], list[Any] | None]  # messages, which to learn, tools

# Older names of the field that templates read as reasoning_content.
_REASONING = ("reasoning_content", "thinking", "reasoning")


# Variables that every rendering sets.
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")

# The prompts that a template may have for the same turn.
_ASKED: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})

# A conversation to find out how a template ends a turn.
_ANSWER = "answer-yz"
_PROBE = ({"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER})


_LONG = 32  # messages from which on a conversation isn't rendered as a whole for each of its turns
_NEAR = 8  # messages at the beginning and before a turn that may stand for all before it
MAX_CHARACTERS = 2**24  # of one rendering


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


class _NotAlikeError(Exception):
    """A short conversation isn't continued as the whole one is."""


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
    variables: more variables of every rendering, data.template_variables.
    Raises NibbleError (naming `where` or `tool_where`) when a template isn't valid Jinja, or reads none of that name.

    Jinja's sandbox keeps a template from everything but its variables, not from taking all time and memory:
    train.data.template_process runs one that somebody else wrote.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        where: str = "chat template",
        tool_source: str | None = None,
        tool_where: str = "",
        now: datetime | None = None,
        variables: Mapping[str, Any] | None = None,
    ):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: (now or datetime.now()).strftime(form)
        self._special_tokens = dict(special_tokens or {})
        self._variables = dict(variables or {})
        self._default = self._compiled(environment, source, where)
        self._tool_use = self._default if tool_source is None else self._compiled(environment, tool_source, tool_where)
        with self._limits(where):
            read = set().union(
                *(find_undeclared_variables(environment.parse(text)) for text in (source, tool_source or ""))
            )
        read -= {*environment.globals, *_GIVEN}
        self._asked = _ASKED if "enable_thinking" in read else _ASKED[:1]
        unread = self._variables.keys() - read
        if unread:
            names = some(sorted(map(printable, read)), 20) or "none"
            raise NibbleError(
                f"data.template_variables: {where} reads no {some(sorted(map(shown, unread)))}. Those that it reads: "
                f"{names}."
            )

    def _compiled(self, environment: jinja2.Environment, source: str, where: str) -> tuple[jinja2.Template, str]:
        with self._limits(where):
            try:
                return environment.from_string(source), where
            except jinja2.TemplateSyntaxError as error:
                where, reason = f"{where}: line {error.lineno}", error.message or ""
                raise NibbleError(f"{where}: not a valid Jinja template: {printable(reason, 300)}") from error
            except (SyntaxError, ValueError, TypeError, ArithmeticError) as error:  # of the code that Jinja makes of it
                reason = error.msg if isinstance(error, SyntaxError) else str(error)
                raise NibbleError(f"{where}: not a valid Jinja template: {printable(reason, 300)}") from error

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation, as transformers' `apply_chat_template(tokenize=False)` writes it.

        Raises RenderError when the template refuses the messages or can't handle them, NibbleError when it goes beyond
        its limits.
        """
        template, where = self._default if tools is None else self._tool_use
        with self._limits(where):
            try:
                text = template.render(
                    messages=[_prepared(message) for message in messages],
                    tools=tools,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **{**self._special_tokens, **self._variables, **variables},
                )
            except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
                raise RenderError(printable(str(error), 300) or type(error).__name__) from error
        if len(text) > MAX_CHARACTERS:
            raise NibbleError(f"{where}: writes {len(text):,} characters, more than {MAX_CHARACTERS:,}.")
        return text

    @contextmanager
    def _limits(self, where: str) -> Iterator[None]:
        """Around what runs code of the template from `where`."""
        try:
            yield
        except RecursionError as error:
            raise NibbleError(f"{where}: nested too deep, or a macro that calls itself without end.") from error
        except MemoryError as error:
            raise NibbleError(f"{where}: needs too much memory.") from error

    def renderings(
        self, messages: Sequence[Message], trained: Sequence[bool], tools: list[Any] | None = None
    ) -> list[Rendering]:
        """The texts in which the trained turns are learnt, each turn in exactly one of them.

        messages: the whole conversation. trained: for each message, whether it is a turn to learn.
        A turn of which the template writes nothing has no span. Raises RenderError.
        """
        turns = [turn for turn, wanted in enumerate(trained) if wanted]
        if len(messages) >= _LONG:
            try:
                return self._renderings(messages, turns, tools, shorten=True)
            except _NotAlikeError:
                pass
        return self._renderings(messages, turns, tools, shorten=False)

    def _renderings(
        self, messages: Sequence[Message], turns: Sequence[int], tools: list[Any] | None, shorten: bool
    ) -> list[Rendering]:
        result: list[Rendering] = []
        text, last = "", -1
        spans: list[tuple[int, int]] = []
        earlier: list[tuple[int, ...]] = []
        unchecked = 0  # turns since the last one that the whole conversation was rendered for
        begun = 0  # turns of which only the beginning was found in a short conversation

        def check(starts: list[int]) -> None:
            if unchecked and (text, starts) != self._turn(messages, last, tools):
                raise _NotAlikeError

        starts: list[int] = []
        for turn in turns:
            added = self._added(messages, last, turn, tools) if shorten and spans else None
            if added is not None:
                starts = [len(text) + start for start in added[1]]
                text, last = text + added[0], turn
                unchecked += 1
                if unchecked & (unchecked - 1) == 0:
                    check(starts)
            else:
                rendered = self.render(messages[: turn + 1], tools)
                near = self._starts_nearby(messages, turn, rendered, tools) if shorten else None
                begun += near is not None
                if near is None or begun & (begun - 1) == 0:
                    rendered_starts = self._turn_starts(messages, turn, rendered, tools)
                    if near not in (None, rendered_starts):
                        raise _NotAlikeError
                else:
                    rendered_starts = near
                if spans and not rendered.startswith(text):
                    check(starts)
                    result.append(Rendering(text, tuple(spans), tuple(earlier), _next_role(messages, last)))
                    spans, earlier = [], []
                text, starts, last, unchecked = rendered, rendered_starts, turn, 0
            if starts[0] < len(text):
                spans.append((starts[0], len(text)))
                earlier.append(tuple(starts[1:]))
        if spans:
            check(starts)
            result.append(Rendering(text, tuple(spans), tuple(earlier), _next_role(messages, last)))
        return result

    def _added(
        self, messages: Sequence[Message], last: int, turn: int, tools: list[Any] | None
    ) -> tuple[str, list[int]] | None:
        """What the rendering up to `turn` has after the one up to `last`, and where in that the turn may begin.

        Found in a short conversation: the first messages and the latest. None where there is no such conversation, or
        the turn is not simply added to it.
        """
        head, tail = _seam(messages, last)
        if not head:
            return None
        short = [*messages[:head], *messages[tail : turn + 1]]
        try:
            before = self.render(short[: head + last + 1 - tail], tools)
            text, starts = self._turn(short, len(short) - 1, tools)
        except RenderError:
            return None
        if not text.startswith(before) or starts[-1] < len(before):
            return None
        return text[len(before) :], [start - len(before) for start in starts]

    def _starts_nearby(
        self, messages: Sequence[Message], turn: int, rendered: str, tools: list[Any] | None
    ) -> list[int] | None:
        """What `_turn_starts` finds, found in a short conversation; None where that doesn't end like `rendered`."""
        head, tail = _seam(messages, turn)
        if not head:
            return None
        short = [*messages[:head], *messages[tail : turn + 1]]
        try:
            text, starts = self._turn(short, len(short) - 1, tools)
        except RenderError:
            return None
        if not rendered.endswith(text[starts[-1] :]):
            return None
        return [start + len(rendered) - len(text) for start in starts]

    def _turn(self, messages: Sequence[Message], turn: int, tools: list[Any] | None) -> tuple[str, list[int]]:
        """The text up to and including a turn, and the characters where that may begin, the last first."""
        text = self.render(messages[: turn + 1], tools)
        return text, self._turn_starts(messages, turn, text, tools)

    def renderings_of(self, conversations: Sequence[Conversation]) -> list[list[Rendering] | RenderError]:
        """The renderings of many conversations; for one that the template refuses, the error."""
        found: list[list[Rendering] | RenderError] = []
        for messages, trained, tools in conversations:
            try:
                found.append(self.renderings(messages, trained, tools))
            except RenderError as error:
                found.append(error)
        return found

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


def _prepared(message: Message) -> Message:
    """A message as templates expect it: no null fields, reasoning under the name that they read."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _seam(messages: Sequence[Message], last: int) -> tuple[int, int]:
    """(head, tail) so that messages[:head] and messages[tail:] make a conversation with `last` in its second part: the
    roles meet there as they do after messages[:head], and alternate as before. (0, 0) if there is none near.
    """
    roles = {i: messages[i]["role"] for i in (*range(_NEAR), *range(max(last - _NEAR, 0), last + 1)) if i <= last}
    for tail in range(last, max(last - _NEAR, 1), -1):
        for head in range(1, min(tail, _NEAR)):
            alike = (roles[head - 1], roles[head]) == (roles[tail - 1], roles[tail])
            if alike and (tail - head) % 2 == 0 and roles[tail] != "tool":
                return head, tail
    return 0, 0


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
