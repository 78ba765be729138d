"""Converting a checkpoint: `from models import convert` in Python, `python -m models.convert` in a shell.

A folder, with the command in `__main__`, because the package `models` imports it at once (nothing here needs torch at
import): so the name `models.convert` is the function, in whatever order things are imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

    from models.checkpoint.conversion import Summary
    from quant.storage import Kind


def convert(
    source: str | Path,
    destination: str | Path,
    storage: str = "nf4",
    dtype: torch.dtype | str = "bfloat16",
    device: torch.device | str = "cpu",
    *,
    double_quant: bool = True,
    force: bool = False,
    progress: bool = False,
) -> Summary:
    """Write a hub checkpoint (a folder, or a hub id) to `destination` in nibble's own format, or finish doing so.

    storage, dtype, double_quant, progress: as for `load_model`. device: where matrices are quantised; the CPU is the
    reference, CUDA is much faster for 4 bits. force: replace another conversion that is in `destination`.
    Raises NibbleError, and models.checkpoint.conversion.Interrupted on Ctrl-C, after which the same call goes on.
    """
    from models.checkpoint import conversion
    from quant.choices import named_device, named_dtype
    from quant.common.progress import Bar
    from quant.storage import StorageSpec

    spec = StorageSpec(cast("Kind", storage), double_quant)
    dtype, device = named_dtype(dtype), named_device(device)
    with Bar("converting", show=progress) as bar:
        return conversion.convert(source, destination, spec, dtype, device=device, force=force, progress=bar.update)
