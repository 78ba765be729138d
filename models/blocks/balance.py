"""How evenly a training step spreads its tokens over the experts, and the two published ways to even it out.

A router that is trained can drift towards a few experts. Either an auxiliary loss pulls it back (Switch Transformer,
Fedus et al. 2021, arXiv:2101.03961 eq. 4 to 6, as Qwen's models have it), or the bias that takes part in choosing is
moved after every step (DeepSeek-V3, arXiv:2412.19437 §2.1.2, as GLM's and Trinity's have it).

A step may be spread over several processes, each with micro-batches of its own; `Balance.reduce` makes one load of
theirs.

Shapes: N tokens, E experts, K chosen per token, L layers with experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.blocks.documents import Documents
from models.blocks.router import SigmoidRouter
from models.blocks.usage import RouterWatch, Sum, count_choices, of_one_process


class Balance(RouterWatch):
    """Counts how often each expert is chosen in an optimiser step, over the tokens that are no padding.

    As `CausalLM.balance` it is called at every forward pass. A step is `begin_step`, then for each micro-batch a
    forward pass and `collect`, and after the optimiser `end_step`. Passes without gradients and the recomputations of
    activation checkpointing count nothing. This class only counts; the other two below also act.

    counts: int64 [L, E], of the step so far and of this process; after
    `end_step` of all.
    reduce: makes a tensor the sum of all processes' tensors, in place, and returns it. Every process must then call
    `end_step`.
    """

    def __init__(self, model: nn.Module, rate: float = 0.0) -> None:
        """rate: how strongly a method acts. Raises ValueError where `model` has no router."""
        super().__init__(model)
        self.rate = rate
        self.reduce: Sum = of_one_process
        self.begin_step()

    def begin_step(self) -> None:
        self.counts = self._zeros()

    def begin(self, documents: Documents) -> None:
        super().begin(documents)
        # Where it is computed; weights may be kept on the host meanwhile.
        self._passed = self._zeros().to(documents.offsets.device)

    def collect(self, share: float) -> Tensor | None:
        """Adds the forward pass to the step; returns what is to be added to its loss, a float32 scalar, or None.

        share: the micro-batch's part of the real tokens of the step, those of all processes. A micro-batch may be
        padding alone; its share is 0.
        """
        self.counts = self.counts.to(self._passed.device) + self._passed
        return None

    def end_step(self) -> dict[str, float]:
        """Called after the optimiser's step; returns what is to be logged, by name.

        load_imbalance: how often the most chosen expert was chosen, relative to the mean over experts; mean over
        layers. 1 is an even load, E / K the most uneven one.
        """
        self.counts = self.reduce(self.counts)
        counts = self.counts.double()
        return {"load_imbalance": (counts.amax(-1) / counts.mean(-1)).mean().item()}

    def buffers(self) -> dict[str, Tensor]:
        """What changes from step to step and is no parameter, by its name in the model: a part of every checkpoint."""
        return {}

    def _see(self, layer: int, chosen: Tensor, scores: Tensor) -> None:
        if torch.is_grad_enabled():
            self._count(layer, chosen, scores)

    def _count(self, layer: int, chosen: Tensor, probabilities: Tensor) -> None:
        count_choices(self._passed[layer], chosen)


class AuxiliaryLoss(Balance):
    """Adds rate · E · Σ_e f_e · P_e to each micro-batch's loss.

    f_e is how often a token chose expert e and P_e its mean probability, over the tokens of the micro-batch in all
    layers together; the gradient flows through P. The loss is K where the load is even.

    It is a loss of micro-batches, not of the step: where several processes cut a step into other micro-batches than one
    process does (train/data/batches.py says when), it is another loss.
    """

    def begin_step(self) -> None:
        super().begin_step()
        self._loss = torch.zeros((), device=self.counts.device)

    def begin(self, documents: Documents) -> None:
        super().begin(documents)
        self._probabilities = self._passed[0].float()

    def _count(self, layer: int, chosen: Tensor, probabilities: Tensor) -> None:
        super()._count(layer, chosen, probabilities)
        self._probabilities = self._probabilities + probabilities.sum(0)

    def collect(self, share: float) -> Tensor:
        super().collect(share)
        layers, experts = self._passed.shape
        tokens = max(self._tokens, 1)  # padding alone has zeros to divide
        chosen = self._passed.sum(0) / (layers * tokens)
        probability = self._probabilities / (layers * tokens)
        loss = share * experts * (chosen * probability).sum()
        self._loss = self._loss.to(loss.device) + loss.detach()
        return self.rate * loss

    def end_step(self) -> dict[str, float]:
        """aux_loss: without the rate, over the whole step."""
        return {"aux_loss": self.reduce(self._loss).item(), **super().end_step()}


class BiasUpdate(Balance):
    """Lowers the bias of every expert that the step chose more often than the mean by `rate`, raises the others'.

    The load is that of all processes, so the biases stay the same on each.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        """Raises ValueError for a router without a bias."""
        super().__init__(model, rate)
        self._biased = {name: router for name, router in self.routers.items() if isinstance(router, SigmoidRouter)}
        if len(self._biased) < len(self.routers):
            raise ValueError("only sigmoid routers have a bias that could be moved")

    def end_step(self) -> dict[str, float]:
        logged = super().end_step()
        with torch.no_grad():
            # In whole numbers, so that an expert at the mean is exactly at it.
            surplus = self.counts * self.counts.shape[-1] - self.counts.sum(-1, keepdim=True)
            for router, direction in zip(self._biased.values(), surplus.sign(), strict=True):
                router.e_score_correction_bias -= self.rate * direction
        return logged

    def buffers(self) -> dict[str, Tensor]:
        return {
            f"{name}.e_score_correction_bias": router.e_score_correction_bias for name, router in self._biased.items()
        }
