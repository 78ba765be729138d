"""What the model's config.json says about data.sequence_length."""

from __future__ import annotations

from typing import Any

from models.blocks.configjson import text_section
from quant.common.errors import NibbleError


def check_length(length: int, config: dict[str, Any], where: str) -> None:
    """Raises NibbleError where sequences of `length` tokens are longer than a config.json says. where: names it."""
    text = text_section(config)
    limit = text.get("max_position_embeddings")
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    factor, trained = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if not isinstance(limit, int) or length <= limit:
        return
    if isinstance(factor, int | float) and isinstance(trained, int) and factor * trained >= length:
        return  # yarn switched on by hand: max_position_embeddings is often left as it was
    raise NibbleError(
        f"data.sequence_length: {length} is more than the model is made for: max_position_embeddings is {limit} in "
        f"{where}.\nSet data.sequence_length to {limit} or less."
    )
