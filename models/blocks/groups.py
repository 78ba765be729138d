"""The groups of a model's weights, by which adapters target them and tables list them.

Without torch: a config is checked against these names before torch is imported.
"""

from __future__ import annotations

from typing import Literal, get_args

TargetGroup = Literal["attention", "linear_attention", "experts", "shared_experts", "dense_mlp", "router"]
Group = Literal[TargetGroup, "indexer", "norm", "embedding", "head"]
# The groups whose matrices LoRA can adapt, in the order in which tables show them.
TARGET_GROUPS: tuple[Group, ...] = get_args(TargetGroup)
# All groups in the order of tables, as messages call what is in them.
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
