"""A micro-batch's forward and backward pass as one CUDA graph: recorded once, then started as a whole.

Computed as usual, the host starts every operation of a pass, and of small ones the device is done sooner than the host
can start the next. A graph replays the same operations on the same addresses, so everything that differs from one
micro-batch to the next lies in tensors of fixed size: batches are filled up with padding, and the gradients stay where
they are and are set to zero.

A graph is used only after it has proved itself: its first replay must give the loss and the gradient norm of the usual
pass over the same batch. Whatever goes wrong before that, the run goes on with usual passes and says why.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.attention.fla import uses_fla
from models.blocks.documents import UnknownDocuments
from parallel.shards import Shards
from quant.common.devices import copy_without_waiting
from quant.common.errors import in_one_line
from quant.kernels.language import power_of_two
from train.config.load import Config
from train.data.batches import MULTIPLE, Batch, empty_batch, filled
from train.held_out import batch_loss
from train.optim import Measured, measure_gradients

# Steps that are computed as usual before a pass is recorded: kernels get compiled, and memory finds its size.
FIRST_PASSES = 2
# Padding is computed like other tokens: a batch that has a smaller share of the tokens is computed as usual.
LEAST_FULL = 0.8
# So that there are few graphs, which share their memory, the number of labelled rows is rounded up to eighths of the
# tokens, that of documents to a power of 2, and the length of the longest document to a power of 4. No further, since
# flash attention starts blocks for so many documents of that length, and those without tokens take time too.
LABEL_STEPS = 8
LENGTH_FACTOR = 4
MOST_GRAPHS = 16
# Of the device's memory, for the optimiser's update and whatever else is no pass.
SPARE_BYTES = 2**29
# How far the two results may be apart, relative: products of other shapes round bfloat16 elsewhere.
LOSS_TOLERANCE = 1e-3
NORM_TOLERANCE = 1e-2

Replay = Callable[[], None]


class Recorder(Protocol):
    """What records work on a device."""

    def record(self, work: Callable[[], None]) -> Replay:
        """Does the work as usual, then records it without doing it; raises where it can't be recorded."""

    def has_room(self) -> bool:
        """Whether a usual pass has memory beside that of the recorded ones."""

    def release(self) -> None:
        """Frees the memory of what was recorded and has been dropped."""


class CudaRecorder:
    """Records into CUDA graphs that share their working memory, apart from the memory of everything else."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held = self._working = 0  # bytes of the graphs; bytes that a usual pass works with
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, work: Callable[[], None]) -> Replay:
        with torch.cuda.device(self.device):
            before = self._reserved()
            self._once(work)
            self._working = max(self._working, torch.cuda.memory_reserved(self.device) - before)
            before = self._reserved()
            graph = self._capture(work)
            self._held += torch.cuda.memory_reserved(self.device) - before
            if self._free() < SPARE_BYTES:
                raise MemoryError(f"it leaves less than {SPARE_BYTES >> 20} MiB of the device")
            return graph.replay

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Where the end of a recording fails, torch.cuda.graph leaves its stream the current one.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self._pool):
                work()
        except BaseException:
            # torch 2.11 doesn't tell its allocator of an end that fails (pytorch#180395), which would then raise when
            # it is short of memory. Where it knows, this raises.
            with contextlib.suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            raise
        return graph

    def _once(self, work: Callable[[], None]) -> None:
        """The work as usual: its kernels are compiled, and where it waits for the device it raises, which here does no
        harm. On a stream of its own, as torch recommends before recording."""
        stream, mode = self._stream, torch.cuda.get_sync_debug_mode()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def _reserved(self) -> int:
        """Bytes that torch has of the device, without those that are free: memory of one stream is no other's."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)

    def has_room(self) -> bool:
        return self._free() >= self._working

    def _free(self) -> int:
        """Bytes of the device that are nobody's, or torch's and in no graph."""
        free, _ = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device) - self._held
        return free + cached

    def release(self) -> None:
        self._held, self._pool = 0, torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Size:
    """What a graph is recorded for. rows: with labels; longest: the most tokens of a document."""

    rows: int
    documents: int
    longest: int


