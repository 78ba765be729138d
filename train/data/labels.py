"""Which tokens of a text carry loss, and which are added to it.

What carries loss
    messages           the assistant's turns (train.data.chat finds the characters)
    prompt_completion  the completion. With a chat template the two are a user's and an assistant's message;
                       without one, prompt + completion are joined as they are
    text               everything

Where a turn ends. The last token to learn of a turn is its end-of-turn token; what a template writes after it
(a newline) is never generated and carries no loss. A template without such a token (GLM's turns end where
`<|user|>` begins, an id of eos_token_id) still has to teach stopping: that next token carries loss, and after
the last turn it is appended; if the next speaker's token doesn't end generation, the tokenizer's eos is
appended. `text` and joined completions end with eos.

A token belongs to a span when it covers any of its characters, also when it begins before it: what the model
must write has to be learnt, whatever the prompt shares with its first token. Where the template has several prompts
for a turn, the longest after which a token begins counts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.config.sections import Format
from train.data.chat import ChatTemplate, Rendering
from train.data.template_process import TemplateProcess
from train.data.token_backends import Encoded
from train.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Plain:
    """A document without template. start: the character where loss begins."""

    text: str
    start: int


class Labels:
    """Of the texts of one tokenizer and one template, or none."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | TemplateProcess | None):
        self.tokenizer, self.template = tokenizer, template
        closing = set() if template is None else {*tokenizer.encode(template.closing())}
        self._ends = tokenizer.eos_ids | (closing & tokenizer.special_ids)
        self._stops: dict[str, int | None] = {}

    def teach_stopping(self, form: Format) -> bool:
        """Whether a token that ends a text of this form, or a turn, is known: without one, stopping is not learnt."""
        return bool(self.tokenizer.eos_ids if form == "text" or self.template is None else self._ends)

    def of(self, text: Plain | Rendering, encoded: Encoded) -> tuple[list[int], NDArray[np.bool_]]:
        """The ids of an example, those of `text` with what is added to them, and a mask of those that carry loss."""
        if isinstance(text, Rendering):
            return self._chat_labels(text, encoded)
        prefix, eos = self.tokenizer.document_prefix, self.tokenizer.eos_id
        ids = [*prefix, *encoded.ids, *([] if eos is None else [eos])]
        mask = np.zeros(len(ids), np.bool_)
        mask[len(prefix) + _first_token(encoded, text.start) :] = True
        return ids, mask

    def _chat_labels(self, text: Rendering, encoded: Encoded) -> tuple[list[int], NDArray[np.bool_]]:
        ids, tokens = list(encoded.ids), len(encoded.ids)
        mask = np.zeros(tokens + 1, np.bool_)
        for (start, end), earlier in zip(text.spans, text.earlier, strict=True):
            first = _first_token(encoded, start, earlier)
            stop = bisect_left(encoded.offsets, end, key=lambda span: span[0])
            terminator = self._terminator(text.text, encoded, first, stop, end)
            if terminator is not None:
                stop = terminator + 1
            elif stop < tokens:
                stop += ids[stop] in self.tokenizer.eos_ids
            else:
                appended = self._stop_token(text.next_role)
                if appended is not None:
                    ids.append(appended)
                    stop += 1
            mask[first:stop] = True
        return ids, mask[: len(ids)]

    def _terminator(self, text: str, encoded: Encoded, first: int, stop: int, end: int) -> int | None:
        """The token of [first, stop) that ends the turn, with nothing but white space after it."""
        for index in range(stop - 1, first - 1, -1):
            if encoded.ids[index] in self._ends:
                return index
            if text[encoded.offsets[index][0] : end].strip():
                break
        return None

    def _stop_token(self, role: str) -> int | None:
        if role not in self._stops:
            assert self.template is not None
            following = self.tokenizer.encode(self.template.following(role))[:1]
            ends = bool(following) and following[0] in self.tokenizer.eos_ids
            self._stops[role] = following[0] if ends else self.tokenizer.eos_id
        return self._stops[role]


def _first_token(encoded: Encoded, start: int, earlier: Sequence[int] = ()) -> int:
    """The first token that reaches beyond `start`, or, where one lies across it, beyond the next of `earlier` across
    which none lies.
    """
    found = [bisect_right(encoded.offsets, place, key=lambda span: span[1]) for place in (start, *earlier)]
    for place, token in zip((start, *earlier), found, strict=True):
        if token == len(encoded.offsets) or encoded.offsets[token][0] >= place:
            return token
    return found[0]
