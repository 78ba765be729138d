"""One process of several that a model is cut over, without the others: what it launches can be counted.

FSDP2 refuses parameters on the meta device. So the tensors are torch's fake ones, which say that they are on the CPU,
have no values either, and raise where the host asks for one. Messages are operations of torch's fake process group,
which sends nothing. FSDP2's streams and events aren't there: on a CPU it has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed import fake_pg

from models.decoder import CausalLM
from models.experts.block import Experts
from parallel.exchange import ExpertExchange
from parallel.fsdp import materialise, shard
from parallel.mesh import MeshSizes, make_meshes
from parallel.shards import Shards
from quant.common.devices import cpu_as_accelerator
from quant.fourbit import code, dynamic_map

CPU = torch.device("cpu")


class EqualExchange(ExpertExchange):
    """Every process sends every expert equally many rows. waits: how often the host asked the device how many."""

    waits = 0

    def on_host(self, counts: Tensor, choices: int) -> list[list[list[int]]]:
        self.waits += 1
        sides, processes, owned = counts.shape
        return [[[choices // self.experts] * owned] * processes] * sides


def make_tables(model: CausalLM, device: torch.device) -> None:
    """What a process makes once and keeps, which is no part of a step."""
    code("nf4", device), dynamic_map(device)
    model.model.rope.tables(torch.zeros(1, dtype=torch.int64, device=device))


@contextmanager
def cut(model: CausalLM, processes: int, expert: int = 1) -> Iterator[Shards]:
    """Within it `model`, which is on the meta device, is one of `processes` shares without values, of an accelerator.

    expert: over how many processes the experts are distributed (`EqualExchange`).
    """
    make_tables(model, CPU)  # must have values
    assert fake_pg is not None  # importing it gives torch.distributed its "fake" backend
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=processes)
    try:
        shards = shard(model, make_meshes(MeshSizes(1, expert, processes // expert), CPU))
        for module in model.modules():
            if isinstance(module, Experts) and isinstance(module.exchange, ExpertExchange):
                module.exchange = EqualExchange(module.exchange.group, module.exchange.experts)
        with FakeTensorMode(allow_non_fake_inputs=True), cpu_as_accelerator():
            materialise(shards, CPU)
            yield shards
    finally:
        dist.destroy_process_group()
