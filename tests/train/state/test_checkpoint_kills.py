"""A checkpoint is there whole or not at all: kill -9 at every point of a save, and a full disk."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quant.common.errors import NibbleError
from tests.checkpoint_helpers import names, save, save_checkpoint
from train.state.checkpoint import (
    read_checkpoint,
)
from train.state.optimizer_state import OptimizerState

# Saves step `new` in a child process that dies by SIGKILL when it opens, makes, renames or removes its k-th file, for
# every k until the save gets through; and by a limit on the file size, which kills in the middle of a file.
KILLS = """
import itertools, os, resource, shutil, signal, sys
from pathlib import Path
import torch
from train.state.optimizer_state import OptimizerState
from train.state.checkpoint import latest_checkpoint
from train.state.saver import CheckpointSaver

root = Path(sys.argv[1])

def save(directory, step, value):
    optimizer = OptimizerState({"a.b": torch.full((50,), float(value))}, {"kind": "AdamW", "steps": {"a.b": value}})
    CheckpointSaver(directory, 1).save(step, {"big": torch.full((9000,), float(value))}, optimizer, {"value": value})

def die_at(k):
    seen = itertools.count()
    events = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
    def hook(event, arguments):
        if event in events and next(seen) == k:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def die_in_the_file(limit):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def attempt(prepare, number, new, cleaned):
    directory = root / "work"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(root / "start", directory)
    child = os.fork()
    if child == 0:
        prepare(number)
        save(directory, new, 2)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    left = tuple(sorted(path.name for path in directory.iterdir()))
    checkpoint = latest_checkpoint(directory, report=lambda message: sys.exit(message))
    value = checkpoint.state["value"]
    assert checkpoint.step == (1 if value == 1 else new), left
    parameter = torch.nn.Parameter(torch.zeros(9000))
    checkpoint.load_tensors([("big", parameter)])
    assert bool((parameter == value).all()), left
    if left not in cleaned:
        cleaned.add(left)
        save(directory, new, 3)
        assert [path.name for path in directory.iterdir()] == [f"step-{new:06d}"], left
        assert latest_checkpoint(directory).state["value"] == 3
    return os.WIFSIGNALED(status), value

save(root / "start", 1, 1)
if (child := os.fork()) == 0:  # what it writes is not read again: the checksums are made on the way
    opened = []
    sys.addaudithook(lambda event, arguments: opened.append(arguments) if event == "open" else None)
    save(root / "read", 1, 1)
    ours = [(Path(name).name, flags) for name, _, flags in opened if str(name).startswith(str(root))]
    read = [name for name, flags in ours if name.endswith((".safetensors", "state.json")) and not flags & os.O_WRONLY]
    assert len(ours) > 4 and not read, ours
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
for new in (2, 1):  # the next step, and the same step again
    cleaned, outcomes = set(), []
    for k in itertools.count():
        killed, value = attempt(die_at, k, new, cleaned)
        if not killed:
            break
        outcomes.append(value)
    assert value == 2
    assert outcomes == sorted(outcomes), outcomes
    assert outcomes.count(1) > 10, outcomes  # while writing: the previous checkpoint
    assert outcomes.count(2) > 3, outcomes  # while deleting it: the new one
    assert len(cleaned) > 3, cleaned
    killed, value = attempt(die_in_the_file, 20_000, new, cleaned)
    assert killed and value == 1
print("done")
"""


def test_killed_at_any_point(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.stdout == "done\n", result.stderr


def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    big = {"big": torch.zeros(50_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # writing past it fails as on a full disk
    try:
        with pytest.raises(NibbleError) as caught:
            save_checkpoint(tmp_path, 4, big, OptimizerState({}, {}), {}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"the disk is full: {tmp_path}/.partial-step-000004/weights can't be written"
        " (File too large).\nMake room and run again.\n"
        f"The checkpoint of step 4 was not written; {path} is as it was."
    )
    assert names(tmp_path) == ["step-000002"]
    assert read_checkpoint(path).step == 2
