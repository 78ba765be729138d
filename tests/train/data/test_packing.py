"""Packing: every document once, none split, sequences well filled, the same for the same seed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from train.data.packing import pack, shuffled


def lengths_of(kind: str, count: int, room: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    if kind == "uniform":
        lengths = random.integers(1, room + 1, count)
    elif kind == "short":
        lengths = random.integers(1, max(room // 8, 2), count)
    elif kind == "chat":
        lengths = np.clip(random.lognormal(np.log(room / 6), 0.8, count), 1, room)
    elif kind == "halves":
        lengths = random.integers(room // 2 + 1, room + 1, count)
    else:
        lengths = np.full(count, room)
    return lengths.astype(np.int32)


@pytest.mark.parametrize("kind", ["uniform", "short", "chat", "halves", "full"])
def test_every_document_once_and_none_split(kind: str) -> None:
    for seed in range(20):
        room = int(np.random.default_rng(seed).integers(2, 3000))
        lengths = lengths_of(kind, 1 + 37 * seed, room, seed)
        packing = pack(lengths, room, seed)
        assert sorted(packing.order) == list(range(len(lengths)))
        sizes = np.array([lengths[packing[s]].sum() for s in range(len(packing))])
        assert sizes.min() > 0
        assert sizes.max() <= room
        assert packing.fill == pytest.approx(lengths.sum() / (len(packing) * room))
        # Best fit never opens a sequence for a document that an open one has room for.
        assert len(sizes) < 2 or np.sort(sizes)[:2].sum() > room
        fewest = max(-(-int(lengths.sum()) // room), int((lengths > room / 2).sum()))
        assert len(packing) <= 11 / 9 * fewest + 4


def test_sequences_are_well_filled() -> None:
    for kind, least in (("chat", 0.99), ("short", 0.99), ("uniform", 0.97), ("full", 1.0)):
        packing = pack(lengths_of(kind, 20_000, 2048, 0), 2048)
        assert packing.fill >= least, kind


def test_known_packings() -> None:
    # 4 + 6, 5 + 5, 10, 3 + 7: first fit in this order would need five sequences.
    packing = pack(np.array([4, 5, 10, 3, 6, 5, 7], np.int32), 10)
    assert len(packing) == 4
    assert packing.fill == 1.0
    together = {frozenset(packing[s].tolist()) for s in range(4)}
    assert together == {frozenset({0, 4}), frozenset({1, 5}), frozenset({2}), frozenset({3, 6})}


def test_the_seed_decides_and_nothing_else() -> None:
    lengths = lengths_of("chat", 3000, 512, 0)
    first, again, other = pack(lengths, 512, 7), pack(lengths, 512, 7), pack(lengths, 512, 8)
    assert np.array_equal(first.order, again.order)
    assert np.array_equal(first.offsets, again.offsets)
    assert not np.array_equal(first.order, other.order)
    assert len(first) == len(other), "only documents of equal length change places"


def test_without_packing_every_document_is_alone() -> None:
    packing = pack(np.array([3, 1, 8], np.int32), 8, enabled=False)
    assert [packing[s].tolist() for s in range(len(packing))] == [[0], [1], [2]]
    assert packing.fill == 0.5


def test_nothing_to_pack_and_impossible_lengths() -> None:
    assert len(pack(np.zeros(0, np.int32), 8)) == 0
    for lengths in ([0, 3], [3, 9]):
        with pytest.raises(ValueError, match="lengths must be 1 to 8"):
            pack(np.array(lengths, np.int32), 8)
    with pytest.raises(IndexError, match="sequence 1 of 1"):
        pack(np.array([3], np.int32), 8)[1]


def test_time_grows_with_the_number_of_documents_only() -> None:
    lengths = lengths_of("chat", 100_000, 32_768, 0)
    start = time.process_time()  # this process's own, whatever else has the cores
    pack(lengths, 32_768)
    assert time.process_time() - start < 5  # under half a second is what it takes


def test_shuffles_do_not_depend_on_the_library_version() -> None:
    assert shuffled(10, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert sorted(shuffled(1000, 5, 2)) == list(range(1000))
    assert shuffled(1000, 5, 2).tolist() != shuffled(1000, 5, 3).tolist()
