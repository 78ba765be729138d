"""Loading a model that is cut: each process reads its own part of the checkpoint.

Of a converted checkpoint a process reads the rows that it will hold. Of a hub checkpoint it quantises its own experts;
a matrix that isn't an expert's is quantised whole and cut, since the scales of double quantisation depend on all of it.
Host memory: the process's part of the model, one tensor, and up to 16 MiB of a mapped file
(models/checkpoint/tensorfile.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from models.checkpoint.keymap import Key
from models.checkpoint.stream import Reader
from parallel.shards import Shards, local_tensor
from quant.common.errors import NibbleError
from quant.common.words import some


def fill_parts(shards: Shards, reader: Reader, progress: Callable[[int, int], None] | None = None) -> None:
    """Stream a checkpoint into the tensors of a cut model that has memory (`materialise`).

    progress(done, total): of the values that this process reads. Raises NibbleError naming tensors that the checkpoint
    left unfilled.
    """
    model, parts = shards.model, shards.parts
    tensors = {name: local_tensor(tensor) for name, tensor in model.named_parameters()} | dict(model.named_buffers())
    adapters = {name for name in tensors if ".lora." in name}
    total, done = sum(torch.Size(key.shape).numel() for key in reader.keys), 0
    filled: dict[str, int] = {}
    for key in reader.keys:
        experts = _experts(key, shards)
        for piece in reader.read(key, experts):
            for name, value in piece.tensors.items():
                target, part = tensors[name], parts.get(name)
                if piece.start is not None:
                    assert experts is not None
                    first = piece.start - experts.start
                    target = target[first : first + value.shape[0]]
                elif part is not None:
                    value = part.of(value)
                if target.shape != value.shape or target.dtype != value.dtype:
                    raise ValueError(f"{name}: {tuple(value.shape)} {value.dtype} for {tuple(target.shape)}")
                target.copy_(value)
                filled[name] = filled.get(name, 0) + value.numel()
        done += torch.Size(key.shape).numel()
        if progress is not None:
            progress(done, total)
    wrong = sorted(n for n, tensor in tensors.items() if n not in adapters and filled.get(n, 0) != tensor.numel())
    if wrong:
        raise NibbleError(f"{len(wrong)} tensors of the model were not filled from the checkpoint: {some(wrong)}.")


def _experts(key: Key, shards: Shards) -> range | None:
    """The experts of a stack that this process holds; None for what is no stack."""
    if not key.parts:
        return None
    part = next(part for name, part in shards.parts.items() if name.startswith(f"{key.native}."))
    return range(part.start, part.stop)
