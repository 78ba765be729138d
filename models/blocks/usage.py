"""Which experts the tokens of a model are sent to, counted while it computes.

Shapes: N tokens, E experts, K chosen per token, L layers with experts.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.blocks.documents import Documents
from models.blocks.router import Router

# Makes a tensor the sum of all processes' tensors, in place, and returns it.
Sum = Callable[[Tensor], Tensor]


def of_one_process(tensor: Tensor) -> Tensor:
    return tensor


class RouterWatch:
    """Sees what each router of a model chooses for the tokens that are no padding. In `CausalLM.watches`, it is told of
    every forward pass; what is computed a second time by activation checkpointing isn't seen again.

    routers: the L routers of the model by name.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError where `model` has no router."""
        self.routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        if not self.routers:
            raise ValueError("the model has no router")
        self._tokens, self._recomputing = 0, False
        for layer, router in enumerate(self.routers.values()):
            router.observers.append(functools.partial(self._observe, layer))

    def begin(self, documents: Documents) -> None:
        """Called before every forward pass: which of its tokens, the first ones, are real."""
        self._tokens = documents.real_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While a layer is computed a second time, nothing is seen."""
        self._recomputing = True
        try:
            yield
        finally:
            self._recomputing = False

    def _observe(self, layer: int, chosen: Tensor, scores: Tensor) -> None:
        if not self._recomputing:
            self._see(layer, chosen[: self._tokens], scores[: self._tokens])

    def _see(self, layer: int, chosen: Tensor, scores: Tensor) -> None:
        """Of real tokens only. May save nothing for the backward pass: a recomputation, which doesn't call this, must
        save the same tensors as the first computation.
        """
        raise NotImplementedError

    def _zeros(self) -> Tensor:
        """int64 [L, E], where the routers are."""
        router = next(iter(self.routers.values()))
        device = next(router.parameters()).device
        return torch.zeros(len(self.routers), router.out_features, dtype=torch.int64, device=device)


def count_choices(counts: Tensor, chosen: Tensor) -> None:
    """Add to counts int64 [E] how often each expert is in `chosen` int64 [N, K]."""
    flat = chosen.flatten()
    # Not bincount, for which the host would wait for the device.
    counts.scatter_add_(0, flat, torch.ones_like(flat))


@dataclass(frozen=True)
class Usage:
    """What was counted, of all processes.

    layers: numbers of the L layers with experts. counts: by layer, how often each expert was chosen. entropy: by layer,
    the mean over tokens of -Σ p ln p, p a router's scores (the probabilities of a softmax, or sigmoid's) divided by
    their sum; ln E at most. tokens: how many, without padding.
    """

    layers: list[int]
    counts: list[list[int]]
    entropy: list[float]
    tokens: int

    @property
    def dead(self) -> list[float]:
        """By layer, the share of experts that no token chose."""
        return [row.count(0) / len(row) for row in self.counts]


class ExpertUsage(RouterWatch):
    """Counts the choices of every forward pass, with gradients or without, between `start` and `stop`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.counting = False

    def start(self) -> None:
        self._counts = self._zeros()
        self._entropy = torch.zeros(len(self.routers), dtype=torch.float64, device=self._counts.device)
        self._seen, self.counting = 0, True

    def stop(self, total: Sum = of_one_process) -> Usage | None:
        """What was counted since `start`; None where no token was seen. Every process must call it."""
        self.counting = False
        # One sum over processes; float64 counts exactly beyond any number of tokens.
        seen = self._entropy.new_tensor([self._seen])
        sums = total(torch.cat((self._counts.double().flatten(), self._entropy, seen))).tolist()
        layers, experts = self._counts.shape
        tokens = int(sums[-1])
        if not tokens:
            return None
        counts = [list(map(int, sums[row * experts : (row + 1) * experts])) for row in range(layers)]
        numbers = [int(number[1]) for name in self.routers if (number := re.search(r"\blayers\.(\d+)\.", name))]
        return Usage(numbers, counts, [value / tokens for value in sums[-1 - layers : -1]], tokens)

    def begin(self, documents: Documents) -> None:
        super().begin(documents)
        if self.counting:
            self._seen += self._tokens
            # Where it is computed; weights may be kept on the host meanwhile.
            device = documents.offsets.device
            self._counts, self._entropy = self._counts.to(device), self._entropy.to(device)

    @torch.no_grad()
    def _see(self, layer: int, chosen: Tensor, scores: Tensor) -> None:
        if not self.counting or not len(chosen):
            return
        count_choices(self._counts[layer], chosen)
        # With the sum s of a token's scores q: -Σ (q/s) ln (q/s) = ln s - Σ q ln q / s.
        total = scores.sum(-1)
        self._entropy[layer] += (total.log() + torch.special.entr(scores).sum(-1) / total).sum()
