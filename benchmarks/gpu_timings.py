"""Single operations of `benchmarks.gpu`, in a process of their own: `python -m benchmarks.gpu_timings DEVICE [tiny]`.

Forward and backward in bfloat16 of one document of 8192 tokens. One JSON line on standard output for each operation,
as soon as it is known: milliseconds are medians, `peak` is in bytes above the inputs (CUDA only).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.gpu_compare import without_flash_linear_attention
from benchmarks.measure import reset_peak_memory, synchronise
from models.attention.causal import causal_attention
from models.attention.delta_rule import chunked_gated_delta_rule, gated_delta_rule
from models.blocks.documents import Documents
from parallel.device import choose_device, peak_memory_bytes
from quant.common.errors import in_one_line

WARMUP, STEPS = 2, 5


@dataclass(frozen=True)
class Sizes:
    """Heads of the gated delta rule as in Qwen3.5-35B-A3B, of attention as in Trinity-Mini."""

    tokens: int = 8192
    key_heads: int = 16
    value_heads: int = 32
    heads: int = 32
    kv_heads: int = 4
    width: int = 128
    window: int = 2048


TINY = Sizes(tokens=256, key_heads=1, value_heads=2, heads=2, kv_heads=1, width=32, window=64)


@dataclass(frozen=True)
class Timing:
    """note: why there is no figure."""

    name: str
    forward: float = 0.0
    backward: float = 0.0
    peak: int = 0
    note: str = ""


def timings(device: torch.device, tiny: bool) -> Iterator[Timing]:
    """All of them; what fails gives its reason, and the others go on."""
    sizes = TINY if tiny else Sizes()
    operations: list[Callable[[Sizes, torch.device], Iterator[Timing]]] = [_attention, _delta_rule]
    for operation in operations:
        try:
            yield from operation(sizes, device)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is this timing's result)
            yield Timing(operation.__name__.strip("_"), note=in_one_line(error))


def _delta_rule(sizes: Sizes, device: torch.device) -> Iterator[Timing]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(sizes.tokens, *shape, generator=generator, device=device)

    keys, values = (sizes.key_heads, sizes.width), (sizes.value_heads, sizes.width)
    inputs = [normal(*shape).bfloat16() for shape in (keys, keys, values)]
    inputs += [-0.3 * normal(sizes.value_heads).exp(), normal(sizes.value_heads).sigmoid()]
    documents = Documents.from_lengths([sizes.tokens], device)

    def on_documents(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: rule(*given, documents)

    what = f"gated delta rule, heads {sizes.key_heads}/{sizes.value_heads} of {sizes.width}"
    yield measure(f"{what}, in torch", on_documents(chunked_gated_delta_rule), inputs, device)
    name = f"{what}, flash-linear-attention"
    if missing := without_flash_linear_attention(device):
        yield Timing(name, note=missing)
    else:
        yield measure(name, on_documents(gated_delta_rule), inputs, device)


def _attention(sizes: Sizes, device: torch.device) -> Iterator[Timing]:
    generator = torch.Generator(device).manual_seed(1)
    shapes = [(sizes.tokens, heads, sizes.width) for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)]
    inputs = [torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes]
    documents, scale = Documents.from_lengths([sizes.tokens], device), sizes.width**-0.5
    what = f"attention, heads {sizes.heads}/{sizes.kv_heads} of {sizes.width}"
    for window in (None, sizes.window):

        def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = window) -> Tensor:
            return causal_attention(q, k, v, documents, scale, window)

        yield measure(f"{what}, {'full' if window is None else f'window {window}'}", attend, inputs, device)


def measure(name: str, run: Callable[..., Tensor], inputs: list[Tensor], device: torch.device) -> Timing:
    leaves = [x.detach().requires_grad_() for x in inputs]
    synchronise(device)
    on_cuda = device.type == "cuda"
    base, forward, backward = torch.cuda.memory_allocated(device) if on_cuda else 0, [], []
    reset_peak_memory(device)
    for number in range(WARMUP + STEPS):
        start = time.perf_counter()
        out = run(*leaves)
        synchronise(device)
        middle = time.perf_counter()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        synchronise(device)
        if number >= WARMUP:
            forward.append(1e3 * (middle - start))
            backward.append(1e3 * (time.perf_counter() - middle))
        del out
    peak = peak_memory_bytes(device) - base if on_cuda else 0
    return Timing(name, statistics.median(forward), statistics.median(backward), peak)


def main(device_name: str, tiny: bool) -> None:
    for timing in timings(choose_device(device_name), tiny):
        print(json.dumps(asdict(timing)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], "tiny" in sys.argv[2:])
