"""Kernels are tried in processes of their own: one that ends its process is left out, and the rest is tried."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from models import use_kernels
from models.use_kernels import try_apart
from quant.kernels.choice import KERNELS, uses, using

CPU = torch.device("cpu")

# What `python -m models.use_kernels` does, with kernels of the names' kinds.
TRIAL = """
import json, os, signal, subprocess, sys, time
for name in sys.argv[1:]:
    if name == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "raises":
        raise SystemExit("Triton: no such card")
    if name == "hangs":
        time.sleep(60)
    if name == "hangs in a compiler":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
    if name != "silent":
        print("a library's own line")
        print(json.dumps([name, "differs" if name == "wrong" else None]), flush=True)
"""


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_kernel_that_ends_the_trial_is_left_out_and_the_others_tried(processes: int) -> None:
    names = ["right", "dies", "wrong", "raises", "silent", "last"]
    wrong = try_apart((sys.executable, "-c", TRIAL), names, processes=processes)
    assert set(wrong) == set(names) - {"right", "last"}
    assert wrong["wrong"] == "differs"
    assert f"code {-signal.SIGSEGV}" in wrong["dies"]
    assert wrong["raises"] == "the trial ended with code 1: Triton: no such card"
    assert wrong["silent"] == "the trial said nothing"


def test_an_error_that_spoils_what_follows_is_not_blamed_on_the_next() -> None:
    """`main` ends its process after it, with code 0."""
    first_alone = TRIAL + "        raise SystemExit(0)"
    assert try_apart((sys.executable, "-c", first_alone), ["wrong", "right", "last"], processes=1) == {
        "wrong": "differs"
    }


@pytest.mark.parametrize("hangs", ["hangs", "hangs in a compiler"])
def test_a_trial_that_does_not_end_is_ended(hangs: str) -> None:
    """And blames nothing that another process has answered by then, or ended with."""
    began = time.monotonic()
    names = [hangs, "wrong", "right", "dies", "last", "right too"]
    wrong = try_apart((sys.executable, "-c", TRIAL), names, seconds=5, processes=2)
    assert time.monotonic() - began < 50  # the compiler hangs for 60
    assert wrong.pop("dies").startswith(f"the trial ended with code {-signal.SIGSEGV}")
    assert wrong == {hangs: "the trial took more than 5 s", "wrong": "differs"}


def test_what_no_kernel_is_to_blame_for_is_not_tried_with_each(tmp_path: Path) -> None:
    """As on a GPU that takes no second process."""
    log = tmp_path / "log"
    program = f"import sys; open({str(log)!r}, 'a').write('.'); sys.exit('CUDA error: all devices are busy')"
    names = [f"kernel {number}" for number in range(30)]
    wrong = try_apart((sys.executable, "-c", program), names, processes=1)
    assert list(wrong) == names
    assert set(wrong.values()) == {"the trial ended with code 1: CUDA error: all devices are busy"}
    assert log.read_text() == "..."


def test_only_what_was_wrong_is_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def trial(command: object, names: list[str]) -> dict[str, str]:
        asked.append(names)
        return {"router": "differs"} if len(asked) == 1 else {}

    monkeypatch.setattr(use_kernels, "try_apart", trial)
    monkeypatch.setattr(use_kernels, "_record", lambda device: tmp_path / "card.json")
    monkeypatch.setattr(use_kernels.flash, "offered", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    with using(()):
        for expected in (KERNELS.keys() - {"router"}, KERNELS.keys(), KERNELS.keys()):
            use_kernels.use_kernels(torch.device("cuda:0"))
            assert {name for name, kernel in KERNELS.items() if uses(kernel, torch.device("meta"))} == expected
    assert asked == [sorted(KERNELS), ["router"]]


def test_what_is_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "kernels" / "card.json"
    assert use_kernels._recall(path, ["a", "b"]) is None
    use_kernels._remember(path, ["a", "b"], {"b": "differs"})
    assert use_kernels._recall(path, ["a", "b"]) == {"b": "differs"}
    assert use_kernels._recall(path, ["a"]) is None, "other kernels"
    path.write_text('{"tried": ["a"], "wrong": null}')
    assert use_kernels._recall(path, ["a"]) is None
    (tmp_path / "file").write_text("")
    use_kernels._remember(tmp_path / "file" / "card.json", ["a"], {})
    assert "tried again the next time" in caplog.text


def test_nothing_is_used_on_a_cpu() -> None:
    with using(()):
        use_kernels.use_kernels(CPU)
        assert not any(uses(kernel, torch.device("meta")) for kernel in KERNELS.values())


def test_the_trial_prints_a_line_for_each_kernel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(use_kernels, "AVAILABLE", False)
    assert use_kernels.main(["cpu", "expert_swiglu", "combine_slots"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [[name, "Triton is not here"] for name in ("expert_swiglu", "combine_slots")]
