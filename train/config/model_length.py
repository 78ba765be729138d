"""What the model's config.json says about data.sequence_length."""

from __future__ import annotations

from typing import Any

from models.blocks.configjson import rope_entries, text_section
from quant.common.errors import NibbleError
from quant.common.jsonfile import integer, number


def check_length(length: int, config: dict[str, Any], where: str) -> None:
    """Raises NibbleError where sequences of `length` tokens are longer than a config.json says. where: names it."""
    text = text_section(config, where)
    if text.get("max_position_embeddings") is None:
        return
    limit, scaling = integer(text, "max_position_embeddings", 0, where, most=2**40), rope_entries(text, where)
    stretched = number(scaling, "original_max_position_embeddings", limit, where)
    if "original_max_position_embeddings" in scaling:  # YaRN by hand, which often leaves max_position_embeddings alone
        stretched *= number(scaling, "factor", 1.0, where)
    if length <= max(limit, stretched):
        return
    raise NibbleError(
        f"data.sequence_length: {length} is more than the model is made for: max_position_embeddings is {limit} in "
        f"{where}.\nSet data.sequence_length to {limit} or less."
    )
