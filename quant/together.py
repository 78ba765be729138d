"""Several quantised matrices with the same inputs made dense in one launch, with LoRA beside them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quant.fourbit import FourBitStorage, code, dynamic_map
from quant.int8 import Int8Storage
from quant.kernels.choice import uses
from quant.kernels.dequantise import BLOCK
from quant.kernels.side_by_side import MOST, side_by_side
from quant.storage import Storage


def together_at_once(storages: Sequence[Storage]) -> bool:
    """Whether `dense_together` can make these matrices dense, where they are."""
    first = storages[0]
    alike = isinstance(first, FourBitStorage | Int8Storage) and all(one.spec == first.spec for one in storages)
    fit = len(storages) <= MOST and first.shape[-1] % BLOCK == 0
    return alike and fit and uses(side_by_side, first.device)


def dense_together(
    storages: Sequence[Storage], a: Sequence[Tensor | None], b: Sequence[Tensor | None], *, out: Tensor
) -> None:
    """The dense values of matrices [outᵢ, in] below one another, with A [Rᵢ, in] and B [outᵢ, Rᵢ] of those that have
    them, in one launch: as quant/kernels/side_by_side.py has them in `out` [Σ outᵢ + Σ Rᵢ, in + Σ Rᵢ]. storages: of one
    kind, as `together_at_once` has said.
    """
    if isinstance(storages[0], Int8Storage):
        of_int8 = [one for one in storages if isinstance(one, Int8Storage)]
        packed, scales = [one.packed for one in of_int8], [one.scale for one in of_int8]
        side_by_side(packed, scales, [], [], a, b, None, None, out=out)
        return
    each = [one for one in storages if isinstance(one, FourBitStorage)]
    double = each[0].spec.double_quant
    side_by_side(
        [one.packed for one in each], [one.absmax for one in each],
        [one.nested_absmax for one in each if double], [one.nested_offset for one in each if double],
        a, b, code(each[0].kind, out.device), dynamic_map(out.device), out=out,
    )  # fmt: skip
