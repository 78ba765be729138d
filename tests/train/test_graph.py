"""Passes that are recorded and replayed: what a graph computes, and that nothing depends on one that fails.

There is no CUDA here. A recorder of these tests keeps the work and does it again, which shows that everything that a
pass reads lies in tensors that are filled anew; and full-size layers on meta tensors show that nothing else is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.launches_cases import LaunchCase, full_config, targets_of
from benchmarks.launches_step import META, build
from models.blocks.documents import Documents, UnknownDocuments
from parallel.shards import Shards
from quant.kernels.choice import KERNELS, using
from tests.benchmarks.test_launches import FEW_LAYERS
from tests.helpers import assert_close
from train import graph as graph_module
from train.data.batches import IGNORED, Batch, filled, make_batch
from train.graph import PassGraph, Replay
from train.held_out import batch_loss
from train.loop import training_step
from train.optim import build_optimizer

CPU = torch.device("cpu")


class Again:
    """A recorder that does the recorded work again."""

    def __init__(self, room: bool = True) -> None:
        self.room, self.recorded, self.released = room, 0, 0

    def record(self, work: Callable[[], None]) -> Replay:
        work()
        self.recorded += 1
        return work

    def has_room(self) -> bool:
        return self.room

    def release(self) -> None:
        self.released += 1


class Toy(nn.Module):
    """A model that sees its documents by offsets and positions alone, as models do on CUDA."""

    balance = usage = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.at = nn.Embedding(64, 8)
        self.mix = nn.Linear(8, 8)
        self.out = nn.Parameter(torch.randn(50, 8))

    @property
    def head(self) -> Toy:
        return self

    def reduce(self, hidden: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return function(hidden, self.out)

    def hidden(self, tokens: Tensor, documents: Documents) -> Tensor:
        x = self.mix(self.embed(tokens) + self.at(documents.positions))
        which = torch.bucketize(torch.arange(len(tokens)), documents.offsets[1:].long(), right=True)
        first = documents.offsets[:-1].long()[which]
        return torch.tanh(x + x[first])  # each token and the first one of its document


def batches(count: int, lengths: Sequence[Sequence[int]]) -> list[Batch]:
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        rows = []
        for length in lengths[number % len(lengths)]:
            tokens = torch.randint(1, 50, (length,), generator=generator).tolist()
            learnt = (torch.rand(length, generator=generator) < 0.5).tolist()
            rows.append((tokens, [False, *learnt[1:]]))
        made.append(make_batch(rows, range(len(rows))))
    return made


# Of 128 tokens: two that fill them, one that is filled up, and one that is too short for that.
LENGTHS = ((30, 32, 31, 32), (32, 32, 32, 32), (20, 30, 29, 31), (9, 12))


def gradients_after(model: Toy, steps: Sequence[Sequence[Batch]], graph: PassGraph | None) -> list[tuple[Any, ...]]:
    """Loss, norm and the parameters after each step of plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shards: Any = Shards(model)  # type: ignore[arg-type]
    found = []
    for number, step in enumerate(steps):
        result = training_step(shards, optimizer, step, step=number, max_grad_norm=1.0, device=CPU, graph=graph)
        found.append((result.loss, result.grad_norm, torch.cat([p.detach().flatten() for p in model.parameters()])))
    return found


def graph_of(model: Toy, recorder: Any, notes: list[str]) -> PassGraph:
    shards: Any = Shards(model)  # type: ignore[arg-type]
    return PassGraph(shards, CPU, tokens=128, longest=32, note=notes.append, recorder=recorder)


