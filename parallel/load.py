"""Loading a model that is cut: each process reads its own part of the checkpoint.

Of a converted checkpoint a process reads the rows that it will hold. Of a hub checkpoint it quantises its own experts;
a matrix that isn't an expert's is quantised whole and cut, since the scales of double quantisation depend on all of it.
Host memory: the process's part of the model, one tensor, and up to 16 MiB of a mapped file
(models/checkpoint/tensorfile.py).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from models.checkpoint.stream import Reader
from models.load import fill
from parallel.shards import Shards, local_tensor


def fill_parts(shards: Shards, reader: Reader, progress: Callable[[int, int], None] | None = None) -> None:
    """`models.load.fill` for a cut model that has memory (`materialise`): the base model, not its adapter."""
    model, parts = shards.model, shards.parts
    tensors = {name: local_tensor(tensor) for name, tensor in model.named_parameters() if ".lora." not in name}
    tensors |= dict(model.named_buffers())
    stacks = {key.native for key in reader.keys if key.parts}
    held = {
        stack: range(part.start, part.stop)
        for name, part in parts.items()
        if (stack := name.rpartition(".")[0]) in stacks
    }

    def cut(name: str, value: Tensor) -> Tensor:
        return parts[name].of(value) if name in parts else value

    fill(tensors, reader, progress, experts=held, cut=cut)
