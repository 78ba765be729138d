"""FlashAttention 3 or 4 in place of the second, which torch brings, where its package is installed and it is right.

torch's public `activate_flash_attention_impl` puts one of them behind its operators for the whole process
(https://docs.pytorch.org/docs/stable/nn.attention.html): `varlen_attn`, which attention.causal calls, then reaches it.
It is tried like a kernel of ours, in another process first (models/use_kernels.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import metadata

import torch
from torch import Tensor, nn

from models.attention.causal import causal_attention
from models.blocks.documents import Documents
from quant.common.errors import in_one_line
from quant.kernels.language import capability

# torch's names, in the order of preference: the package, and the compute capabilities that torch takes it on.
PACKAGES = {"FA3": ("flash-attn-3", (9,)), "FA4": ("flash-attn-4", (10,))}
# Query heads, heads of keys, width, window: the widths of the models, and one that is no multiple of 16.
_TRIALS = ((4, 2, 24, None), (4, 1, 64, 40), (4, 2, 128, None), (4, 2, 128, 40), (2, 2, 256, None), (4, 2, 256, 40))
_LENGTHS = (200, 1, 67, 129)
_EMPTY = 3  # documents without tokens after these, as passes have that are replayed (train/graph.py)
_TOLERANCE = 2e-2  # of bfloat16 against float32, of the largest value, as in `python -m benchmarks.gpu`


def installed(name: str) -> str | None:
    """The version of the package of FA3 or FA4."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(PACKAGES[name][0])
    return None


def offered(device: torch.device) -> str | None:
    """FA3 or FA4, if torch and an installed package offer one for this device."""
    if device.type != "cuda" or not hasattr(nn.attention, "list_flash_attention_impls"):
        return None
    major, _ = capability(device)
    known = nn.attention.list_flash_attention_impls()
    for name, (_, majors) in PACKAGES.items():
        if name in known and major in majors and installed(name) is not None:
            return name
    return None


def use(name: str | None) -> None:
    """FA3, FA4 or torch's own (None) from now on, in the whole process. Raises whatever its package raises."""
    if name is not None:
        nn.attention.activate_flash_attention_impl(name)
    elif hasattr(nn.attention, "restore_flash_attention_impl") and nn.attention.current_flash_attention_impl():
        nn.attention.restore_flash_attention_impl()


def failure(name: str, device: torch.device) -> str | None:
    """What is wrong with it on `device`, outputs and gradients, or None. It stays in use: for a process of its own."""
    try:
        use(name)
        for number, worst in enumerate(_differences(device)):
            if not worst <= _TOLERANCE:
                return f"trial {number} differs from float32 by {worst:.1e} of its largest value"
    except Exception as error:  # noqa: BLE001  whatever a package, a compiler or a driver raises
        return in_one_line(error)
    return None


def _differences(device: torch.device) -> Iterator[float]:
    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads, width, window in _TRIALS:
        shapes = ((sum(_LENGTHS), number, width) for number in (heads, kv_heads, kv_heads, heads))
        given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        found = _attended(given, device, window)
        # In float32 on the CPU: document by document, by scaled_dot_product_attention.
        right = _attended([tensor.float() for tensor in given], torch.device("cpu"), window)
        for one, other in zip(found, right, strict=True):
            difference = (one.float().cpu() - other).abs().max() / other.abs().max()
            yield float(difference.nan_to_num(float("inf")))


def _attended(given: list[Tensor], device: torch.device, window: int | None) -> list[Tensor]:
    """Of query, key, value and an upstream gradient: the output, and the gradients of the first three."""
    *inputs, upstream = (tensor.to(device) for tensor in given)
    query, key, value = (tensor.detach().requires_grad_() for tensor in inputs)
    documents = Documents.from_lengths(_LENGTHS, device)
    offsets = torch.cat((documents.offsets, documents.offsets[-1:].expand(_EMPTY)))
    documents = Documents(documents.lengths, offsets, documents.positions)
    out = causal_attention(query, key, value, documents, query.shape[-1] ** -0.5, window)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), upstream)]
