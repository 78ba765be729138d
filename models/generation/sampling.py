"""Which token follows: the largest logit, or a draw from the distribution that temperature and filters leave.

B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from quant.common.errors import NibbleError
from quant.common.words import shown

# What a setting may be: in words, from, to; None: also switched off by null.
_WANTED = {
    "temperature": "0 (the most likely token, always) or a number up to 100",
    "top_k": "an integer of at least 1",
    "top_p": "above 0 and at most 1",
    "min_p": "from 0 to 1",
    "repetition_penalty": "above 0 and at most 100 (1: none)",
}
_OPTIONAL = ("top_k", "top_p", "min_p")


def check_setting(name: str, value: Any, label: str = "") -> None:
    """Whether `value` can be the field `name` of Sampling. Raises NibbleError that calls it `label`."""
    if value is None and name in _OPTIONAL:
        return
    kinds = int if name == "top_k" else int | float
    fine = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if fine:
        least, most = {"top_k": (1, math.inf), "top_p": (0, 1), "min_p": (0, 1)}.get(name, (0, 100))
        may_be_least = name not in ("top_p", "repetition_penalty")
        fine = least <= value <= most and (value > least or may_be_least)
    if not fine:
        raise NibbleError(f"{label or name} must be {_WANTED[name]}, got {shown(value)}.")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from logits. Raises NibbleError for a value out of its range.

    The steps, in the order and with the results of transformers' logits processors:

    repetition_penalty: the logit of every token seen before is divided by it where positive, else multiplied (CTRL,
        arXiv:1909.05858). 1: no change.
    temperature: what the logits are divided by. 0: the largest logit wins and nothing is drawn.
    top_k: only the k most likely tokens, and those as likely as the last of them.
    top_p: only the fewest most likely tokens that together have this probability (arXiv:1904.09751).
    min_p: only tokens at least this times as likely as the most likely one (arXiv:2407.01082).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_setting(field.name, getattr(self, field.name))

    def choose(self, logits: Tensor, seen: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The next token of each row, int64 [B].

        logits: float32 [B, V]. seen: for each row the tokens before it, int64 [T], prompt and new ones; used only with
        a repetition penalty, empty without one. generator: on the logits' device; torch's own where it is None.
        Raises NibbleError where the logits are not finite.
        """
        if not bool(logits.amax(-1).isfinite().all()):  # the largest is NaN if any is
            raise NibbleError(
                "the model's logits are not finite numbers, so no token can be chosen.\n"
                "The weights, or the adapter's, are damaged, or too large for the dtype: try --dtype float32."
            )
        if self.temperature == 0:
            return self._penalised(logits, seen).argmax(-1)
        return torch.multinomial(self.probabilities(logits, seen), 1, generator=generator).squeeze(-1)

    def probabilities(self, logits: Tensor, seen: Sequence[Tensor]) -> Tensor:
        """The distribution that `choose` draws from at a temperature above 0, float32 [B, V]; arguments as there."""
        scores = self._penalised(logits, seen) / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ascending, order = scores.sort(dim=-1)
            out = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            out[:, -1] = False
            scores = scores.masked_fill(torch.empty_like(out).scatter_(-1, order, out), -math.inf)
        if self.min_p is not None:
            likely = scores.softmax(-1)
            scores = scores.masked_fill(likely < self.min_p * likely.amax(-1, keepdim=True), -math.inf)
        return scores.softmax(-1)

    def _penalised(self, logits: Tensor, seen: Sequence[Tensor]) -> Tensor:
        if self.repetition_penalty == 1:
            return logits
        before = torch.zeros_like(logits, dtype=torch.bool)
        for row, tokens in zip(before, seen, strict=True):
            row[tokens.to(row.device)] = True
        changed = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
        return torch.where(before, changed, logits)


GREEDY = Sampling()
