"""Checkpoints of several processes: read by any number of them, exact, atomic, without a pickle.

Four processes save and read what one saved; one, two and three read what the four saved. The oracle is a run of one
process with the same gradients, which every process computes beside its own (tests/dist_workers/checkpoint.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

from models.checkpoint.tensorfile import read_header
from parallel.checkpoint import load_parts, save_parts, saved_tensors
from parallel.parts import Part, bounds
from parallel.texts import gather_texts
from quant.common.errors import NibbleError
from tests.dist_workers.checkpoint import ALIGNED, LATER, TENSORS, whole_run, wipe
from tests.processes import run_commands
from train.state.checkpoint import read_checkpoint
from train.state.optimizer_state import _scales_cut
from train.state.saver import CheckpointSaver

EXACT = dict.fromkeys(TENSORS, 0.0)
# Other blocks change 8-bit moments by up to 1 % of their block's largest, updates (0.01 each, to weights of up to 4)
# accordingly.
OTHER_BLOCKS = 2e-3
CUT_8BIT = ["columns.A", "odd.A", "stack.A"]  # 8-bit states in parts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, Any]:
    (done,) = run_commands(1, "tests.dist_workers.checkpoint_worlds:main", str(root))
    assert done.returncode == 0, done.stderr[-5000:]
    read: dict[str, Any] = json.loads((root / "results.json").read_text())
    return read


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    """Where the worlds saved."""
    return root / "worlds"


@pytest.fixture(scope="module")
def four(results: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = results["four"]
    return found


def worst(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(result[name] for result in results) for name in results[0]}


def is_exact(differences: dict[str, float], aligned: tuple[str, ...] = ALIGNED) -> bool:
    """Bit for bit where blocks are the same, and within what quantising changes elsewhere."""
    return all(value == 0 if name in aligned else value < OTHER_BLOCKS for name, value in differences.items())


def check_cut_otherwise(results: list[dict[str, Any]]) -> None:
    """What is cut into another number of parts and has 8-bit states is reset; all else goes on bit for bit."""
    for result in results:
        assert result["reset"] == CUT_8BIT
        assert set(result["as_fresh"]) <= set(CUT_8BIT)
        assert {name for name, value in result["later"].items() if value == 0} >= set(TENSORS) - set(CUT_8BIT)
    assert set(results[0]["as_fresh"]) == set(CUT_8BIT)  # the first process has a part of each


# ---------------------------------------------------------------------------------------------------- the same numbers


def test_adamw_on_four_is_adamw_on_one(four: list[dict[str, Any]]) -> None:
    assert worst([result["adamw"]["saved"] for result in four]) == pytest.approx(EXACT, abs=1e-6)
    assert worst([result["adamw"]["later"] for result in four]) == pytest.approx(EXACT, abs=1e-6)


def test_8_bits_on_four_are_8_bits_on_one_where_parts_begin_with_a_block(four: list[dict[str, Any]]) -> None:
    later = worst([result["adamw_8bit"]["later"] for result in four])
    assert is_exact(later), later
    assert later["odd.A"] > 0  # else there was nothing to see
    assert later["columns.A"] > 0


def test_the_whole_tensors_size_decides_for_8_bits(four: list[dict[str, Any]]) -> None:
    for result in four[:3]:
        dtypes = result["adamw_8bit"]["dtypes"]
        assert {name: dtypes[f"state1.{name}"] for name in TENSORS} == {
            name: "torch.float32" if name in ("small.A", "norm.weight") else "torch.uint8" for name in TENSORS
        }
    # The fourth process holds nothing of two of them.
    held = {name.split(".", 1)[1] for name in four[3]["adamw_8bit"]["dtypes"]}
    assert held == set(TENSORS) - {"odd.A", "small.A"}


# ------------------------------------------------------------------------------------------------ reading what is saved


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_resumed_on_as_many_it_goes_on_bit_for_bit(four: list[dict[str, Any]], name: str) -> None:
    assert [result[name]["resumed_is_the_same"] for result in four] == [True] * 4


def test_four_go_on_from_what_one_saved(four: list[dict[str, Any]]) -> None:
    found = [result["resumed"]["alone_adamw"] for result in four]
    assert [result["reset"] for result in found] == [[]] * 4
    assert worst([result["later"] for result in found]) == pytest.approx(EXACT, abs=1e-6)
    check_cut_otherwise([result["resumed"]["alone_adamw_8bit"] for result in four])


@pytest.mark.parametrize("size", ["two", "three"])
def test_fewer_go_on_from_what_four_saved(results: dict[str, Any], size: str) -> None:
    assert worst([result["adamw"]["later"] for result in results[size]]) == pytest.approx(EXACT, abs=1e-6)
    check_cut_otherwise([result["adamw_8bit"] for result in results[size]])


def test_one_goes_on_from_what_four_saved(four: list[dict[str, Any]], folder: Path) -> None:
    for name in ("adamw", "adamw_8bit"):
        checkpoint = read_checkpoint(folder / name / "step-000003")
        assert checkpoint.state["from"] == 0
        fresh, run = wipe(whole_run(name)), wipe(whole_run(name))
        for each in (fresh, run):
            checkpoint.load_tensors(each.parameters.items())
        reset = checkpoint.load_optimizer(run.optimizer)
        saved = run.differences(whole_run(name).steps(range(3)))
        assert is_exact(saved), saved
        later = run.steps(range(3, 3 + LATER)).differences(whole_run(name).steps(range(3 + LATER)))
        if name == "adamw":
            assert reset == ()
            assert later == pytest.approx(EXACT, abs=1e-6)
        else:
            as_fresh = [key for key, value in run.differences(fresh.steps(range(3, 3 + LATER))).items() if value == 0]
            check_cut_otherwise([{"reset": list(reset), "as_fresh": as_fresh, "later": later}])


def test_two_copies_of_the_model_are_saved_once(four: list[dict[str, Any]], folder: Path) -> None:
    assert is_exact(worst([result["replicas"] for result in four]))
    size = sum(file.stat().st_size for file in (folder / "replicas" / "step-000003" / "weights").iterdir())
    values = 4 * sum(torch.Size(shape).numel() for shape, _ in TENSORS.values())
    assert values < size < values + 4 * 2000  # headers of four files


def test_what_is_saved_in_the_background_is_the_state_of_that_moment(four: list[dict[str, Any]], folder: Path) -> None:
    differences = worst([result["async"] for result in four])
    assert is_exact(differences), differences
    assert [path.name for path in (folder / "async").iterdir()] == ["step-000003"]


def test_one_process_saves_in_the_background(tmp_path: Path) -> None:
    run = whole_run("adamw").steps(range(2))
    with CheckpointSaver(tmp_path, 1, asynchronous=True) as saver:
        saver.save(2, run.parameters, run.state(), {})
        run.steps(range(2, 4))
    loaded = wipe(whole_run("adamw")).load(read_checkpoint(tmp_path / "step-000002"))
    assert loaded.differences(whole_run("adamw").steps(range(2))) == EXACT


def test_an_error_in_the_background_shows_at_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = whole_run("adamw").steps(range(1))
    with CheckpointSaver(tmp_path / "file" / "checkpoints", 1, asynchronous=True) as saver:
        saver.save(1, run.parameters, run.state(), {})
        with pytest.raises(NibbleError) as caught:
            saver.save(2, run.parameters, run.state(), {})
    assert str(caught.value) == (
        f"{tmp_path}/file/checkpoints can't be written: Not a directory.\n"
        "The checkpoint of step 1 was not written; there is no earlier one."
    )


# ------------------------------------------------------------------------------------------------------------ the files


def test_files_and_no_pickle(four: list[dict[str, Any]], folder: Path) -> None:
    path = folder / "adamw_8bit" / "step-000003"
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    shards = [f"shard-{rank:05d}-model-00001-of-00001.safetensors" for rank in (1, 2, 3, 4)]
    expected = [f"{name}/{shard}" for name in ("optimizer", "weights") for shard in shards]
    assert files == sorted([*expected, "manifest.json", "state.json"])
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 3
    assert manifest["files"] == {
        name: {"size": (path / name).stat().st_size, "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name in [*expected, "state.json"]
    }
    for file in folder.rglob("*"):
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.is_file():
            read_header(file)  # which sees that it is JSON, with the tensors behind it and nothing else


def test_shapes_are_those_of_whole_tensors(four: list[dict[str, Any]], folder: Path) -> None:
    path = folder / "adamw_8bit" / "step-000003"
    assert saved_tensors(path / "weights") == {name: (shape, torch.float32) for name, (shape, _) in TENSORS.items()}
    optimizer = saved_tensors(path / "optimizer")
    assert optimizer["state1.stack.A"] == ((8, 16, 64), torch.uint8)
    assert optimizer["absmax1.stack.A"] == ((32,), torch.float32)  # one per 256 values
    assert optimizer["absmax2.odd.A"] == ((3 * 6,), torch.float32)  # three parts of 1510 values


def test_a_file_holds_some_of_the_tensors(tmp_path: Path) -> None:
    """It is put together in memory, so it must not hold them all."""
    tensors = {name: torch.full((6 * 2**20,), float(i)) for i, name in enumerate("abcde")}  # 24 MiB each
    tensors["view"] = torch.arange(12.0).view(3, 4).T
    written = save_parts(tmp_path, tensors, {})
    assert sorted(written) == sorted(file.name for file in tmp_path.iterdir())
    assert len(written) == 3
    assert all((tmp_path / name).stat().st_size < 49 * 2**20 for name in written)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_parts(tmp_path, loaded, {})
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_killed_at_any_point_of_a_save(results: dict[str, Any]) -> None:
    """What was found then is looked at where it is done."""
    first, second = results["kills"]
    assert first["previous"] > 10  # while it writes
    assert first["new"] > 5  # while it deletes the previous one
    assert second["previous"] > 5


# --------------------------------------------------------------------------------------------------------------- errors


def test_errors_are_the_same_on_all(four: list[dict[str, Any]], folder: Path) -> None:
    path = folder / "errors" / "step-000001"
    new_run = "start a new run in another output.dir, or with --restart, which moves this one aside"
    as_they_were = f"Set adapter and model as they were, or {new_run}."
    damaged = "weights/shard-00003-model-00001-of-00001.safetensors is not what was written (its SHA-256 differs)"
    full_disk = (
        f"Process 1 of 4: the disk is full: {folder}/errors/.partial-step-000002/weights can't be written"
        " (File too large).\nMake room and run again.\n"
        f"The checkpoint of step 2 was not written; {path} is as it was."
    )
    expected = {
        "full disk": full_disk,
        "full disk in the background": full_disk,
        "names": f"{path} belongs to another set of trained tensors: it has, and this run doesn't train, small.A.\n"
        + as_they_were,
        "dtype": f"{path}: stack.A is [8, 16, 64] F32, this run's is [8, 16, 64] F16.\n{as_they_were}",
        "shape": f"{path}: stack.A is [8, 16, 64] F32, this run's is [8, 8, 64] F32.\n{as_they_were}",
        "state shape": "the checkpoint's optimiser state of stack.A doesn't fit: exp_avg is [8, 16, 64] float32,"
        f" here [8, 8, 64] float32.\nTrain the same parameters in the same dtype, or {new_run}.",
        "damaged": f"{path} can't be used: {damaged}.\nContinue from another one, or {new_run}.",
        "none usable": f"{path} can't be used: {damaged}.\nNo checkpoint there can be continued; {new_run}.",
        "not there": f"{folder}/errors/step-000009 is not there. Checkpoints are the step-… folders of a run.",
    }
    for result in four:
        assert result["errors"] == expected
    assert [file.name for file in (folder / "errors").iterdir()] == ["step-000001"]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    save_parts(tmp_path, {"a": torch.zeros(1000)}, {})
    file = next(tmp_path.iterdir())
    os.truncate(file, 200)
    with pytest.raises(NibbleError, match=f"{tmp_path} can't be read: "):
        load_parts(tmp_path, {"a": torch.zeros(1000)}, {})


def test_an_interrupt_while_writing_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: object, mode: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("parallel.checkpoint._HashedFile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_parts(tmp_path, {"a": torch.zeros(1000)}, {})


def test_clipping(four: list[dict[str, Any]]) -> None:
    for result in four:
        clip = result["clip"]
        assert clip["norm"] == four[0]["clip"]["norm"] == pytest.approx(clip["expected"], rel=1e-6)
        assert clip["clipped"]
        assert clip["message"] == (
            "step 7: the gradient of columns.A is not finite (nan). No weight was changed in this step."
        )


# --------------------------------------------------------------------------------------------------------------- pieces


def test_texts_without_other_processes() -> None:
    assert gather_texts("ü") == ["ü"]


def test_what_is_said_of_the_files_is_what_lies_there(tmp_path: Path) -> None:
    """Torch's writer takes its files from its attribute `fs`, and writes each from beginning to end."""
    tensors = {"a": torch.arange(100_000.0), "b": torch.zeros(0), "c": torch.ones(3, dtype=torch.uint8)}
    written = save_parts(tmp_path, tensors, {})
    there = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in tmp_path.iterdir()
    }
    assert written == there, "this version of torch writes files in another way: see _HashingFileSystem"
    assert all(name.endswith(".safetensors") for name in written), "this version of torch writes other files as well"


@pytest.mark.parametrize(
    ("shape", "dim", "count", "begins"),  # of the scales of each part, and their number
    [
        ((8, 512), 0, 4, [0, 4, 8, 12, 16]),
        ((5, 512), 0, 4, [0, 4, 8, 10, 10]),
        ((6, 100), 0, 3, [0, 1, 2, 3]),
        ((2, 512), 1, 2, [0, 2, 4]),
        ((7, 300), 0, 2, [0, 5, 9]),
        ((7, 300), 0, 1, [0, 9]),
    ],
)
def test_scales_of_parts_lie_in_a_row(shape: tuple[int, ...], dim: int, count: int, begins: list[int]) -> None:
    for index in range(count):
        start, stop = bounds(shape[dim], count, index)
        cut = _scales_cut(Part(shape, dim, start, stop, OneDimension(count), (Shard(dim),)))  # type: ignore[arg-type]
        assert (cut.shape, cut.dim) == ((begins[-1],), 0)
        assert cut.stop - cut.start == begins[index + 1] - begins[index]
        assert cut.start == begins[index] or start == stop


@dataclass(frozen=True)
class OneDimension:
    """As much of a DeviceMesh as a Part needs."""

    count: int

    def size(self, dim: int) -> int:
        return self.count
