"""From what is asked to what the model answers: template, tokenizer, the loop of tokens, and text again."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from models.decoder import CausalLM
from models.generation.engine import generate
from quant.common.errors import NibbleError
from train.data.chat import Message, RenderError
from train.data.template_files import missing_template
from train.data.template_process import TemplateProcess
from train.data.tokenizer import Tokenizer
from train.generate.settings import FILE, Settings
from train.generate.stream import TextStream


@dataclass(frozen=True)
class Answer:
    """text: without stop text and special tokens. tokens: the new ids, without those that ended the answer.

    finish: stop (at a stop token or text) or length.
    """

    text: str
    tokens: list[int]
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class Answerer:
    """A model with what it needs to be asked.

    load: gives the model, when it is first asked; what is wrong with a prompt shows before that. folder: named in
    messages. template: None where the checkpoint has none. plain: prompts are given to the model as they are, without
    the template. context: the positions that the model is made for, None where that isn't known. made_of: changes when
    the model does, or how it is stored.
    """

    load: Callable[[], CausalLM]
    tokenizer: Tokenizer
    template: TemplateProcess | None
    settings: Settings
    folder: Path
    plain: bool = False
    context: int | None = None
    made_of: str = ""

    @cached_property
    def model(self) -> CausalLM:
        return self.load()

    @property
    def longest(self) -> int | None:
        """Tokens of a prompt with its answer; None: any number."""
        return min((one for one in (self.context, self.settings.max_length) if one is not None), default=None)

    @property
    def cut_off(self) -> str:
        """What to say of an answer that ended by its length."""
        name = "max_length" if self.settings.max_length is not None else "--max-new-tokens"
        value = self.settings.max_length or self.settings.max_new_tokens
        return f"(cut off: {name} {value}, or the model's last position)"

    def tokens_of_prompt(self, prompt: str) -> list[int]:
        """The tokens that ask for an answer to a text: as the user's message, or, `plain` or without a template, for
        its continuation. Raises NibbleError.
        """
        if self.template is None or self.plain:
            return self._tokens(prompt, self.tokenizer.document_prefix)
        return self.tokens_of_messages([{"role": "user", "content": prompt}])

    def tokens_of_messages(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The tokens that ask for the assistant's next message. Raises NibbleError."""
        if self.template is None:
            raise missing_template(self.folder, "a conversation", "a plain prompt")
        try:
            text = self.template.render(messages, tools, add_generation_prompt=True)
        except RenderError as error:
            raise NibbleError(f"the chat template refuses the conversation: {error}") from error
        return self._tokens(text)

    def _tokens(self, text: str, prefix: Sequence[int] = ()) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise NibbleError(f"the prompt has {error.object[error.start]!a} in it, which is no character.") from error
        tokens = [*prefix, *self.tokenizer.encode(text)]
        if not tokens:
            raise NibbleError("the prompt is empty.")
        if self.longest is not None and len(tokens) >= self.longest:
            what = "the model is made for" if self.longest == self.context else f"max_length of {FILE} is"
            raise NibbleError(f"the prompt has {len(tokens):,} tokens; {what} {self.longest:,}, the answer included.")
        return tokens

    def answer(
        self, prompts: Sequence[Sequence[int]], turn: int = 0, show: Callable[[str], None] | None = None
    ) -> list[Answer]:
        """The answers to prompts in tokens, computed together.

        turn: added to the seed, so that not every call draws the same. show: gets the text of a single prompt's answer
        as far as it is there. An answer ends at the model's last position, as one that is too long.
        """
        settings, decode = self.settings, self._decode
        streams = [TextStream(decode, settings.stop_texts) for _ in prompts]
        most = [settings.max_new_tokens] * len(prompts)
        if self.longest is not None:
            most = [min(longest, self.longest - len(prompt)) for longest, prompt in zip(most, prompts, strict=True)]

        def take(row: int, token: int) -> bool:
            piece = streams[row].add(token)
            if show is not None and piece:
                show(piece)
            return streams[row].stopped or len(streams[row].tokens) >= most[row]

        # Without a seed torch draws the same in every process.
        seed = secrets.randbits(63) if settings.seed is None else (settings.seed + turn) % 2**63
        found = generate(
            self.model,
            prompts,
            max(most),
            sampling=settings.sampling,
            stop=settings.stop_ids,
            seed=seed,
            on_token=take,
        )
        answers = []
        for stream, one, longest in zip(streams, found, most, strict=True):
            rest = stream.finish()
            if show is not None and rest:
                show(rest)
            if stream.stopped:
                answers.append(Answer(stream.text, stream.tokens_of_text(), "stop"))
            else:
                cut_off = len(stream.tokens) >= longest
                answers.append(Answer(decode(stream.tokens), stream.tokens, "length" if cut_off else one.finish))
        return answers

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=True)
