"""What the model's config.json says about data.sequence_length."""

from __future__ import annotations

from typing import Any

from models.blocks.configjson import rope_entries, text_section
from quant.common.errors import NibbleError
from quant.common.jsonfile import integer, number


def longest_context(config: dict[str, Any], where: str) -> int | None:
    """The tokens that a model's config.json says it is made for; None where it doesn't. where: names the file."""
    text = text_section(config, where)
    if text.get("max_position_embeddings") is None:
        return None
    limit, scaling = integer(text, "max_position_embeddings", 0, where, most=2**40), rope_entries(text, where)
    if "original_max_position_embeddings" not in scaling:
        return limit
    # YaRN by hand, which often leaves max_position_embeddings alone.
    trained, factor = (number(scaling, key, 1, where) for key in ("original_max_position_embeddings", "factor"))
    return max(limit, int(trained * factor))


def check_length(length: int, config: dict[str, Any], where: str) -> None:
    """Raises NibbleError where sequences of `length` tokens are longer than that."""
    limit = longest_context(config, where)
    if limit is not None and length > limit:
        raise NibbleError(
            f"data.sequence_length: {length} is more than the model is made for: max_position_embeddings is {limit} in "
            f"{where}.\nSet data.sequence_length to {limit} or less."
        )
