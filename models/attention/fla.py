"""The kernels of flash-linear-attention, where they are installed and compute the gated delta rule right.

On some cards some versions of Triton compile their backward pass wrong or not at all (on Hopper those from 3.4 to
3.7.0), so one small forward and backward on the device decides, when they are first asked for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import Tensor

from quant.common.errors import in_one_line

log = logging.getLogger("nibble")

FLA_NEEDED = (0, 5)  # major and minor version
_TOLERANCE = 3e-2  # of bfloat16, relative to the largest value
_LENGTHS = (70, 30)  # documents of the trial, one of them longer than a chunk


def uses_fla(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether values of this dtype on this device go through flash-linear-attention."""
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and fla_version() is not None and _is_right(device)


def flash_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, offsets: Tensor
) -> Tensor:
    """Arguments and result as of `gated_delta_rule`, the documents by their offsets."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    wide = (decay.to(torch.float32), beta.to(torch.float32))
    inputs = (x[None] for x in (query, key, value, *wide))
    out: Tensor = chunk_gated_delta_rule(*inputs, use_qk_l2norm_in_kernel=True, cu_seqlens=offsets)[0]
    return out[0]


@functools.cache
def fla_version() -> str | None:
    """The version of flash-linear-attention if it is installed and new enough; says so, once, if it is too old."""
    if find_spec("fla") is None:
        return None
    found = "of unknown version"
    for distribution in ("flash-linear-attention", "fla-core"):  # old versions have no fla-core, which has the kernels
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = metadata.version(distribution)
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is not None and tuple(map(int, numbers.groups())) >= FLA_NEEDED:
        return found
    log.warning(
        "flash-linear-attention %s isn't used: before %d.%d.0 it computes wrong values where value heads outnumber key "
        "heads. The gated delta rule runs without it, slower. To use it: pip install -U fla-core",
        found,
        *FLA_NEEDED,
    )
    return None


@functools.cache
def _is_right(device: torch.device) -> bool:
    # In a thread of its own: this one may be inside a layer that is computed again, whose hooks on saved tensors would
    # take the trial for a part of it, or in inference mode.
    with ThreadPoolExecutor(1) as apart:
        failure = apart.submit(failure_of, flash_gated_delta_rule, device).result()
    if failure is not None:
        log.warning(
            "flash-linear-attention %s isn't used: %s. The gated delta rule runs without it, slower. Another "
            "version of Triton may help (on Hopper: 3.7.1 or later), or: pip install -U fla-core",
            fla_version(),
            failure,
        )
    return failure is None


def failure_of(rule: Callable[..., Tensor], device: torch.device) -> str | None:
    """What is wrong with `rule`, called as `flash_gated_delta_rule`, in a small forward and backward; None if nothing.

    Gradients of all five arguments count. It waits for the device.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(_LENGTHS)

    def numbers(heads: int, *width: int) -> Tensor:
        return torch.randn(tokens, heads, *width, generator=generator).to(device)

    arguments = [numbers(heads, 64).to(torch.bfloat16) for heads in (1, 1, 2)]
    arguments += [-torch.nn.functional.softplus(numbers(2)), numbers(2).sigmoid()]
    upstream = numbers(2, 64).to(torch.bfloat16)
    offsets = torch.tensor((0, _LENGTHS[0], tokens), dtype=torch.int32, device=device)
    right = _with_gradients(_by_definition, [x.to(torch.float32) for x in arguments], upstream.to(torch.float32))
    try:
        given = _with_gradients(lambda *inputs: rule(*inputs, offsets), arguments, upstream)
        errors = [float((x.float() - y).abs().max() / y.abs().max()) for x, y in zip(given, right, strict=True)]
    except Exception as error:  # noqa: BLE001  whatever it, a compiler or a driver raises
        return in_one_line(error)
    names = ("output", "gradient of query", "of key", "of value", "of decay", "of beta")
    for name, worst in zip(names, errors, strict=True):
        if not worst <= _TOLERANCE:
            return f"its {name} differs from the definition by {worst:.1e} of the largest value"
    return None


def _with_gradients(rule: Callable[..., Tensor], arguments: list[Tensor], upstream: Tensor) -> list[Tensor]:
    with torch.enable_grad(), torch.autocast(upstream.device.type, enabled=False):
        leaves = [x.detach().requires_grad_() for x in arguments]
        out = rule(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def _by_definition(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """The recurrence of models/attention/delta_rule.py over the trial's documents, for one key head."""
    query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query, factor, outputs = query * query.shape[-1] ** -0.5, decay.exp()[..., None, None], []
    state = torch.zeros(())
    for token in range(len(value)):
        if token in (0, _LENGTHS[0]):
            state = value.new_zeros(value.shape[1], key.shape[2], value.shape[2])
        state = factor[token] * state
        missing = beta[token][:, None] * (value[token] - (key[token] @ state)[:, 0])
        state = state + key[token, 0][:, None] * missing[:, None]
        outputs.append((query[token] @ state)[:, 0])
    return torch.stack(outputs)