def same(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    for one, other in zip(found, expected, strict=True):
        for value, wanted in zip(one, other, strict=True):
            assert_close(torch.as_tensor(value), torch.as_tensor(wanted))


def test_replayed_steps_are_the_usual_steps() -> None:
    """Micro-batches of several documents and numbers of labels, some of them too small to be replayed."""
    made = batches(24, LENGTHS)
    steps = [made[start : start + 3] for start in range(0, 24, 3)]
    recorder, notes = Again(), list[str]()
    model = Toy()
    found = gradients_after(model, steps, graph_of(model, recorder, notes))
    same(found, gradients_after(Toy(), steps, None))
    assert notes == ["passes are replayed as a CUDA graph from here on (train.cuda_graph)"]
    assert 1 <= recorder.recorded <= 4 and recorder.released == 0
    assert all(parameter.grad is not None for parameter in model.parameters())  # they stay where they are


@pytest.mark.parametrize("fault", ["recording", "nothing replayed", "another gradient"])
def test_a_graph_that_fails_or_differs_is_not_used_and_the_run_goes_on(fault: str) -> None:
    model = Toy()

    class Faulty(Again):
        def record(self, work: Callable[[], None]) -> Replay:
            if fault == "recording":
                work()
                raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
            super().record(work)
            if fault == "nothing replayed":
                return lambda: None

            def spoilt() -> None:
                work()
                assert model.mix.bias.grad is not None
                model.mix.bias.grad += 1.0

            return spoilt

    steps = [[one] for one in batches(8, LENGTHS[:2])]
    recorder, notes = Faulty(), list[str]()
    graph = graph_of(model, recorder, notes)
    found = gradients_after(model, steps, graph)
    same(found, gradients_after(Toy(), steps, None))
    (note,) = notes
    expected = {
        "recording": "RuntimeError: operation not permitted when stream is capturing.",
        "nothing replayed": "its first replay has a loss of 0 where",
        "another gradient": "its first replay has a gradient norm of",
    }
    assert note.startswith(f"no CUDA graph, passes are computed as usual: {expected[fault]}")
    assert not graph.active and not graph.keeps_gradients and recorder.released == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_later_graph_that_fails_leaves_those_that_are_proven() -> None:
    class Second(Again):
        def record(self, work: Callable[[], None]) -> Replay:
            if self.recorded:
                raise RuntimeError("out of memory")
            return super().record(work)

    batch = batches(5, LENGTHS[:1])
    more = [make_batch([([1, 2, 3, 4], [False] + [True] * 3)] * 32, range(32))]  # other numbers of labels
    model, notes, recorder = Toy(), list[str](), Second()
    graph = graph_of(model, recorder, notes)
    steps = [[one] for one in (*batch, *more, *batch, *more)]
    same(gradients_after(model, steps, graph), gradients_after(Toy(), steps, None))
    assert notes[1:] == ["no further CUDA graph, for batches of other sizes: RuntimeError: out of memory"]
    assert graph.active and graph.keeps_gradients and recorder.released == 0


def test_steps_that_count_usage_are_usual_ones_and_have_room() -> None:
    recorder, model = Again(), Toy()
    graph = graph_of(model, recorder, [])
    steps = [[one] for one in batches(6, LENGTHS[:1])]
    gradients_after(model, steps[:4], graph)
    assert graph.keeps_gradients
    recorder.room = False
    model.usage = SimpleNamespace(counting=True)  # type: ignore[assignment]
    gradients_after(model, steps[4:], graph)
    assert recorder.released == 1 and not graph.keeps_gradients


def test_graphs_make_room_for_what_is_computed_as_usual() -> None:
    made = batches(12, (*LENGTHS[:2], LENGTHS[3]))
    recorder, notes = Again(room=False), list[str]()
    model = Toy()
    graph = graph_of(model, recorder, notes)
    steps = [[one] for one in made]
    same(gradients_after(model, steps, graph), gradients_after(Toy(), steps, None))
    assert recorder.released == recorder.recorded - int(graph.keeps_gradients) >= 2
    recorder.room = True
    before = recorder.released
    graph.make_room()
    assert recorder.released == before


def test_a_loss_that_is_not_finite_is_the_runs_own_error() -> None:
    from train.optim import NonFiniteError

    model = Toy()
    recorder = Again()
    graph = graph_of(model, recorder, [])
    steps = [[one] for one in batches(3, LENGTHS[:1])]
    gradients_after(model, steps[:2], graph)
    with torch.no_grad():
        model.out.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the loss is not finite"):
        gradients_after(model, steps[2:], graph)
    assert recorder.recorded == 0 and graph.active


def test_more_padding_changes_nothing() -> None:
    (batch,) = batches(1, LENGTHS[2:3])
    full = filled(batch, 192, 32)
    assert full.documents.lengths == (20, 30, 29, 31, 32, 32, 18)
    assert (full.real_tokens, full.labelled) == (110, batch.labelled)
    assert full.documents.padding == 192 - 110 == full.documents.offsets[-1] - 110
    assert torch.equal(full.labels[128:], torch.full((64,), IGNORED))
    assert filled(batch, 128, 32).documents.lengths == batch.documents.lengths
    assert max(filled(batch, 128, 8).documents.lengths[4:]) == 8  # no padding is longer than documents may be


class NothingFromTheHost(TorchDispatchMode):
    """Collects operations that read a tensor of the host, which a recorded pass would not read again."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = torch.utils._pytree.tree_leaves((args, kwargs))
        if any(isinstance(value, Tensor) and value.device.type == "cpu" for value in values):
            self.found.append(str(func))
        return func(*args, **kwargs)


@pytest.mark.parametrize("arch", FEW_LAYERS)
def test_a_pass_reads_only_its_inputs_on_the_device(arch: str) -> None:
    """Neither the lengths of documents nor a tensor of the host: with our own kernels, at full width."""
    model = build(LaunchCase(full_config(arch) | FEW_LAYERS[arch][0], targets=targets_of(arch)))
    tokens = torch.empty(2048, dtype=torch.int64, device=META)
    documents = UnknownDocuments((), torch.empty(65, dtype=torch.int32, device=META), tokens, limit=1024)
    batch = Batch(tokens, tokens, documents, 2048, 1024)
    denominator = torch.empty((), device=META)
    with using(KERNELS):
        with torch.no_grad():
            batch_loss(model, batch, denominator, rows=1024)  # what is made once, such as the rotary frequencies
        with NothingFromTheHost() as host:
            batch_loss(model, batch, denominator, rows=1024).backward()
    assert host.found == []


def test_the_check_of_the_host_can_fail() -> None:
    with NothingFromTheHost() as host:
        torch.tensor([1.0, 2.0]).to(META)
    assert host.found


def test_a_recording_that_cuda_ends_leaves_the_stream_and_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11 does it: where the end of a recording raises, nothing else is undone. `python -m benchmarks.gpu`
    ends one in CUDA.
    """
    streams, ended = ["usual"], list[Any]()

    class Recording:
        def __init__(self, graph: object, pool: object) -> None: ...

        def __enter__(self) -> None:
            streams.append("recording")

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    class Restoring:
        def __init__(self, stream: str) -> None:
            self.before = stream

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            streams.append(self.before)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "stream", Restoring)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: ended.append(given), raising=False)
    recorder = object.__new__(graph_module.CudaRecorder)
    recorder._pool = (0, 7)
    with pytest.raises(RuntimeError, match="CUDA error"):
        recorder._capture(lambda: None)
    assert streams == ["usual", "recording", "usual"] and ended == [(0, (0, 7))]


