"""What a layer's recomputation takes from its first computation rather than find it out again.

Activation checkpointing computes a layer twice. Where the host has waited for the device, as for the rows of experts,
it must not wait a second time for the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

_T = TypeVar("_T")


class FirstPass:
    """Of one call of a layer: what `kept` gave, in order. It lives as long as the layer's recomputation may come."""

    def __init__(self) -> None:
        self._values: list[Any] = []

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around the layer's first computation."""
        yield from self._within(None)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around its recomputation, which may end early."""
        yield from self._within(iter(self._values))

    def _within(self, again: Iterator[Any] | None) -> Iterator[None]:
        before = _current.set((self._values, again))
        try:
            yield
        finally:
            _current.reset(before)


_current: ContextVar[tuple[list[Any], Iterator[Any] | None] | None] = ContextVar("first_pass", default=None)


def kept(make: Callable[[], _T]) -> _T:
    """What `make` gives, and in a layer's recomputation what it gave the first time; nothing that needs a gradient."""
    current = _current.get()
    if current is None:
        return make()
    values, again = current
    if again is not None:
        value: _T = next(again)
        return value
    values.append(made := make())
    return made
