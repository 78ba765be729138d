"""Settings of all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# The models of the tests are so small that threads cost more than they bring. Set before torch is first imported, and
# in the environment, so that the commands which tests start have it too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As `python -m train` sets it: without torch's compiler bitsandbytes is imported in half the time.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


@pytest.fixture(scope="session")
def taught_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """outputs/demo with a small model that was taught a few answers. To be left as it is."""
    from tests.generate_helpers import make_demo

    return make_demo(tmp_path_factory.mktemp("taught"))


@pytest.fixture
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave no loss.png, which takes longer to draw than a tiny model's step."""
    monkeypatch.setattr("train.run.loss_curve", lambda *_: None)


@pytest.fixture
def signals_heeded() -> Iterator[None]:
    """Ctrl-C and a closed terminal do here, and in what a test starts, what they usually do. In the background of a
    script, or under nohup, they are ignored.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
