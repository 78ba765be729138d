"""The groups of a model's weights, by which adapters target them and tables list them; without torch."""

from __future__ import annotations

from typing import Literal

Group = Literal[
    "attention",
    "linear_attention",
    "experts",
    "shared_experts",
    "dense_mlp",
    "router",
    "indexer",
    "norm",
    "embedding",
    "head",
]
# In the order of tables, as messages call what is in them.
GROUP_WORDS: dict[Group, str] = {
    "attention": "attention projections",
    "linear_attention": "linear-attention projections",
    "experts": "routed experts' tensors",
    "shared_experts": "shared experts' matrices",
    "dense_mlp": "dense layers' matrices",
    "router": "routers' matrices",
    "indexer": "indexer",
    "norm": "norms",
    "embedding": "embedding",
    "head": "output head",
}
# Those whose matrices LoRA can adapt.
TARGET_GROUPS: tuple[Group, ...] = (
    "attention",
    "linear_attention",
    "experts",
    "shared_experts",
    "dense_mlp",
    "router",
)
