"""A chat template that somebody else wrote, run in a process of its own within limits of time and memory.

Jinja's sandbox lets no template reach anything but its variables. It doesn't keep one from counting to 10¹⁵, from
`'ab' * 7000000000`, or from a constant that takes as long to fold when it is compiled; there are too many ways to list.
The operating system ends the process for all of them.

The process is sent a line of JSON for each call and answers with one: the name of a method of ChatTemplate and its
arguments, then what it returned or raised. It ends with the object that started it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from quant.common.errors import NibbleError
from train.data.chat import ChatTemplate, Conversation, Message, RenderError, Rendering

CPU_SECONDS = 5  # for one rendering, or to compile; a conversation of 1,000 messages takes some 0.02
MEMORY = 2**30  # bytes of address space; the process begins with 25 MB


_BATCH = 2**17  # characters of conversations that are sent at a time


class TemplateProcess:
    """What ChatTemplate is, with the same arguments and methods.

    A template that goes beyond the limits is a NibbleError naming `where`, from the constructor or any method.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        where: str,
        tool_source: str | None = None,
        tool_where: str = "",
        now: datetime | None = None,
        variables: Mapping[str, Any] | None = None,
    ):
        self._where = where
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(CPU_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, which ends this process
        )
        weakref.finalize(self, _end, self._process)
        options = {"where": where, "tool_source": tool_source, "tool_where": tool_where, "variables": variables}
        self._call("", source, dict(special_tokens), now=None if now is None else now.isoformat(), **options)

    def render(
        self,
        messages: Sequence[Message],
        tools: list[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        return str(self._call("render", messages, tools, add_generation_prompt, **variables))

    def renderings_of(self, conversations: Sequence[Conversation]) -> list[list[Rendering] | RenderError]:
        found: list[list[Rendering] | RenderError] = []
        # One switch to the other process and back costs as much as a rendering, so many go at a time.
        batch, size = [], 0
        for number, conversation in enumerate(conversations, 1):
            batch.append(json.dumps(conversation, default=_placeholder))
            size += len(batch[-1])
            if size > _BATCH or number == len(conversations):
                for value in self._ask(f'["renderings_of", [[{",".join(batch)}]], {{}}]'):
                    if isinstance(value, str):
                        found.append(RenderError(value))
                    else:
                        found.append([Rendering(text, _pairs(a), _pairs(b), role) for text, a, b, role in value])
                batch, size = [], 0
        return found

    def closing(self) -> str:
        return str(self._call("closing"))

    def following(self, role: str) -> str:
        return str(self._call("following", role))

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return self._ask(json.dumps([method, arguments, options], default=_placeholder))

    def _ask(self, request: str) -> Any:
        answer = b""
        try:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        except BaseException:  # the next call would be given this one's answer
            _end(self._process)
            raise
        if not answer.endswith(b"\n"):
            code = self._process.wait()
            if code == -signal.SIGPROF:
                raise NibbleError(f"{self._where}: the template takes more than {CPU_SECONDS} seconds for one text.")
            raise NibbleError(
                f"{self._where}: the template needs more than {MEMORY >> 30} GiB of memory, or it crashes the "
                f"interpreter (exit code {code})."
            )
        kind, value = json.loads(answer)
        if kind != "value":
            raise (RenderError if kind == "refused" else NibbleError)(value)
        return value


def _placeholder(value: Any) -> str:
    """For what JSON doesn't have (a column of dates), as transformers gives it to a template."""
    return f"<{type(value).__name__}>"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


class _Limited(ChatTemplate):
    @contextmanager
    def _limits(self, where: str) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))  # SIGPROF ends the process, whatever it is doing
        try:
            with super()._limits(where):
                yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _pairs(values: list[list[int]]) -> tuple[Any, ...]:
    return tuple(map(tuple, values))


def _answer(template: ChatTemplate, method: str, arguments: list[Any], options: dict[str, Any]) -> Any:
    value = getattr(template, method)(*arguments, **options)
    if method != "renderings_of":
        return value
    return [
        str(found) if isinstance(found, RenderError) else [(x.text, x.spans, x.earlier, x.next_role) for x in found]
        for found in value
    ]


def main() -> None:
    """Answer the lines of standard input."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template = None
    for line in sys.stdin.buffer:
        method, arguments, options = json.loads(line)
        answer: tuple[str, Any]
        try:
            if template is None:
                now = options.pop("now")
                template = _Limited(*arguments, **options, now=None if now is None else datetime.fromisoformat(now))
                answer = ("value", None)
            else:
                answer = ("value", _answer(template, method, arguments, options))
        except RenderError as error:
            answer = ("refused", str(error))
        except NibbleError as error:
            answer = ("error", str(error))
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
