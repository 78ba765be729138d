"""Merging an adapter: `from models import merge_adapter` in Python, `python -m models.merge` in a shell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

    from models.adapters.packing import Packing
    from models.merge.content import Onto
    from models.merge.merging import Summary
    from models.merge.trained import Trained
    from quant.storage import Kind


def merge_adapter(
    model: str | Path,
    adapter: str | Path,
    destination: str | Path,
    storage: str = "none",
    dtype: torch.dtype | str = "bfloat16",
    device: torch.device | str = "cpu",
    *,
    double_quant: bool = True,
    onto: Onto = "base",
    trained_with: Trained | None = None,
    layout: Packing | None = None,
    force: bool = False,
    progress: bool = False,
) -> Summary:
    """Write the base checkpoint `model` (a hub folder, or a hub id) with `adapter` merged into it to `destination`.

    storage: none writes the hub's format: the base's shards, keys and dtypes, with other data for what is merged,
        W + s · B·A in float32, rounded once. Another storage writes a converted checkpoint of the same, whose other
        tensors are `dtype`; double_quant: for 4 bits, quantise the scales too.
    device: where matrices are quantised, for the result and for what `Summary.errors` measures.
    onto: `dequantised` merges into what quantising and back leaves of every quantised matrix, adapted or not: what a
        QLoRA adapter was trained against.
    trained_with: how the base was stored in training (nf4-single: without double quantisation). None is what the run's
        config.yaml beside the adapter's folder says, and nf4 where there is none.
    layout: of a stack's lora_B, see `AdapterFile`. force: replace another unfinished or converted result.

    An interrupted call goes on where it stopped. Memory: the matrices of one expert, and one stack of the adapter.
    Raises NibbleError, before anything is written, for an adapter that doesn't fit, lacks a tensor or has one too many;
    and models.checkpoint.conversion.Interrupted on Ctrl-C.
    """
    from models.merge.merging import merge
    from quant.choices import named_device, named_dtype
    from quant.common.progress import Bar
    from quant.storage import StorageSpec

    spec = StorageSpec(cast("Kind", storage), double_quant)
    with Bar("merging", show=progress) as bar:
        return merge(
            model,
            adapter,
            destination,
            storage=spec if spec.kind != "none" else None,
            dtype=named_dtype(dtype),
            device=named_device(device),
            onto=onto,
            trained=trained_with,
            layout=layout,
            force=force,
            progress=bar.update,
        )
