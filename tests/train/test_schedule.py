"""Schedules against those of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from train.schedule import Schedule, learning_rate, learns, set_learning_rate, warmup_steps

PEAK = 3e-4


def expected(schedule: Schedule, total: int, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = transformers.get_scheduler(
        f"{schedule}_with_warmup" if schedule == "constant" else schedule,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
    )
    rates = []
    for _ in range(total + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 1), (20, 5), (20, 20), (1, 0), (1, 1)])
def test_equals_transformers(schedule: Schedule, total: int, warmup: int) -> None:
    actual = [learning_rate(schedule, PEAK, step, total, warmup) for step in range(total + 1)]
    assert actual == pytest.approx(expected(schedule, total, warmup), rel=1e-12, abs=1e-18)


def test_warmup_is_rounded_up() -> None:
    assert [warmup_steps(total, 0.1) for total in (0, 1, 10, 11, 240)] == [0, 1, 1, 2, 24]
    assert warmup_steps(100, 0.0) == 0


def test_past_the_end_stays_at_zero() -> None:
    assert learning_rate("linear", PEAK, 30, 20, 5) == 0
    assert learning_rate("cosine", PEAK, 30, 20, 5) == 0
    assert learning_rate("constant", PEAK, 30, 20, 5) == PEAK


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_only_a_single_step_of_warm_up_learns_nothing(schedule: Schedule) -> None:
    assert not learns(schedule, 1, 0.1)
    assert learns(schedule, 1, 0.0)
    assert learns(schedule, 2, 0.1)
    assert learns(schedule, 2, 1.0)


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'sine': constant, linear or cosine"):
        learning_rate("sine", PEAK, 3, 20, 0)  # type: ignore[arg-type]


def test_set_in_every_group() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=PEAK)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