def test_after_as_many_graphs_as_there_may_be_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "MOST_GRAPHS", 1)
    steps = [[one] for one in batches(12, [[5] * 25, [30, 32, 31, 32]])]
    model, notes, recorder = Toy(), list[str](), Again()
    same(gradients_after(model, steps, graph_of(model, recorder, notes)), gradients_after(Toy(), steps, None))
    assert recorder.recorded == 1
    assert notes[1:] == ["no further CUDA graph after 1: batches of other sizes are computed as usual"]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({}, None),
        ({"cuda_graph": "off"}, ""),
        ({"packing": False}, "data.packing: false makes batches of different sizes"),
        ({"kernels": "torch"}, "train.kernels: torch waits for the device in every layer"),
        ({"balance": "bias"}, "train.balance: bias counts on the host"),
        ({"meshes": "two"}, "the model is cut over processes or kept in host memory"),
        ({"fla": True}, "flash-linear-attention waits for the device in every layer"),
    ],
    ids=str,
)
def test_where_nothing_can_be_replayed_a_line_says_why(
    setting: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"cuda_graph": "auto", "packing": True, "kernels": "auto", "balance": "none", "meshes": None} | setting
    monkeypatch.setattr(graph_module, "CudaRecorder", lambda device: Again())
    monkeypatch.setattr(graph_module, "uses_fla", lambda device, dtype: True)
    model, notes = Toy(), list[str]()
    model.dtype = torch.bfloat16  # type: ignore[assignment]
    if "fla" in setting:
        model.mix.group = "linear_attention"  # type: ignore[assignment]
    parts = {key: given[key] for key in ("cuda_graph", "kernels", "balance")}
    config: Any = SimpleNamespace(
        train=SimpleNamespace(**parts, micro_batch_size=2),
        data=SimpleNamespace(packing=given["packing"], sequence_length=64),
    )
    shards: Any = SimpleNamespace(model=model, meshes=given["meshes"], parameters=[])
    made = graph_module.graph_for(config, shards, torch.device("cuda"), notes.append)
    assert (made is not None) == (reason is None)
    assert notes == ([f"no CUDA graph: {reason}"] if reason else [])
    assert graph_module.graph_for(config, shards, CPU, notes.append) is None


