"""The text of an answer while its tokens arrive: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # what decoders make of bytes that aren't a whole character yet


class TextStream:
    """decode: ids to text. stops: texts that end the answer, which isn't to have them.

    tokens: all so far. text: what they say, as far as it is certain. stopped: a stop text has come.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self._decode, self._stops = decode, stops
        # Tokens [_context, _decoded) are in `text` already. They are decoded again with those that follow, since what
        # a token says can depend on the one before it (sentencepiece's first space).
        self._context = self._decoded = 0
        self._shown = 0

    def add(self, token: int) -> str:
        """What can be shown now that it couldn't before."""
        self.tokens.append(token)
        window = self._decode(self.tokens[self._context :])
        return "" if window.endswith(_INCOMPLETE) else self._take(window)

    def finish(self) -> str:
        """The rest, after the last token."""
        return self._take(self._decode(self.tokens[self._context :]), last=True)

    def _take(self, window: str, last: bool = False) -> str:
        before = self._decode(self.tokens[self._context : self._decoded]) if self._decoded > self._context else ""
        known = len(self.text)
        if not self.stopped:
            self.text += window[len(before) :]
            self._context, self._decoded = self._decoded, len(self.tokens)
            places = [self.text.find(stop, max(0, known - len(stop) + 1)) for stop in self._stops]
            found = [place for place in places if place >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        end = len(self.text) - (0 if last or self.stopped else self._beginning_of_a_stop())
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _beginning_of_a_stop(self) -> int:
        """How many of the last characters may become a stop text."""
        longest = 0
        for stop in self._stops:
            for count in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:count]):
                    longest = count
                    break
        return longest

    def tokens_of_text(self) -> list[int]:
        """The tokens without those that lie wholly in the stop text."""
        count = len(self.tokens)
        while self.stopped and count and self._decode(self.tokens[: count - 1]).startswith(self.text):
            count -= 1
        return self.tokens[:count]
