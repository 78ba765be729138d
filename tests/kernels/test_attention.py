"""Attention layers with their kernels = in torch's operations: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.attention.gqa import GroupedQueryAttention, GroupedQueryAttentionConfig
from models.attention.mla import LatentAttention, LatentAttentionConfig
from models.attention.rope import RopeConfig
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.norm import RMSNorm, ZeroCentredRMSNorm
from quant.kernels.choice import KERNELS, using
from quant.storage import StorageSpec
from tests.helpers import assert_close

FACTORY = Factory(StorageSpec("none"), torch.float32, "cpu")


def check(layer: nn.Module, rotary: int, lengths: list[int], train_norms: bool, tables: bool = True) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, 0.5 if "norm" in name else 0.0, 0.2, generator=generator)
        parameter.requires_grad_(train_norms or "norm" not in name)
    documents = Documents.from_lengths(lengths)
    rope = RopeConfig(tuple(1.0 / (i + 1) for i in range(rotary // 2)), magnitude=1.1)
    x = torch.randn(sum(lengths), 24, generator=generator, requires_grad=True)
    places = rope.tables(documents.positions) if tables else None
    inputs: list[Tensor] = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]

    def results() -> list[Tensor]:
        out = layer(x, documents, places)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    right = results()
    with using(KERNELS):
        given = results()
    assert_close(given[0], right[0])
    # A token that sees only itself gives queries and keys no gradient but round-off.
    scales = [theirs.abs().max() for theirs in right[1:]]
    least = max(scales) * (1e-3 if max(lengths) > 1 else 1.0)
    for number, (ours, theirs, scale) in enumerate(zip(given[1:], right[1:], scales, strict=True)):
        assert (ours - theirs).abs().max() <= 1e-5 * max(scale, least), number


@pytest.mark.parametrize("train_norms", [False, True])
@pytest.mark.parametrize("lengths", [[5, 2], [1]], ids=str)
@pytest.mark.parametrize(
    ("options", "rotary"),
    [
        ({}, 20),
        ({"norms": True}, 20),
        ({"norms": True, "gate": "gate_proj"}, 0),
        ({"norms": True, "gate": "q_proj"}, 8),
    ],
    ids=str,
)
def test_grouped_query_attention(options: dict[str, Any], rotary: int, lengths: list[int], train_norms: bool) -> None:
    """All of a head rotated, normed, not rotated at all, and a part of it."""
    config = GroupedQueryAttentionConfig(24, heads=6, kv_heads=2, head_dim=20, bias=True, **options)
    kind = ZeroCentredRMSNorm if config.gate == "q_proj" else RMSNorm
    layer = GroupedQueryAttention(config, FACTORY, norm=lambda size: kind(size, 1e-5, FACTORY))
    check(layer, rotary, lengths, train_norms, tables=rotary > 0)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("query_rank", "value_dim", "lengths"), [(12, 20, [5, 2]), (None, 12, [1])], ids=str)
def test_latent_attention(interleaved: bool, query_rank: int | None, value_dim: int, lengths: list[int]) -> None:
    config = LatentAttentionConfig(
        hidden=24, heads=3, query_rank=query_rank, latent_rank=16, nope_dim=14, rope_dim=6, value_dim=value_dim,
        bias=True, interleaved=interleaved, scale=0.3,
    )  # fmt: skip
    check(LatentAttention(config, FACTORY), 6, lengths, train_norms=True)
