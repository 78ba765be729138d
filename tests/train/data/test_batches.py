"""Batches: shifted labels that stay inside documents, padding, order, and taking it up again exactly."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from quant.common.errors import NibbleError
from train.data.batches import IGNORED, Batch, EvalBatches, StepBatches, empty_batch, make_batch
from train.data.examples import Examples
from train.data.packing import Packing, pack

ROOM = 48


def some_examples(count: int, seed: int = 0) -> Examples:
    """Random documents; the first token of each is its own number + 1000, so that it can be found again."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, ROOM + 1, count).astype(np.int32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    tokens = random.integers(1, 1000, lengths.sum()).astype(np.int32)
    tokens[starts] = 1000 + np.arange(count)
    mask = random.random(len(tokens)) < 0.5
    mask[starts + 1] = True
    mask[starts] = False
    labelled = np.add.reduceat(mask, starts).astype(np.int32)
    return Examples(tokens, mask, starts, lengths, np.arange(count), labelled)


def numbers(batch: Batch) -> list[int]:
    return [int(token) - 1000 for token in batch.tokens if token >= 1000]


def steps(examples: Examples, **options: Any) -> StepBatches:
    packing = options.pop("packing", None) or pack(examples.lengths, ROOM, 0)
    settings = {"micro_batch_size": 2, "gradient_accumulation": 3, "seed": 5, **options}
    return StepBatches(examples, packing, **settings)


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.labels, b.labels)
        and a.documents.lengths == b.documents.lengths
        and (a.real_tokens, a.labelled) == (b.real_tokens, b.labelled)
        for a, b in zip(first, second, strict=True)
    )


def test_labels_are_the_next_token_of_the_same_document() -> None:
    examples = some_examples(30)
    batch = make_batch(examples, range(30))
    offsets = batch.documents.offsets.tolist()
    for index in range(30):
        tokens, mask = examples[index]
        labels = batch.labels[offsets[index] : offsets[index + 1]].tolist()
        assert batch.tokens[offsets[index] : offsets[index + 1]].tolist() == tokens.tolist()
        expected = [int(t) if m else IGNORED for t, m in zip(tokens[1:], mask[1:], strict=True)]
        assert labels == [*expected, IGNORED], "the last token of a document predicts nothing"
    assert batch.labelled == int((batch.labels != IGNORED).sum()) == examples.total_labelled
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


def test_one_document_alone_is_the_textbook_case() -> None:
    mask = np.array([False, False, True, True])
    one = np.ones(1, np.int64)
    examples = Examples(np.array([5, 6, 7, 8], np.int32), mask, 0 * one, 4 * one.astype(np.int32), one, one)
    batch = make_batch(examples, [0], multiple=1)
    assert batch.tokens.tolist() == [5, 6, 7, 8]
    assert batch.labels.tolist() == [IGNORED, 7, 8, IGNORED]
    assert (batch.real_tokens, batch.labelled, batch.documents.lengths) == (4, 2, (4,))


def test_padding_is_a_last_document_without_labels() -> None:
    examples = some_examples(4)
    batch = make_batch(examples, range(4))
    assert len(batch.tokens) % 64 == 0
    assert batch.real_tokens == examples.total_tokens
    assert len(batch.documents.lengths) == 5
    assert batch.documents.lengths[-1] == len(batch.tokens) - batch.real_tokens
    assert batch.tokens[batch.real_tokens :].eq(0).all()
    assert batch.labels[batch.real_tokens :].eq(IGNORED).all()
    assert batch.documents.positions[batch.real_tokens] == 0
    full = make_batch(examples, range(4), multiple=batch.real_tokens)
    assert len(full.documents.lengths) == 4, "nothing to pad, no padding document"


