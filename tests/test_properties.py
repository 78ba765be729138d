"""Damaged and hostile files of every kind, a few of each: a message, never a traceback (python -m tests.fuzz: many)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.targets import Target, targets


@pytest.fixture(scope="module")
def made() -> dict[str, Target]:
    return {target.name: target for target in targets()}


MODELS = ("json", "headers", "configs", "indexes", "manifests", "adapters")
NAMES = (*MODELS, "runs", "checkpoints", "rows", "tokenizers", "templates", "yaml")


@pytest.mark.parametrize("name", NAMES)
def test_whatever_is_in_a_file_gets_an_answer(made: dict[str, Target], name: str) -> None:
    target = made[name]

    # A template's file is read by a process of its own, which takes longer than the others.
    @settings(
        max_examples=8 if name == "templates" else 60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(target.inputs)
    def opens(drawn: object) -> None:
        target.open(drawn)

    opens()


def test_every_target_is_tried(made: dict[str, Target]) -> None:
    assert set(NAMES) == set(made)
