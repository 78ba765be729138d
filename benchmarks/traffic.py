"""What the collectives of a training step move: as torch's profiler records them, and as the plan says.

Bytes are those of one process that cross to or from another: what it keeps of its own isn't counted. They are what
FSDP2 and the exchange of tokens ask of torch.distributed; a backend may send more (gloo reduces and scatters by
reducing everything everywhere).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.mesh import MeshSizes
from parallel.plan import units
from parallel.shards import Shards, is_cut, local_tensor
from quant.storage import Storage

# torch's profiler has the C++ names.
_ITEM_BYTES = {
    "double": 8, "float": 4, "c10::BFloat16": 2, "c10::Half": 2,
    "long int": 8, "long": 8, "int": 4, "signed char": 1, "unsigned char": 1, "bool": 1,
}  # fmt: skip
_BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Traffic:
    """Bytes of one process. gathered_forward, gathered_backward: weights that came from others, in either pass.
    reduced: gradients that went to others. exchanged: tokens (rows, weights, counts) that went to others.
    """

    gathered_forward: int = 0
    gathered_backward: int = 0
    reduced: int = 0
    exchanged: int = 0

    @property
    def gathered(self) -> int:
        return self.gathered_forward + self.gathered_backward


def record(step: Callable[[], object], owner: int = 0, owners: int = 1) -> Traffic:
    """Run `step` and say what it moved. owner: this process's number among the `owners` between which tokens travel."""
    activities = [torch.profiler.ProfilerActivity.CPU]  # collectives are called there, whatever the device
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return _summed([event for event in events if event.get("ph") == "X"], owner, owners)


def _summed(events: list[dict[str, Any]], owner: int, owners: int) -> Traffic:
    backward = [event for event in events if event["name"].startswith("autograd::engine::evaluate_function")]
    forward_bytes = backward_bytes = reduced = exchanged = 0
    for event in events:
        if not event["name"].startswith("c10d::"):
            continue
        if event["name"] == "c10d::_allgather_base_":
            nbytes = _nbytes(event, 0) - _nbytes(event, 1)
            if any(_inside(event, span) for span in backward):
                backward_bytes += nbytes
            else:
                forward_bytes += nbytes
        elif event["name"] == "c10d::_reduce_scatter_base_":
            reduced += _nbytes(event, 1) - _nbytes(event, 0)
        elif event["name"] == "c10d::alltoall_base_":
            exchanged += _sent(event, owner, owners)
    return Traffic(forward_bytes, backward_bytes, reduced, exchanged)


def _inside(event: dict[str, Any], span: dict[str, Any]) -> bool:
    begin: float = span["ts"]
    return bool(event["tid"] == span["tid"] and begin <= event["ts"] < begin + span["dur"])


def _nbytes(event: dict[str, Any], argument: int) -> int:
    arguments = event["args"]
    return math.prod(arguments["Input Dims"][argument]) * _ITEM_BYTES[arguments["Input type"][argument]]


def _sent(event: dict[str, Any], owner: int, owners: int) -> int:
    """alltoall_base_(output, input, group, output sizes, input sizes, …), sizes in rows; none where all are equal."""
    total = _nbytes(event, 1)
    sizes = json.loads(event["args"]["Concrete Inputs"][4]) or [1] * owners
    return total - total * sizes[owner] // max(sum(sizes), 1)


@dataclass(frozen=True)
class Gathers:
    """Bytes that come from others in one step with one micro-batch. dense: if frozen weights were gathered as bfloat16
    and only then cut out of it, all else being the same."""

    packed: int
    dense: int


def planned_gathers(shards: Shards, sizes: MeshSizes) -> Gathers:
    """What parallel/plan.py has every process gather in one micro-batch, from the sizes of the parts that it holds.

    For a model cut with reshard_after_forward. Before a step and after it, not within.
    """
    packed = dense = 0
    seen: set[torch.nn.Parameter] = set()
    for unit, module in units(shards.model, sizes):
        parts = sizes.shard if unit.over == "owners" else sizes.parts
        times = 1 if unit.kept or not unit.backward else 2
        new = {parameter for parameter in module.parameters() if parameter not in seen and is_cut(parameter)}
        seen |= new
        held = {parameter: local_tensor(parameter).nbytes for parameter in new}
        packed += times * (parts - 1) * sum(held.values())
        for storage in module.modules():
            of_storage = [p for p in storage.parameters() if p in new] if isinstance(storage, Storage) else []
            if isinstance(storage, Storage) and of_storage:
                for parameter in of_storage:
                    del held[parameter]
                dense += times * (parts - 1) * math.prod(storage.shape) * _BFLOAT16_BYTES // parts
        dense += times * (parts - 1) * sum(held.values())
    return Gathers(packed, dense)