@pytest.mark.parametrize(("micro", "accumulation"), [(1, 1), (2, 3), (4, 1), (3, 50)])
def test_every_document_once_an_epoch_and_none_lost_in_the_last_step(micro: int, accumulation: int) -> None:
    examples = some_examples(101)
    packing = pack(examples.lengths, ROOM, 0)
    batches = steps(examples, packing=packing, micro_batch_size=micro, gradient_accumulation=accumulation)
    epochs = []
    for epoch in range(3):
        assert (batches.epoch, batches.position) == (epoch, 0)
        seen = []
        for _ in range(batches.steps_per_epoch):
            step = next(batches)
            assert 1 <= len(step) <= accumulation
            assert all(batch.real_tokens <= micro * ROOM for batch in step)
            seen += [number for batch in step for number in numbers(batch)]
        assert Counter(seen) == Counter(range(101))
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batches.steps_per_epoch == -(-len(packing) // (micro * accumulation))


def test_documents_are_not_split_over_sequences() -> None:
    examples = some_examples(50)
    for step in (next(batches) for batches in [steps(examples, micro_batch_size=1)] for _ in range(5)):
        for batch in step:
            inside = batch.documents.lengths[: len(numbers(batch))]
            assert list(inside) == [int(examples.lengths[number]) for number in numbers(batch)]


def test_order_depends_on_seed_and_epoch_only() -> None:
    examples = some_examples(60)
    first, again, other = steps(examples), steps(examples), steps(examples, seed=6)
    ours = [next(first) for _ in range(8)]
    assert all(same(step, next(again)) for step in ours)
    assert not all(same(step, next(other)) for step in ours)


def test_going_on_from_any_step_gives_the_same_batches() -> None:
    examples = some_examples(60)
    whole = steps(examples)
    count = 3 * whole.steps_per_epoch
    states, expected = [], []
    for _ in range(count):
        states.append(json.loads(json.dumps(whole.state())))
        expected.append(next(whole))
    for index in range(count):
        resumed = steps(examples)
        resumed.restore(states[index])
        assert resumed.state() == states[index]
        assert all(same(next(resumed), step) for step in expected[index : index + 12])


def test_another_batch_size_goes_on_with_the_rows_not_yet_seen() -> None:
    examples = some_examples(60)
    before = steps(examples)
    seen = [number for _ in range(2) for batch in next(before) for number in numbers(batch)]
    after = steps(examples, micro_batch_size=1, gradient_accumulation=2)
    after.restore(before.state())
    while after.epoch == 0:
        seen += [number for batch in next(after) for number in numbers(batch)]
    assert Counter(seen) == Counter(range(60))


def on_all(ranks: int, examples: Examples, **options: Any) -> list[StepBatches]:
    return [steps(examples, rank=rank, ranks=ranks, **options) for rank in range(ranks)]


def in_order(step: list[list[Batch]]) -> list[Batch]:
    """The micro-batches of a step, process by process, in the order in which they were dealt; no empty ones."""
    return [batch for turn in zip(*step, strict=True) for batch in turn if batch.real_tokens]


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("accumulation", range(1, 6))
def test_a_step_is_dealt_out_to_the_processes(ranks: int, accumulation: int) -> None:
    micro, examples = 3, some_examples(97)
    packing = pack(examples.lengths, ROOM, 0)
    options: dict[str, Any] = {"packing": packing, "micro_batch_size": micro, "gradient_accumulation": accumulation}
    alone, processes = steps(examples, **options), on_all(ranks, examples, **options)
    sizes = []
    for _ in range(2 * alone.steps_per_epoch):
        count = min(micro * accumulation, len(packing) - alone.position)
        expected, step = next(alone), [next(process) for process in processes]
        dealt = in_order(step)  # equally many on every process
        # The sequences of one process, each once and in the same order; so the rows too.
        assert [n for batch in dealt for n in numbers(batch)] == [n for batch in expected for n in numbers(batch)]
        assert all(process.state() == alone.state() for process in processes)
        size = min(micro, -(-count // ranks))
        assert len(dealt) == -(-count // size)
        assert len(step[0]) == -(-len(dealt) // ranks)
        assert all(process.steps_per_epoch == alone.steps_per_epoch for process in processes)
        if size == micro:
            assert same(dealt, expected)
        empty = [batch for batches in step for batch in batches if not batch.real_tokens]
        assert all(same([batch], [empty_batch()]) for batch in empty)
        sizes.append(count)
    assert sizes[0] == micro * accumulation
    assert (min(sizes) < sizes[0]) == (len(packing) % (micro * accumulation) > 0)
    if accumulation % ranks == 0:
        assert all(min(micro, -(-count // ranks)) == micro for count in sizes if count >= micro * ranks)


def test_fewer_sequences_than_processes() -> None:
    examples = some_examples(3)
    packing = pack(examples.lengths, ROOM, enabled=False)
    step = [next(process) for process in on_all(8, examples, packing=packing)]
    assert [len(batches) for batches in step] == [1] * 8
    assert sorted(numbers(batches[0]) for batches in step) == [[]] * 5 + [[0], [1], [2]]
    assert [batches[0].real_tokens > 0 for batches in step] == [True] * 3 + [False] * 5


def test_an_empty_batch_is_padding_without_labels() -> None:
    batch = empty_batch()
    assert (batch.real_tokens, batch.labelled) == (0, 0)
    assert batch.tokens.tolist() == [0] * 64
    assert batch.labels.tolist() == [IGNORED] * 64
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert (batch.documents.lengths, batch.documents.padding, batch.documents.real_tokens) == ((64,), 64, 0)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_another_number_of_processes_goes_on_with_the_next_step(ranks: int) -> None:
    examples = some_examples(60)
    alone, before = steps(examples), on_all(4, examples)
    for _ in range(alone.steps_per_epoch - 1):
        next(alone)
        assert all(next(process) for process in before)
    state = json.loads(json.dumps(before[3].state()))
    assert state["position"] > 0
    after = on_all(ranks, examples)
    for process in after:
        process.restore(state)
    for _ in range(2 * alone.steps_per_epoch):
        expected = [number for batch in next(alone) for number in numbers(batch)]
        assert [n for batch in in_order([next(process) for process in after]) for n in numbers(batch)] == expected


def test_other_data_or_seed_are_refused() -> None:
    examples = some_examples(60)
    state = steps(examples).state()
    with pytest.raises(
        NibbleError, match=r"^train.seed is 6, but the checkpoint was written with 5.\nUse the same seed"
    ):
        steps(examples, seed=6).restore(state)
    other = some_examples(60)
    other.tokens[3] += 1
    repacked: Packing = pack(examples.lengths, ROOM, 1)
    for changed in (
        steps(other),
        steps(examples.subset(np.arange(1, 60))),
        steps(examples, packing=repacked),
        steps(examples, packing=pack(examples.lengths, ROOM, enabled=False)),
    ):
        with pytest.raises(
            NibbleError, match=r"^the training rows are not those that the run began with \(\d+ packed"
        ) as caught:
            changed.restore(state)
        assert str(caught.value).count("\n") <= 2
        assert str(caught.value).endswith("Restore them, or start a new run in another output.dir, or with --restart.")


def test_no_sequences() -> None:
    with pytest.raises(ValueError, match="no sequences"):
        StepBatches(some_examples(3), pack(np.zeros(0, np.int32), 8), micro_batch_size=1)


def test_evaluation_has_everything_once_in_the_same_order() -> None:
    examples = some_examples(41)
    packing = pack(examples.lengths, ROOM, 0)
    batches = EvalBatches(examples, packing, micro_batch_size=4)
    first, second = list(batches), list(batches)
    assert same(first, second)
    assert len(first) == len(batches) == -(-len(packing) // 4)
    assert Counter(number for batch in first for number in numbers(batch)) == Counter(range(41))
    assert sum(batch.labelled for batch in first) == examples.total_labelled


@pytest.mark.parametrize("ranks", [2, 3, 8, 50])
def test_evaluation_is_dealt_out_likewise(ranks: int) -> None:
    examples = some_examples(41)
    packing = pack(examples.lengths, ROOM, 0)
    alone = EvalBatches(examples, packing, micro_batch_size=2)
    processes = [EvalBatches(examples, packing, micro_batch_size=2, rank=r, ranks=ranks) for r in range(ranks)]
    assert {process.fingerprint() for process in processes} == {alone.fingerprint()}
    dealt = in_order([list(process) for process in processes])
    assert same(dealt, in_order([list(process) for process in processes]))
    assert [n for batch in dealt for n in numbers(batch)] == [n for batch in alone for n in numbers(batch)]
    assert same(dealt, list(alone)) == (len(packing) > ranks)
    assert {len(process) for process in processes} == {len(list(processes[0]))} == {-(-len(dealt) // ranks)}


def test_the_fingerprint_of_held_out_rows_follows_their_content() -> None:
    def fingerprint(examples: Examples, size: int = 4) -> str:
        return EvalBatches(examples, pack(examples.lengths, ROOM, 0), micro_batch_size=size).fingerprint()

    same, other = fingerprint(some_examples(41)), some_examples(41)
    assert fingerprint(other, size=2) == same
    other.tokens[3] += 1
    assert fingerprint(other) != same


def test_a_batch_moves_as_a_whole() -> None:
    batch = make_batch(some_examples(3), range(3))
    moved = batch.to("meta")
    assert {moved.tokens.device.type, moved.labels.device.type, moved.documents.offsets.device.type} == {"meta"}
    assert (moved.real_tokens, moved.labelled, moved.documents.lengths) == (
        batch.real_tokens,
        batch.labelled,
        batch.documents.lengths,
    )
