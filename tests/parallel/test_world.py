"""Processes that form a world, the meshes over them, and the parts of tensors that they hold."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from parallel import world as module
from parallel.mesh import MeshSizes, mesh_sizes
from parallel.parts import bounds
from parallel.world import World, launched_world
from quant.common.errors import NibbleError
from tests.processes import free_port, rank_environment, run_processes

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GROUP_WORLD_SIZE")


def test_a_world_of_one_needs_no_process_group():
    world, tensor = World(), torch.tensor([2.0])
    assert world.first
    assert world.sum(tensor) is tensor
    assert world.max(tensor) is tensor
    assert tensor.item() == 2.0
    world.wait()


def environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_the_launcher_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch):
    environment(monkeypatch)
    assert launched_world() == World(0, 1, 0)
    environment(monkeypatch, **LAUNCHED)
    assert launched_world() == World(3, 4, 1)
    environment(monkeypatch, **LAUNCHED, GROUP_WORLD_SIZE="2")
    assert launched_world() == World(3, 4, 1, machines=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_PORT": "", "RANK": ""}, ["WORLD_SIZE is set", "RANK, MASTER_PORT is not", "torchrun", "unset"]),
        ({"WORLD_SIZE": "four"}, ["must be numbers", "'four'"]),
        ({"RANK": "4"}, ["RANK is 4, WORLD_SIZE 4", "0 to WORLD_SIZE - 1"]),
    ],
)
def test_half_an_environment_is_an_error(monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], said: list[str]):
    environment(monkeypatch, **(LAUNCHED | changes))
    with pytest.raises(NibbleError) as error:
        launched_world()
    assert all(part in str(error.value) for part in said), error.value


def test_the_sizes_of_the_mesh_make_up_the_world():
    world = World(0, 8, 0)
    assert mesh_sizes(world) == MeshSizes(1, 1, 8)
    assert mesh_sizes(world, expert=2) == MeshSizes(1, 2, 4)
    assert mesh_sizes(world, expert=2).parts == 8
    assert mesh_sizes(world, expert=2, replicate=4) == MeshSizes(4, 2, 1)
    assert mesh_sizes(world, shard=2, expert=2, replicate=2) == MeshSizes(2, 2, 2)
    assert mesh_sizes(World()) == MeshSizes(1, 1, 1)


def test_sizes_that_do_not_make_up_the_world_are_errors():
    with pytest.raises(NibbleError) as error:
        mesh_sizes(World(0, 8, 0), expert=3)
    assert "expert 3 × parallel.replicate 1: 8 processes can't be divided by 3" in str(error.value)
    assert "Start a multiple of 3 processes" in str(error.value)
    with pytest.raises(NibbleError) as error:
        mesh_sizes(World(0, 8, 0), shard=2, expert=2)
    assert "parallel.shard 2 × parallel.expert 2 × parallel.replicate 1 is 4, but 8 processes were started" in str(
        error.value
    )
    assert "torchrun --nproc-per-node 4" in str(error.value)
    with pytest.raises(NibbleError, match="but 1 process was started"):
        mesh_sizes(World(), shard=2)


def test_bounds_are_those_of_chunk():
    for size in range(9):
        for parts in range(1, 6):
            chunks = [chunk.tolist() for chunk in torch.arange(size).chunk(parts)] if size else []
            chunks += [[]] * (parts - len(chunks))
            assert [list(range(*bounds(size, parts, index))) for index in range(parts)] == chunks, (size, parts)


def test_two_processes():
    first, second = run_processes(2, "tests.dist_workers.world:together")
    assert first["sum"] == second["sum"] == [2.0, -1.0]
    assert first["max"] == second["max"] == [1.0, 0.0]
    assert [first["grid"], second["grid"]] == [[0, 0, 0], [0, 1, 0]]
    assert first["shards"] == [["part"], ["shard"]]
    even, uneven, columns, grid = zip(first["parts"], second["parts"], strict=True)
    assert list(even) == [[0, 4, [4, 3], True], [4, 8, [4, 3], True]]
    assert list(uneven) == [[0, 3, [3, 2], True], [3, 5, [2, 2], True]]
    assert list(columns) == [[0, 4, [3, 4], True], [4, 7, [3, 3], True]]
    assert list(grid) == [[0, 3, [3, 2], True], [3, 6, [3, 2], True]]
    assert first["wrong"] == "a part of (2, 2) is held, not (3, 2)"


def test_four_processes():
    results = run_processes(4, "tests.dist_workers.world:together")
    assert [result["sum"] for result in results] == [[4.0, -6.0]] * 4
    # Row by row: replicate, then which part of it; experts change hands with every part when shard is 1.
    assert [result["grid"] for result in results] == [[0, 0, 0], [0, 1, 1], [1, 0, 0], [1, 1, 1]]
    assert results[0]["groups"] == [2, 2]
    assert results[0]["shards"] == [["replicate", "part"], ["replicate", "shard"]]
    assert [result["parts"][1] for result in results] == [
        [0, 2, [2, 2], True],
        [2, 4, [2, 2], True],
        [4, 5, [1, 2], True],
        [5, 5, [0, 2], True],
    ]
    assert [result["parts"][3][:2] for result in results] == [[0, 3], [3, 6], [0, 3], [3, 6]]
    assert all(part[3] for result in results for part in result["parts"])


def test_a_collective_is_limited_only_where_a_long_wait_has_no_good_reason():
    first, second = run_processes(2, "tests.dist_workers.world:waits")
    assert first == [["waiting for other processes to read the rows (0 min)"], True, 2.0]
    assert second == [[], True, 2.0]


def test_every_start_has_a_prefix_that_all_processes_know():
    """The store is that of a torchrun which has started these processes before, some of which died on the way."""
    store, size, found = dist.HashStore(), 3, []

    def start() -> list[str]:
        prefixes = [""] * size

        def one(rank: int) -> None:
            prefixes[rank] = module._common_prefix(store, World(rank, size))

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return prefixes

    store.set("nibble/request/2", "of one that has died")
    for _ in range(3):
        found += [start()]
    assert all(len(set(prefixes)) == 1 for prefixes in found), found
    assert len({prefixes[0] for prefixes in found} - {""}) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet(monkeypatch: pytest.MonkeyPatch, rank: int):
    port = free_port()
    environment(monkeypatch, **rank_environment(rank, 2, port))
    monkeypatch.setattr(module, "_START", timedelta(seconds=1))
    with pytest.raises(NibbleError) as error:
        module._store(World(rank, 2, rank))
    assert str(error.value).startswith(f"the 2 processes did not all meet at 127.0.0.1:{port} within 0:00:01: ")
    assert "Check that all of them were started" in str(error.value)


def test_a_process_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_START", timedelta(0))
    with pytest.raises(TimeoutError, match="rank 1 did not connect"):
        module._common_prefix(dist.HashStore(), World(0, 2))


def test_a_failure_in_one_process_shows_what_every_process_said():
    with pytest.raises(AssertionError) as error:
        run_processes(2, "tests.dist_workers.world:one_fails")
    assert "rank 1 ended with 1" in str(error.value)
    assert "this one was meant to fail" in str(error.value)
    assert "rank 0" in str(error.value)


def test_processes_that_do_not_end_in_time_are_stopped():
    with pytest.raises(AssertionError, match="rank 1 was stopped"):
        run_processes(2, "tests.dist_workers.world:never_ends", timeout=0.5)
