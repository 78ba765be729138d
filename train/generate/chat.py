"""A conversation in the terminal: answers appear as they come, and commands begin with a slash."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from quant.common.errors import NibbleError
from quant.common.files import check_outputs, user_path, write_atomically
from quant.common.terminal import print_error, say, show_text
from train.data.chat import Message
from train.data.template_files import missing_template
from train.generate.answers import Answerer

HELP = """\
/reset        forget the conversation
/system TEXT  what the model is told before it; without TEXT: nothing
/save FILE    write the conversation to a new file, as a row that can be trained on
/help         show this
/exit         leave, as Ctrl-D does
//TEXT        ask /TEXT, which would be a command
Ctrl-C stops an answer; at the prompt, twice, it leaves."""


class Chat:
    """The conversation so far, and what a line of input does to it.

    Raises NibbleError where the checkpoint has no chat template.
    """

    def __init__(self, answerer: Answerer) -> None:
        if answerer.template is None:
            raise missing_template(answerer.folder, "a chat", "--prompt, which then takes plain text")
        self.answerer = answerer
        self.system: str | None = None
        self.turns: list[Message] = []
        self._asked = 0

    @property
    def messages(self) -> list[Message]:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.turns]

    def run(self) -> None:
        """Read lines from standard input until it ends, or the user leaves."""
        _ = self.answerer.model  # before the first question, which shouldn't wait for it
        terminal = sys.stdin.isatty()
        if terminal:
            import readline  # noqa: F401 - makes input() a line editor with a history

            say("A chat. /help shows the commands; Ctrl-D leaves.", sys.stderr)
        interrupted = False
        while True:
            try:
                line = input("> " if terminal else "").strip()
            except EOFError:
                if terminal:
                    say("", sys.stdout)
                return
            except KeyboardInterrupt:
                if interrupted:
                    say("", sys.stdout)
                    return
                interrupted = True
                say("\n(Ctrl-C again, Ctrl-D or /exit leaves.)", sys.stderr)
                continue
            interrupted = False
            try:
                if line == "/exit":
                    return
                if line:
                    self.take(line)
            except NibbleError as error:
                print_error(error)

    def take(self, line: str) -> None:
        """Carry out a command, or answer a message. Raises NibbleError; the conversation is then as before."""
        if not line.startswith("/") or line.startswith("//"):
            self._answer(line.removeprefix("/"))
            return
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/system":
            self.system = rest or None
            say("(The system message is set.)" if rest else "(No system message.)", sys.stderr)
        elif command == "/save":
            self._save(rest)
        elif command == "/reset" and not rest:
            self.turns = []
            say("(The conversation is forgotten.)", sys.stderr)
        elif command == "/help" and not rest:
            say(HELP, sys.stderr)
        else:
            raise NibbleError(f"{line} is no command. /help shows those that there are.")

    def _answer(self, question: str) -> None:
        user: Message = {"role": "user", "content": question}
        with _no_interrupts():  # one would end the template's process
            prompt = self.answerer.tokens_of_messages([*self.messages, user])
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            show_text(piece, sys.stdout)

        turn, self._asked = self._asked, self._asked + 1
        end = ""
        try:
            if self.answerer.answer([prompt], turn, show)[0].finish == "length":
                end = self.answerer.cut_off
        except KeyboardInterrupt:
            end = "(stopped)"
        show_text("\n", sys.stdout)
        if end:
            say(end, sys.stderr)
        reasoning = self.answerer.tokenizer.decode(prompt).rstrip().endswith("<think>")
        self.turns += [user, as_message("".join(pieces), reasoning)]

    def _save(self, name: str) -> None:
        path = user_path(name)
        if not name:
            raise NibbleError("/save needs the name of a file.")
        if path.exists():
            raise NibbleError(f"{path} is there already. Choose another name.")
        if not self.turns:
            raise NibbleError("there is nothing to save yet.")
        check_outputs({"/save": path}, [])
        write_atomically(path, json.dumps({"messages": self.messages}, ensure_ascii=False).encode() + b"\n")
        say(f"(Saved in {path}.)", sys.stderr)


def as_message(text: str, reasoning: bool) -> Message:
    """An answer as a message. What comes before `</think>` is a field of its own, which templates leave out later.

    reasoning: the prompt ended with `<think>`, so the answer begins with reasoning.
    """
    before, closed, after = text.partition("</think>")
    if not closed and not (reasoning or text.startswith("<think>")):
        before, after = "", text
    thought = before.removeprefix("<think>").strip()
    message: Message = {"role": "assistant", "content": after.strip()}
    return message | {"reasoning_content": thought} if thought else message


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end of this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
