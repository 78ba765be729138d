"""What mixes the tokens of a document, on a device against the CPU: attention, the gated delta rule, convolution.

The references are the definitions: a mask over all pairs of tokens, a loop over tokens. Shapes: N tokens, h heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.gpu_compare import (
    BFLOAT16,
    CPU,
    DTYPES,
    Check,
    Group,
    compare,
    forward_backward,
    random,
    short,
    without_flash_linear_attention,
)
from models.attention.causal import causal_attention
from models.attention.delta_rule import chunked_gated_delta_rule, gated_delta_rule
from models.attention.delta_step import stepwise_gated_delta_rule
from models.attention.indexer import Indexer, IndexerConfig, parts_by_length, selected_attention
from models.attention.short_conv import short_convolution
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from quant.storage import Storage, StorageSpec

LENGTHS = (37, 5, 86)
LONG = (300, 7, 40)  # the first one takes several blocks of queries or of the window
CHUNKED = (150, 7, 40)  # several chunks of the gated delta rule, and two documents that begin inside a chunk
SAME_KEYS = 0.98  # of an indexer in bfloat16: keys that score nearly the same may change places

Run = Callable[[torch.device], Callable[..., Tensor]]  # the function for tensors of a device


def groups() -> list[Group]:
    return [
        ("attention", attention),
        ("sliding window", window_attention),
        ("attention to selected keys", attention_to_selected),
        ("indexer", indexer),
        ("gated delta rule", delta_rule),
        ("short convolution", convolution),
    ]


def masked_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention where token i sees token j if seen [N, N] says so; query [N, h, d], key and value [N, kv_heads, d]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("ihd,jhd->hij", query, key) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, float("-inf")).softmax(-1), value)


def seen_pairs(lengths: Sequence[int], window: int | None = None) -> Tensor:
    """bool [N, N]: j is in the document of i, not after it, and among the last `window` tokens."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    back = torch.arange(len(document))[:, None] - torch.arange(len(document))
    return (document[:, None] == document) & (back >= 0) & (back < (window or len(document)))


def _compared(
    name: str,
    actual: Run,
    expected: Run,
    inputs: Sequence[Tensor],
    upstream: Tensor,
    device: torch.device,
    wide: int = 0,
) -> Iterator[Check]:
    """Output and gradients in float32 and bfloat16. The reference gets the same values in float32, on the CPU.

    wide: how many inputs, the last ones, are float32 whatever the others are.
    """
    for dtype, tolerance in DTYPES:
        dtypes = [dtype] * (len(inputs) - wide) + [torch.float32] * wide
        rounded = [x.to(kind) for x, kind in zip(inputs, dtypes, strict=True)]
        grad = upstream.to(dtype)
        right = forward_backward(expected(CPU), [x.float() for x in rounded], grad.float())
        found = forward_backward(actual(device), [x.to(device) for x in rounded], grad.to(device))
        yield compare(f"{name}, {short(dtype)}", list(zip(found, right, strict=True)), tolerance)


def _attention_inputs(
    tokens: int, heads: int, kv_heads: int, width: int, value_width: int
) -> tuple[list[Tensor], Tensor]:
    shapes = ((tokens, heads, width), (tokens, kv_heads, width), (tokens, kv_heads, value_width))
    inputs = [random(shape, 40 + number) for number, shape in enumerate(shapes)]
    return inputs, random((tokens, heads, value_width), 44)


def attention(device: torch.device) -> Iterator[Check]:
    """On CUDA in half precision, one flash kernel for all documents."""
    seen = seen_pairs(LENGTHS)
    for width, value_width, heads, kv_heads in ((256, 256, 4, 4), (24, 32, 4, 4), (64, 64, 4, 2)):
        scale = width**-0.5

        def ours(on: torch.device, scale: float = scale) -> Callable[..., Tensor]:
            return lambda q, k, v: causal_attention(q, k, v, Documents.from_lengths(LENGTHS, on), scale)

        def masked(on: torch.device, scale: float = scale) -> Callable[..., Tensor]:
            return lambda q, k, v: masked_attention(q, k, v, seen.to(on), scale)

        inputs, upstream = _attention_inputs(sum(LENGTHS), heads, kv_heads, width, value_width)
        name = f"attention in documents, heads {heads}/{kv_heads} of {width}/{value_width}"
        yield from _compared(name, ours, masked, inputs, upstream, device)