def test_sizes_are_few_and_padding_keeps_to_them() -> None:
    """Of 128 tokens in documents of at most 32: flash attention starts as many blocks as the size says."""
    sizes: list[tuple[int, int]] = []

    class Looking(Toy):
        def hidden(self, tokens: Tensor, documents: Documents) -> Tensor:
            if isinstance(documents, UnknownDocuments):
                lengths = documents.offsets.diff()
                assert len(tokens) == documents.offsets[-1] == 128 and lengths.max() <= documents.limit
                sizes.append((len(lengths), documents.limit))
            return super().hidden(tokens, documents)

    model, recorder = Looking(), Again()
    graph = graph_of(model, recorder, [])
    # The shortest documents first; one that has room for padding; then the longest.
    lengths = ([5] * 25, [16] * 8, [16] * 7, [17, 16, 31, 32, 31])
    gradients_after(model, [[one] for one in batches(24, [lengths[number // 6] for number in range(24)])], graph)
    assert list(dict.fromkeys(sizes)) == [(32, 16), (8, 16), (8, 32)]


def test_gradients_of_a_kept_optimiser_are_zeroed_in_place() -> None:
    """With bitsandbytes' optimiser, whose small tensors lie in one buffer."""
    pytest.importorskip("bitsandbytes", reason="its optimiser is what is tried")
    model, usual = Toy().bfloat16(), Toy().bfloat16()
    for one in (model, usual):
        one.steps = build_optimizer("adamw_8bit", list(one.named_parameters()), 1e-2)  # type: ignore[assignment]
    steps = [[one] for one in batches(6, LENGTHS[1:2])]
    graph = graph_of(model, Again(), [])
    for number, step in enumerate(steps):
        for one, replays in ((model, graph), (usual, None)):
            shards: Any = Shards(one)  # type: ignore[arg-type]
            training_step(shards, one.steps, step, step=number, max_grad_norm=1.0, device=CPU, graph=replays)  # type: ignore[arg-type]
    assert graph.keeps_gradients
    for (name, parameter), other in zip(model.named_parameters(), usual.parameters(), strict=True):
        assert torch.equal(parameter, other), name
