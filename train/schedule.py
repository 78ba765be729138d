"""Learning rate of a step: linear warm-up, then constant, linear or cosine. Pure functions of the step's number."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer

Schedule = Literal["constant", "linear", "cosine"]


def warmup_steps(total_steps: int, ratio: float) -> int:
    """Steps of warm-up out of `total_steps`, rounded up."""
    return math.ceil(total_steps * ratio)


def learning_rate(schedule: Schedule, peak: float, step: int, total_steps: int, warmup: int) -> float:
    """The learning rate of `step`, 0 being the first of `total_steps`; the first `warmup` rise from 0 to `peak`.

    After the warm-up: `constant` stays; `linear` and `cosine` fall and would reach 0 at step `total_steps`, the first
    that isn't done. Formulas: get_{constant,linear,cosine}_schedule_with_warmup of transformers, where likewise the
    first step of a warm-up has rate 0. Steps past the end keep the last value, 0.
    """
    if step < warmup:
        return peak * (step / warmup)
    if schedule == "constant":
        return peak
    falling = max(1, total_steps - warmup)
    if schedule == "linear":
        return peak * max(0.0, (total_steps - step) / falling)
    if schedule == "cosine":
        progress = min(1.0, (step - warmup) / falling)
        return peak * (0.5 * (1.0 + math.cos(math.pi * progress)))
    raise ValueError(f"unknown schedule {schedule!r}: constant, linear or cosine")


def rate_of(
    schedule: Schedule, peak: float, step: int, total_steps: int, warmup_ratio: float, extended_from: int = 0
) -> float:
    """The learning rate of `step` of a run of `total_steps`.

    extended_from: the steps that the run had before it was extended, 0 where it wasn't. `constant` then stays at its
    peak; `linear` and `cosine`, which had ended at 0, are those of a run of the added steps alone, with its warm-up.
    """
    if extended_from and schedule == "constant":
        return peak
    steps = total_steps - extended_from
    return learning_rate(schedule, peak, step - extended_from, steps, warmup_steps(steps, warmup_ratio))


def learns(schedule: Schedule, total_steps: int, warmup_ratio: float, extended_from: int = 0) -> bool:
    """Whether any step has a learning rate above 0. A run of one step with a warm-up has none."""
    steps = range(extended_from, total_steps)
    return any(rate_of(schedule, 1.0, step, total_steps, warmup_ratio, extended_from) > 0 for step in steps)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Let the optimiser's next step use `value`, in all groups of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = value