def window_attention(device: torch.device) -> Iterator[Check]:
    """The flash kernel's window, and blocks of pairs in float32; a window may be longer than a document."""
    inputs, upstream = _attention_inputs(sum(LONG), 4, 2, 128, 128)
    for window in (16, 64, 1000):

        def ours(on: torch.device, window: int = window) -> Callable[..., Tensor]:
            documents = Documents.from_lengths(LONG, on)
            return lambda q, k, v: causal_attention(q, k, v, documents, 128**-0.5, window)

        def masked(on: torch.device, window: int = window) -> Callable[..., Tensor]:
            return lambda q, k, v: masked_attention(q, k, v, seen_pairs(LONG, window).to(on), 128**-0.5)

        yield from _compared(f"window of {window} tokens", ours, masked, inputs, upstream, device)


def attention_to_selected(device: torch.device) -> Iterator[Check]:
    """Documents of more than topk tokens, whose queries see selected keys, between others."""
    topk, tokens = 24, sum(LONG)
    seen, chosen, start = seen_pairs(LONG), [], 0
    for length in LONG:
        rows = slice(start, start + length)
        if length > topk:
            scores = random((length, length), 45).masked_fill(~seen[rows, rows], float("-inf"))
            picked = scores.topk(topk, dim=-1).indices
            chosen.append(picked.int())
            seen[rows, rows] &= torch.zeros(length, length, dtype=torch.bool).scatter_(-1, picked, True)
        start += length
    selected = torch.cat(chosen)

    def ours(on: torch.device) -> Callable[..., Tensor]:
        parts = parts_by_length(Documents.from_lengths(LONG, on), topk)
        return lambda q, k, v: selected_attention(q, k, v, parts, selected.to(on), 64**-0.5)

    def masked(on: torch.device) -> Callable[..., Tensor]:
        return lambda q, k, v: masked_attention(q, k, v, seen.to(on), 64**-0.5)

    inputs, upstream = _attention_inputs(tokens, 4, 4, 64, 48)
    yield from _compared(f"attention to {topk} selected keys", ours, masked, inputs, upstream, device)


