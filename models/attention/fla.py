"""Whether the kernels of flash-linear-attention are there and right."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from importlib import metadata
from importlib.util import find_spec

import torch

log = logging.getLogger("nibble")

FLA_NEEDED = (0, 5)  # major and minor version


def uses_fla(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether values of this dtype on this device go through flash-linear-attention."""
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and _fla_is_right()


@functools.cache
def _fla_is_right() -> bool:
    """Whether flash-linear-attention is installed and computes the right values; says so, once, if it doesn't."""
    if find_spec("fla") is None:
        return False
    found = "of unknown version"
    for distribution in ("flash-linear-attention", "fla-core"):  # old versions have no fla-core, which has the kernels
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = metadata.version(distribution)
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is not None and tuple(map(int, numbers.groups())) >= FLA_NEEDED:
        return True
    log.warning(
        "flash-linear-attention %s isn't used: before %d.%d.0 it computes wrong values where value heads outnumber key "
        "heads. The gated delta rule runs in torch, slower. To use it: pip install -U fla-core",
        found,
        *FLA_NEEDED,
    )
    return False
