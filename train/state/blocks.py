"""8-bit optimiser states in parts: where the blocks of a cut tensor lie, and how they are cut anew.

bitsandbytes quantises a state in blocks of 256 values of the flat tensor that it is given, here a process's part.
Where every part begins at a multiple of 256 values of the whole tensor, the parts' blocks are the whole tensor's, in
any number of processes. A checkpoint holds codes of the whole tensor's shape, and the scales of all parts in a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.parts import Part, bounds

BLOCK = 256  # values per scale in bitsandbytes' 8-bit optimisers


@dataclass(frozen=True)
class BlockCut:
    """Scales start .. stop of a one-dimensional tensor of `shape` scales (a parallel.parts.Cut)."""

    shape: tuple[int, ...]
    start: int
    stop: int
    dim: int = 0


@dataclass(frozen=True)
class Layout:
    """A tensor of `shape` in `count` parts along `dim`, each with its own blocks. One part is the whole tensor."""

    shape: tuple[int, ...]
    dim: int = 0
    count: int = 1

    def part(self, index: int) -> tuple[int, int]:
        return bounds(self.shape[self.dim], self.count, index)

    def index(self, start: int) -> int:
        """The number of the part that begins at `start`."""
        return start // max(1, self.part(0)[1])

    def values(self, index: int) -> int:
        start, stop = self.part(index)
        return (stop - start) * (math.prod(self.shape) // max(1, self.shape[self.dim]))

    def blocks(self) -> list[int]:
        """Where the blocks of each part begin among those of all parts, and their number at the end."""
        ends = [0]
        for index in range(self.count):
            ends.append(ends[-1] + -(-self.values(index) // BLOCK))
        return ends

    def aligned(self) -> bool:
        """Whether the parts' blocks are those of the whole tensor."""
        consecutive = math.prod(self.shape[: self.dim]) == 1
        return self.count == 1 or (consecutive and self.values(0) % BLOCK == 0)

    def cut(self, index: int) -> BlockCut:
        """The scales of part `index` among those of all parts."""
        blocks = self.blocks()
        return BlockCut((blocks[-1],), blocks[index], blocks[index + 1])


def layout_of(part: Part) -> Layout:
    """The layout of which `part` is one process's share."""
    sizes = [part.mesh.size(i) for i, placement in enumerate(part.placements) if placement.is_shard()]
    return Layout(part.shape, part.dim, math.prod(sizes))


def recut(
    codes: Tensor, scales: Tensor, saved: Layout, here: Layout, index: int, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Codes and scales of part `index` of `here`, from its codes in the blocks of `saved` and the scales of all these.

    codes: uint8, the part's shape. scales: float32 [blocks of `saved`]. values: float32 [256], what the codes mean.
    Exact where the blocks are the same ones. Elsewhere the values are quantised anew in the part's own blocks, which
    changes them by as much as quantising does.
    """
    if (saved.dim, saved.count) == (here.dim, here.count):
        cut = saved.cut(index)
        return codes, scales[cut.start : cut.stop]
    if saved.aligned() and here.aligned():
        first = index * here.values(0) // BLOCK
        return codes, scales[first : first + -(-codes.numel() // BLOCK)]
    from quant.fourbit import import_bitsandbytes

    dense = values[codes.int()] * _scale_of_each(codes, scales, saved, here, index)
    quantised, state = import_bitsandbytes().functional.quantize_blockwise(dense, code=values, blocksize=BLOCK)
    return quantised.view_as(codes), state.absmax


def _scale_of_each(codes: Tensor, scales: Tensor, saved: Layout, here: Layout, index: int) -> Tensor:
    """float32, the codes' shape: the scale of every value of part `index` of `here`."""
    result = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    start, stop = here.part(index)
    for j in range(saved.count):
        first, last = saved.part(j)
        cut, shape = saved.cut(j), list(saved.shape)
        shape[saved.dim] = last - first
        theirs = scales[cut.start : cut.stop].repeat_interleave(BLOCK)[: saved.values(j)].view(shape)
        if saved.dim == here.dim:
            low, high = max(start, first), min(stop, last)
            if low < high:
                result.narrow(here.dim, low - start, high - low).copy_(theirs.narrow(here.dim, low - first, high - low))
        else:
            result.narrow(saved.dim, first, last - first).copy_(theirs.narrow(here.dim, start, stop - start))
    return result
