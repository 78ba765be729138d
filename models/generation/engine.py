"""Generation: prompts are computed once, by blocks; then every row gets a token at a time, all rows in one pass.

Rows are uneven documents in a flat batch, as in training: nothing is padded, and a row computes what it would alone.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from models.attention.cache import Cache, Continued
from models.blocks.documents import Documents
from models.generation.sampling import GREEDY, Sampling
from quant.common.errors import NibbleError

# Tokens of prompts that go through the model at a time: what is computed between layers doesn't grow with a prompt.
PROMPT_BLOCK = 2048


class LanguageModel(Protocol):
    """What is needed of models.decoder.CausalLM."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def head(self) -> Callable[[Tensor], Tensor]: ...
    def hidden(self, tokens: Tensor, documents: Documents) -> Tensor: ...


@dataclass
class Generated:
    """A row's new tokens, without the one that stopped it. finish: stop, or length after max_new_tokens."""

    tokens: list[int] = field(default_factory=list)
    finish: Literal["stop", "length"] = "length"


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop: Collection[int] = (),
    seed: int | None = None,
    on_token: Callable[[int, int], bool] | None = None,
) -> list[Generated]:
    """Continues prompts, lists of tokens of any lengths, each by at most `max_new_tokens`; in the order of prompts.

    sampling: how tokens are chosen; the most likely ones by default. seed: of what is drawn, None for torch's own
    generator. stop: tokens that end a row. on_token: called with the row's index and each new token that is kept, as
    soon as it is there; the row ends (as by a stop token) where it returns True.
    The rows are computed together: memory is that of B times the longest row. Those that end make room.
    Raises NibbleError for no tokens, or tokens that the vocabulary doesn't have.
    """
    _check(model, prompts, max_new_tokens)
    if not prompts:
        return []
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
    # Growing tensors, for what needs them alone.
    penalised = sampling.repetition_penalty != 1
    seen = [torch.tensor(list(prompt), device=model.device) for prompt in prompts] if penalised else []
    results = [Generated() for _ in prompts]
    rows = list(range(len(prompts)))  # of `prompts`, those that go on
    continuation = Continuation(model, prompts)
    logits = continuation.logits
    while True:
        chosen = sampling.choose(logits, [seen[row] for row in rows] if penalised else [], generator)
        going_on = []
        for index, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            result = results[row]
            if token in stop:
                result.finish = "stop"
                continue
            result.tokens.append(token)
            if on_token is not None and on_token(row, token):
                result.finish = "stop"
            elif len(result.tokens) < max_new_tokens:
                if penalised:
                    seen[row] = torch.cat((seen[row], chosen[index : index + 1]))
                going_on.append(index)
        if not going_on:
            return results
        if len(going_on) < len(rows):
            continuation.select(going_on)
            rows, chosen = [rows[index] for index in going_on], chosen[going_on]
        logits = continuation.step(chosen)


class Continuation:
    """Prompts that were computed, and go on by tokens. logits: float32 [B, V], for what follows each prompt."""

    @torch.no_grad()
    def __init__(self, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.lengths = [len(prompt) for prompt in prompts]
        self.cache = Cache(len(prompts))
        ends: dict[int, Tensor] = {}  # the hidden state after each prompt, by row
        for block in blocks(self.lengths, PROMPT_BLOCK):
            tokens = torch.tensor([t for row, start, stop in block for t in prompts[row][start:stop]])
            pieces = [(row, stop - start, start, self.lengths[row]) for row, start, stop in block]
            hidden, documents = self._pass(tokens.to(model.device), pieces)
            for piece in documents.pieces:
                if piece.end == piece.total:
                    ends[piece.row] = hidden[piece.tokens.stop - 1].clone()
        self.logits = self._logits(torch.stack([ends[row] for row in range(len(prompts))]))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Adds a token to each row, int64 [B]: logits float32 [B, V] for what follows."""
        pieces = [(row, 1, length, length + 1) for row, length in enumerate(self.lengths)]
        hidden, _ = self._pass(tokens, pieces)
        self.lengths = [length + 1 for length in self.lengths]
        return self._logits(hidden)

    def select(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only."""
        self.cache.select(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def _pass(self, tokens: Tensor, pieces: Sequence[tuple[int, int, int, int]]) -> tuple[Tensor, Continued]:
        documents = Continued.of(self.cache, pieces, self.model.device)
        return self.model.hidden(tokens, documents), documents

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden).to(torch.float32)


def blocks(lengths: Sequence[int], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts prompts of these lengths into blocks of at most `size` tokens; yields their parts (row, start, stop).

    A prompt that fits into a block is never cut.
    """
    block: list[tuple[int, int, int]] = []
    room = size
    for row, length in enumerate(lengths):
        if block and min(length, size) > room:
            yield block
            block, room = [], size
        for start in range(0, length, size):
            part = (row, start, min(start + size, length))
            if start:
                yield block
                block, room = [], size
            block.append(part)
            room -= part[2] - part[1]
    yield block


def _check(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise NibbleError(f"max_new_tokens is {max_new_tokens}; at least one token can be generated.")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise NibbleError(f"prompt {row} has no tokens; give it at least one, such as the model's first token.")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= model.vocabulary:
            raise NibbleError(
                f"prompt {row} has tokens from {low} to {high}; "
                f"the model's vocabulary has 0 to {model.vocabulary - 1}.\n"
                "Do tokenizer and model belong together?"
            )