@dataclass(frozen=True)
class _Recorded:
    """What a graph reads, and how it is started. loss: where it leaves its loss."""

    inputs: tuple[Tensor, ...]
    denominator: Tensor
    loss: Tensor
    replay: Replay

    def run(self, inputs: Sequence[Tensor], denominator: float) -> Tensor:
        _load(self.inputs, inputs)
        self.denominator.fill_(denominator)
        self.replay()
        return self.loss


class PassGraph:
    """Forward and backward passes of a model's micro-batches by graphs, where they can be.

    tokens: of a micro-batch, to which smaller ones are filled up. longest: the most that a document has.
    note: gets the lines that say what was decided.
    """

    def __init__(
        self,
        shards: Shards,
        device: torch.device,
        *,
        tokens: int,
        longest: int,
        note: Callable[[str], None],
        recorder: Recorder | None = None,
    ) -> None:
        self._model, self._parameters, self._device = shards.model, shards.parameters, device
        self._tokens, self._longest, self._note = tokens + -tokens % MULTIPLE, longest, note
        self._recorder = recorder or CudaRecorder(device)
        self._recorded: dict[_Size, _Recorded] = {}
        self._passes = 0
        self._complete = False  # nothing more is recorded
        self.active = True

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients must stay where they are, to be set to zero instead of being freed."""
        return bool(self._recorded)

    def run(self, batch: Batch, denominator: float, *, first: bool) -> Tensor | None:
        """The loss of `batch` (on the host), a float32 scalar on the device, its gradient added to the parameters'.

        None, with nothing done, where the batch is to be computed as usual. first: no other pass of the step has added
        to the gradients, so that a graph can be compared with the usual pass.
        """
        if not self.active:
            return None
        self._passes += first
        if len(batch.tokens) > self._tokens or batch.real_tokens < LEAST_FULL * self._tokens:
            self.make_room()
            return None
        longest = 1
        while longest < batch.documents.longest:
            longest *= LENGTH_FACTOR
        longest = min(longest, self._longest)
        full = filled(batch, self._tokens, longest)
        rows = math.ceil(LABEL_STEPS * batch.labelled / self._tokens) * self._tokens // LABEL_STEPS
        key = _Size(rows, power_of_two(len(full.documents.lengths)), longest)
        recorded = self._recorded.get(key)
        if recorded is not None:
            return recorded.run(_inputs(full, key.documents), denominator)
        if len(self._recorded) == MOST_GRAPHS and not self._complete:
            self._complete = True
            self._note(f"no further CUDA graph after {MOST_GRAPHS}: batches of other sizes are computed as usual")
        if not first or self._passes <= FIRST_PASSES or self._complete:
            self.make_room()
            return None
        return self._record(batch, full, key, denominator)

    def make_room(self) -> None:
        """Before a usual pass, also of an evaluation: graphs that leave it no memory are freed, to be recorded anew."""
        if self._recorded and not self._recorder.has_room():
            self._forget()

    def _record(self, batch: Batch, full: Batch, key: _Size, denominator: float) -> Tensor:
        """The loss of the usual pass of `batch`, or, if that agrees, of the replayed one of `full`: with more padding.

        What is recorded is a pass over padding alone: a graph that doesn't read its inputs again can't agree.
        """
        self.make_room()
        usual = self._usual_pass(batch, denominator)
        expected = measure_gradients(self._parameters, usual)
        if not (math.isfinite(expected.loss) and math.isfinite(expected.norm)):
            return usual  # an error of the run
        try:
            self.clear_gradients()
            recorded = self._recording(key)
            self.clear_gradients()
            loss = recorded.run(_inputs(full, key.documents), denominator)
            problem = _difference(expected, measure_gradients(self._parameters, loss))
        except Exception as error:  # noqa: BLE001 - whatever it is, the usual pass has just done without it
            problem = in_one_line(error)
        if problem is None:
            if not self._recorded:
                self._note("passes are replayed as a CUDA graph from here on (train.cuda_graph)")
            self._recorded[key] = recorded
            return loss
        recorded = None  # type: ignore[assignment]  # its memory is freed
        self._complete = True
        if self._recorded:
            self._note(f"no further CUDA graph, for batches of other sizes: {problem}")
        else:
            self.active = False
            self._forget()
            self._note(f"no CUDA graph, passes are computed as usual: {problem}. train.cuda_graph: off doesn't try")
        self.clear_gradients()
        return self._usual_pass(batch, denominator)

    def _recording(self, key: _Size) -> _Recorded:
        """A graph of a pass over batches of this size."""
        blank = filled(empty_batch(), self._tokens, key.longest)
        inputs = tuple(value.to(self._device) for value in _inputs(blank, key.documents))
        tokens, labels, positions, offsets = inputs
        unknown = UnknownDocuments((), offsets, positions, limit=key.longest)
        fixed = Batch(tokens, labels, unknown, real_tokens=0, labelled=0)
        divisor, loss = torch.ones((), device=self._device), torch.zeros((), device=self._device)

        def work() -> None:
            part = batch_loss(self._model, fixed, divisor, key.rows)
            part.backward()
            loss.copy_(part.detach())

        return _Recorded(inputs, divisor, loss, self._recorder.record(work))

    def _usual_pass(self, batch: Batch, denominator: float) -> Tensor:
        loss = batch_loss(self._model, batch.to(self._device), denominator)
        loss.backward()
        return loss.detach()

    def clear_gradients(self) -> None:
        """Set to zero, where they are, in one operation."""
        torch._foreach_zero_([parameter.grad for _, parameter in self._parameters if parameter.grad is not None])

    def _forget(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a replay may still run
        self._recorded.clear()
        self._recorder.release()
        self._complete = False  # there may be room now for what failed


def graph_for(config: Config, shards: Shards, device: torch.device, note: Callable[[str], None]) -> PassGraph | None:
    """What replays the passes of a run; None, with a line on CUDA that says why, where nothing can."""
    train, data = config.train, config.data
    if device.type != "cuda" or train.cuda_graph == "off":
        return None
    if reason := _reason(config, shards, device):
        note(f"no CUDA graph: {reason}")
        return None
    tokens = train.micro_batch_size * data.sequence_length
    return PassGraph(shards, device, tokens=tokens, longest=data.sequence_length, note=note)


def _reason(config: Config, shards: Shards, device: torch.device) -> str | None:
    """Why a run's passes can't be replayed."""
    if shards.meshes is not None:
        return "the model is cut over processes or kept in host memory"
    if not config.data.packing:
        return "data.packing: false makes batches of different sizes"
    if config.train.kernels == "torch":
        return "train.kernels: torch waits for the device in every layer"
    if config.train.balance != "none":
        return f"train.balance: {config.train.balance} counts on the host"
    # Last, since that package is tried first.
    linear = any(getattr(module, "group", None) == "linear_attention" for module in shards.model.modules())
    if linear and uses_fla(device, shards.model.dtype):
        return "flash-linear-attention waits for the device in every layer"
    return None


def _inputs(batch: Batch, documents: int) -> tuple[Tensor, ...]:
    """On the host: tokens, labels, positions int64 [N], offsets int32 [documents + 1], the last ones without tokens."""
    offsets = batch.documents.offsets
    more = documents + 1 - len(offsets)
    offsets = torch.cat((offsets, offsets[-1:].expand(more)))
    return batch.tokens, batch.labels, batch.documents.positions, offsets


def _load(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        copy_without_waiting(target, value)


def _difference(expected: Measured, found: Measured) -> str | None:
    """What differs by more than rounding; None: nothing."""
    pairs = (("loss", "loss", LOSS_TOLERANCE), ("gradient norm", "norm", NORM_TOLERANCE))
    for what, name, tolerance in pairs:
        one, other = getattr(expected, name), getattr(found, name)
        if not abs(one - other) <= tolerance * abs(one):
            return f"its first replay has a {what} of {other:.6g} where the usual pass has {one:.6g}"
    return None
