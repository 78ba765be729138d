"""A run, from conversion to adapter, asks the network for nothing."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.convert import convert
from tests.run_helpers import make_world, settings
from train.__main__ import main

CONNECTIONS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


@contextmanager
def connections() -> Iterator[list[str]]:
    """The events of Python's own audit (PEP 578) that reach for another machine. A hook can't be taken away again."""
    found: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in CONNECTIONS:
            found.append(f"{event} {arguments}")

    sys.addaudithook(hook)
    yield found
    watching = False


def test_a_run_opens_no_connection(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    with connections() as found:
        convert(world.model, tmp_path / "nf4", "nf4", "float32")
        assert main(settings(world, tmp_path / "out", model__path=str(tmp_path / "nf4"), train__max_steps=2)) == 0
        assert found == []
        with socket.socket() as one, pytest.raises(OSError):
            one.connect(("127.0.0.1", 1))  # where nobody listens
        assert len(found) == 1, "the hook sees connections"
