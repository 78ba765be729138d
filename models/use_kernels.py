"""Which kernels a run uses on its GPU: those that were right when they were tried there, in processes of their own.

In processes of their own, since a kernel may do worse than be wrong: an address that isn't there ends all that its
process can do on the GPU, and a compiler can end the process. The first trial on a card compiles some 135 kernels, each
1 to 2 s of a core; what was found is remembered in the user's cache folder, for this card, driver and version of torch,
of Triton and of the kernels themselves. One that was wrong is tried anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO

import torch

import models.kernels
import models.registry  # with every layer that has kernels
import quant.kernels
import quant.kernels.rounding  # the optimiser's, which no layer has
from models.attention import flash
from quant.common.devices import allowed_cores
from quant.common.errors import NibbleError, in_one_line
from quant.common.files import write_atomically
from quant.common.jsonfile import parse_json
from quant.kernels.choice import KERNELS, use
from quant.kernels.language import AVAILABLE

log = logging.getLogger("nibble")

TRIAL = (sys.executable, "-m", "models.use_kernels")
TRIAL_SECONDS = 600.0  # of the processes that run at once
MOST_PROCESSES = 8  # each has a CUDA context of some hundred MiB
SILENT_PROCESSES = 3  # in turn, after which the device or the installation is taken to be what fails


def use_kernels(device: torch.device, wanted: str = "auto", *, first: bool = True) -> None:
    """Decides for this process, before it computes anything on `device`.

    wanted: auto, all kernels that are right on this device (none on a CPU), or torch, none. first: of the processes on
    this machine; the others come after it, and believe what it has remembered. It says in one line which are left out.
    FlashAttention 3 or 4, where it is installed (models/attention/flash.py), is decided in the same way; a line says
    what computes attention.
    """
    use(())
    flash.use(None)
    if wanted == "torch" or device.type != "cuda":
        return
    torch.cuda.set_device(device)  # Triton launches on the current one
    names, path = sorted(KERNELS), _record(device)
    attention = flash.offered(device)
    if attention is not None:
        names.append(attention)
    wrong = _recall(path, names)
    if wrong is None or (first and wrong):
        wrong = try_apart((*TRIAL, str(device)), names if wrong is None else list(wrong))
        _remember(path, names, wrong)
    reason = _use_attention(attention, wrong.pop(attention or "", None))
    names, card = [name for name in names if name != attention], torch.cuda.get_device_name(device)
    use(set(names) - set(wrong))
    if first:
        log.info("attention on %s: %s", card, "torch's FlashAttention 2" if reason or not attention else attention)
    if reason:  # each process decides for itself whether the package loads
        log.warning("%s is not used on %s, where torch's FlashAttention 2 is: %s", attention, card, reason)
    if first and wrong:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in wrong.items())
        log.warning(
            "%s of %s kernels are not used on %s, where torch's own operations compute the same, slower: %s",
            len(wrong), len(names), card, reasons,
        )  # fmt: skip


def _use_attention(name: str | None, wrong: str | None) -> str | None:
    """Why it isn't used, if it isn't: what was wrong when it was tried, or an error now."""
    if name is not None and wrong is None:
        try:
            flash.use(name)
        except Exception as error:  # noqa: BLE001  whatever its package raises
            return in_one_line(error)
    return wrong


def try_apart(
    command: Sequence[str], names: Sequence[str], seconds: float = TRIAL_SECONDS, processes: int | None = None
) -> dict[str, str]:
    """Tries the kernels `names` by `command`, which is given some of them and prints a line of JSON for each, in order:
    the kernel's name and what is wrong with it, or null. Which of them are wrong, and what is.

    processes: at once, since what takes long is the compiler, on one core (default: by the cores).
    """
    wrong: dict[str, str] = {}
    count = processes or max(1, min(MOST_PROCESSES, allowed_cores() // 2, len(names)))
    parts = [_Part(list(names[first::count])) for first in range(count)]
    while left := [part for part in parts if part.left]:
        deadline, running = time.monotonic() + seconds, list[_Process]()
        try:
            for part in left:
                running.append(_Process([*command, *part.left]))
            for part, process in zip(left, running, strict=True):
                wrong |= part.answered(*process.ending(deadline, seconds))
        finally:
            for process in running:
                process.end()
    return wrong


@dataclass
class _Part:
    """Kernels that are left for a process to try, and how many ended in turn without an answer."""

    left: list[str]
    silent: int = 0

    def answered(self, output: str, failure: str | None) -> dict[str, str]:
        """What is wrong with which, by what a process printed and how it failed, if it did."""
        wrong, before = {}, len(self.left)
        for line in output.splitlines():
            with contextlib.suppress(ValueError, TypeError):
                name, found = parse_json(line)
                if self.left and name == self.left[0]:
                    self.left.pop(0)
                    if found is not None:
                        wrong[name] = str(found)
        self.silent = self.silent + 1 if len(self.left) == before else 0
        # The process ended with the next one, unless it ended itself after an error that spoils what follows. Where
        # none gets as far as an answer, it is no kernel's fault, and the others needn't be tried.
        if self.left and (failure is not None or self.silent):
            blamed = len(self.left) if self.silent == SILENT_PROCESSES else 1
            wrong |= dict.fromkeys(self.left[:blamed], failure or "the trial said nothing")
            del self.left[:blamed]
        return wrong


class _Process:
    """A process that writes into files: a pipe would stay open as long as any compiler that it has started hangs."""

    def __init__(self, command: Sequence[str]) -> None:
        self._out, self._err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115  they end with this object
        self._running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err)

    def ending(self, deadline: float, seconds: float) -> tuple[str, str | None]:
        """What it printed, and how it failed, if it did; ended at the deadline, which is `seconds` after its start."""
        try:
            code = self._running.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            return self._said(self._out), f"the trial took more than {seconds:.0f} s"
        last = (self._said(self._err).strip().splitlines() or [""])[-1][:200]
        return self._said(self._out), f"the trial ended with code {code}: {last}" if code else None

    @staticmethod
    def _said(file: IO[bytes]) -> str:
        file.seek(0)
        return file.read().decode(errors="replace")

    def end(self) -> None:
        self._running.kill()
        self._running.wait()


def _record(device: torch.device) -> Path:
    """What was found on this card, with this driver, torch, Triton and these kernels."""
    properties = torch.cuda.get_device_properties(device)
    known = [properties.name, properties.major, properties.minor, torch.__version__, _driver(), _triton()]
    known += [f"{name} {flash.installed(name)}" for name in flash.PACKAGES]
    folders = [Path(str(module.__file__)).parent for module in (quant.kernels, models.kernels)]
    attention = Path(str(flash.__file__)).parent
    ours = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    for file in (*ours, attention / "flash.py", attention / "causal.py"):
        known.append(hashlib.sha256(file.read_bytes()).hexdigest())
    name = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    # expanduser leaves the tilde where a user has no home.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "nibble" / "kernels" / f"{name}.json"


def _driver() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    return str(torch.version.cuda)


def _triton() -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("triton")
    return "none"


def _recall(path: Path, names: Sequence[str]) -> dict[str, str] | None:
    """The kernels that were wrong, and why; None if nobody has tried."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        record = parse_json(path.read_bytes())
        if record["tried"] == list(names) and isinstance(record["wrong"], dict):
            return {str(name): str(reason) for name, reason in record["wrong"].items()}
    return None


def _remember(path: Path, names: Sequence[str], wrong: dict[str, str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"tried": list(names), "wrong": wrong}).encode())
    except (OSError, NibbleError) as error:
        log.warning("the kernels will be tried again the next time, as that can't be remembered: %s", error)


def main(argv: Sequence[str] | None = None) -> int:
    """Tries kernels on a device: `cuda:0 NAME …`. Prints a line of JSON for each: its name, what is wrong or null."""
    given, *names = sys.argv[1:] if argv is None else argv
    device = torch.device(given)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for name in names:
        if name in flash.PACKAGES:
            failure = flash.failure(name, device)
        else:
            failure = KERNELS[name].failure(device) if AVAILABLE else "Triton is not here"
        print(json.dumps([name, failure]), flush=True)
        if failure is not None and AVAILABLE:
            break  # an illegal address spoils all that this process does later; the others are tried in another one
    return 0


if __name__ == "__main__":
    sys.exit(main())
