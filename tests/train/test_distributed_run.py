"""Several processes do what `python -m train` does, and take up what another number of processes has left.

Those that torchrun itself starts: tests/train/test_distributed_failures.py, and the tests here that are marked slow.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.run_helpers import World, curve, forked, in_processes, losses, make_world, settings
from train.__main__ import main
from train.output.metrics import read_metrics
from train.state.best import read_evaluation

# Extending a run leaves its checkpoints valid only where the schedule doesn't know the end.
STEADY = {
    "train__schedule": "constant",
    "train__warmup_ratio": 0,
    "train__gradient_accumulation": 2,
    "train__eps": 1e-3,
    "output__expert_usage": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, undisturbed."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(settings(world, out, **STEADY, train__max_steps=6, train__eval_every=3)) == 0
    return out


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def worst(out: Path, other: Path) -> float:
    """The largest relative difference between two runs: of a loss, or of a tensor of the adapters."""
    ours, theirs = curve(out), curve(other)
    assert [record[:2] for record in ours] == [record[:2] for record in theirs]
    found = [abs(a[2] - b[2]) / b[2] for a, b in zip(ours, theirs, strict=True)]
    first, second = adapter(out), adapter(other)
    assert first.keys() == second.keys()
    found += [float((first[name] - second[name]).abs().max() / second[name].abs().max()) for name in first]
    return max(found)


def best_is_kept(out: Path) -> None:
    held_out, best = losses(out, "eval"), read_evaluation(out / "adapter-best")
    assert best is not None and best.loss == min(held_out) == held_out[-1]  # the last one, so that the files are equal
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / "adapter-best" / name).read_bytes() == (out / "adapter" / name).read_bytes()


def same_usage(out: Path, other: Path) -> None:
    """Rounding may send a token or two to another expert."""
    ours, theirs = ([r for r in read_metrics(run / "metrics.jsonl") if "counts" in r] for run in (out, other))
    kinds = ["eval_usage", "train_usage", "eval_usage", "train_usage", "train_usage", "eval_usage"]
    assert [record["kind"] for record in ours] == kinds
    for mine, yours in zip(ours, theirs, strict=True):
        assert all(mine[key] == yours[key] for key in ("kind", "step", "tokens", "layers"))
        assert mine["entropy"] == pytest.approx(yours["entropy"], rel=1e-5)
        assert (torch.tensor(mine["counts"]) - torch.tensor(yours["counts"])).abs().max() <= 2
        assert sum(map(sum, mine["counts"])) == 2 * mine["tokens"] * len(mine["layers"])


@pytest.fixture(scope="module")
def half(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The first three steps on four processes, two of which own the experts of each copy of the model."""
    out = tmp_path_factory.mktemp("half") / "out"
    best = {"train__eval_every": 3, "train__keep_best": True, "train__patience": 5}
    changes = {**STEADY, **best, "parallel__expert": 2, "train__save_async": True}
    done = forked(settings(world, out, **changes, train__max_steps=3), 4)
    assert [process.returncode for process in done] == [0] * 4, done
    assert "processes 4 = 1 replicate × 2 expert × 2 shard" in done[0].stdout
    best_is_kept(out)
    return out, changes


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(
    world: World, alone: Path, half: tuple[Path, dict[str, Any]], tmp_path: Path, processes: int
) -> None:
    shutil.copytree(half[0], tmp_path / "out")
    best = {"train__eval_every": 3, "train__keep_best": True, "train__patience": 5}
    if processes == 1:
        assert main(settings(world, tmp_path / "out", **STEADY, **best, train__max_steps=6)) == 0
    else:
        arguments = settings(world, tmp_path / "out", **STEADY, **best, train__max_steps=3)
        done = forked([*arguments, "--extend-to", "6"], processes)
        assert [process.returncode for process in done] == [0] * processes, done
    resumed = losses(tmp_path / "out", "train")[3:]
    undisturbed = losses(alone, "train")[3:]
    assert max(abs(a - b) / b for a, b in zip(resumed, undisturbed, strict=True)) < 1e-6
    assert worst(tmp_path / "out", alone) < 1e-5
    best_is_kept(tmp_path / "out")
    same_usage(tmp_path / "out", alone)


@pytest.mark.slow
def test_8_bit_states_start_anew_on_another_number_of_processes(world: World, tmp_path: Path) -> None:
    changes = {**STEADY, "train__optimizer": "adamw_8bit", "adapter__rank": 32}
    said = {}
    for steps, processes in ((2, 2), (3, 2), (4, 1)):
        done = in_processes(settings(world, tmp_path / "out", **changes, train__max_steps=steps), processes)
        assert done.returncode == 0, done.stderr
        said[steps] = [line for line in done.stderr.splitlines() if "is reset to zero" in line]
    assert said[2] == said[3] == []
    assert len(said[4]) == 1
    assert re.fullmatch(
        r"the 8-bit optimiser state of \d+ tensors is reset to zero: here it is cut into other parts than in the "
        r"checkpoint, and blocks of 8-bit values can't be cut again",
        said[4][0],
    )


@pytest.mark.slow
def test_what_one_process_has_left_goes_on_with_two(world: World, alone: Path, tmp_path: Path) -> None:
    changes = {**STEADY, "train__eval_every": 3}
    assert main(settings(world, tmp_path / "out", **changes, train__max_steps=3)) == 0
    done = in_processes(settings(world, tmp_path / "out", **changes, train__max_steps=6), 2)
    assert done.returncode == 0, done.stderr
    assert worst(tmp_path / "out", alone) < 1e-5
    again = in_processes(settings(world, tmp_path / "out", **changes, train__max_steps=6), 2)
    assert again.returncode == 0 and "nothing left to do" in again.stdout


@pytest.mark.slow
def test_two_processes_start_anew(world: World, tmp_path: Path) -> None:
    """The folder, which the second process writes its log into meanwhile, stays; what the first run left is moved."""
    out = tmp_path / "out"
    for more in ([], ["--restart"], []):
        done = in_processes([*settings(world, out, **STEADY, train__max_steps=1), *more], 2)
        assert done.returncode == 0, done.stderr
        assert ("nothing left to do" in done.stdout) == (more == [] and (tmp_path / "out.1").exists())
    assert curve(out) == curve(tmp_path / "out.1")
    assert (out / "ranks" / "rank-1.log").is_file() and not (tmp_path / "out.2").exists()