def indexer(device: torch.device) -> Iterator[Check]:
    """Which keys are selected. Many heads, because with few of them scores of exactly zero are common, and which of
    equal ones topk takes is the device's own choice.
    """
    topk, hidden, rank, rope, tokens = 24, 128, 64, 32, sum(LONG)
    config = IndexerConfig(hidden=hidden, query_rank=rank, heads=16, dim=64, rope_dim=rope, topk=topk)
    reference = Indexer(config, Factory(StorageSpec("none"), torch.float32, CPU))
    for number, module in enumerate(reference.modules()):
        if isinstance(module, Storage):
            module.load_dense(random(module.shape, 70 + number).mul_(module.shape[-1] ** -0.5))
    x, latent, angle = random((tokens, hidden), 80), random((tokens, rank), 81), random((tokens, rope // 2), 82)

    def select(on: torch.device, dtype: torch.dtype) -> list[set[int]]:
        documents = Documents.from_lengths(LONG, on)
        module = copy.deepcopy(reference).to(on, dtype)
        tables = (angle.cos().to(on), angle.sin().to(on))
        found = module(x.to(on, dtype), latent.to(on, dtype), parts_by_length(documents, topk), tables).cpu()
        positions = torch.cat([torch.arange(length) for length in LONG if length > topk]).tolist()
        return [
            {key for key in row if key <= position} for row, position in zip(found.tolist(), positions, strict=True)
        ]

    expected = select(CPU, torch.float32)
    total = sum(map(len, expected))
    for dtype, bound in ((torch.float32, 1.0), (torch.bfloat16, SAME_KEYS)):
        found = select(device, dtype)
        same = sum(len(right & ours) for right, ours in zip(expected, found, strict=True)) / total
        name = f"keys that the indexer selects, {short(dtype)}"
        yield Check(name, f"{100 * same:.2f} % the same, of {100 * bound:g} %", same >= bound)


def _delta_rule_inputs(tokens: int, key_heads: int, heads: int, width: int) -> tuple[list[Tensor], Tensor]:
    shapes = ((tokens, key_heads, width), (tokens, key_heads, width), (tokens, heads, width))
    inputs = [random(shape, 84 + number) for number, shape in enumerate(shapes)]
    inputs += [-0.3 * random((tokens, heads), 87).exp(), random((tokens, heads), 88).sigmoid()]
    return inputs, random(shapes[2], 89)


def _rule(function: Callable[..., Tensor]) -> Run:
    def at(on: torch.device) -> Callable[..., Tensor]:
        documents = Documents.from_lengths(CHUNKED, on)
        return lambda *inputs: function(*inputs, documents)

    return at


def delta_rule(device: torch.device) -> Iterator[Check]:
    for key_heads, heads, width in ((2, 4, 32), (1, 2, 128)):
        inputs, upstream = _delta_rule_inputs(sum(CHUNKED), key_heads, heads, width)
        name = f"gated delta rule in torch against token by token, heads {key_heads}/{heads} of {width}"
        ours, steps = _rule(chunked_gated_delta_rule), _rule(stepwise_gated_delta_rule)
        yield from _compared(name, ours, steps, inputs, upstream, device, wide=2)


def flash_linear_attention(device: torch.device) -> Iterator[Check]:
    """The kernels that `gated_delta_rule` takes on CUDA in half precision."""
    name = "gated delta rule in flash-linear-attention against token by token, bfloat16"
    if missing := without_flash_linear_attention(device):
        yield Check(name, f"flash-linear-attention: {missing}", None)
        return
    for key_heads, heads, width in ((2, 4, 64), (1, 2, 128)):
        inputs, upstream = _delta_rule_inputs(sum(CHUNKED), key_heads, heads, width)
        half = [x.bfloat16() for x in inputs[:3]] + inputs[3:]
        right = forward_backward(_rule(stepwise_gated_delta_rule)(CPU), [x.float() for x in half], upstream.bfloat16())
        found = forward_backward(_rule(gated_delta_rule)(device), [x.to(device) for x in half], upstream.bfloat16())
        pairs = list(zip(found, right, strict=True))
        yield compare(f"{name}, heads {key_heads}/{heads} of {width}", pairs, BFLOAT16)


def convolution(device: torch.device) -> Iterator[Check]:
    """More tokens than are computed at a time. The reference goes tap by tap, document by document."""
    lengths, channels, width = (70, 2, 4500, 129), 64, 4

    def ours(on: torch.device) -> Callable[..., Tensor]:
        return lambda x, weight: short_convolution(x, weight, Documents.from_lengths(lengths, on))

    def plain(on: torch.device) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor) -> Tensor:
            padded = [torch.nn.functional.pad(piece, (0, 0, width - 1, 0)).t()[None] for piece in x.split(lengths)]
            filters = weight[:, None]
            found = [torch.nn.functional.conv1d(piece, filters, groups=channels)[0].t() for piece in padded]
            return torch.nn.functional.silu(torch.cat(found))

        return run

    inputs = [random((sum(lengths), channels), 90), random((channels, width), 91).mul_(width**-0.5)]
    yield from _compared("short convolution", ours, plain, inputs, random((sum(lengths), channels), 92), device)
