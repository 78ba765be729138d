"""What a hub config.json says in the same way for several architectures. Single values: quant/common/jsonfile.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quant.common.errors import NibbleError
from quant.common.jsonfile import mapping
from quant.common.words import shown

MAX_LAYERS = 1000  # beyond any model; a number out of a file is believed only so far before its weights are looked at


def text_section(config: dict[str, Any], where: str) -> dict[str, Any]:
    """What describes the text model: the section of its own that a vision-language model's file has, or all of it."""
    return config if config.get("text_config") is None else mapping(config, "text_config", where)


def rope_entries(config: dict[str, Any], where: str) -> dict[str, Any]:
    """rope_parameters, or rope_scaling, which transformers takes where a file has both; those that are given.

    Zero and null say there that an entry is absent.
    """
    scaling, parameters = (mapping(config, key, where) for key in ("rope_scaling", "rope_parameters"))
    return {key: value for key, value in (scaling or parameters).items() if value is False or value not in (None, 0)}


def choices(
    config: dict[str, Any], key: str, default: Sequence[str], allowed: Sequence[str], where: str
) -> tuple[str, ...]:
    """`key` as a list of one of `allowed` per layer, or `default`, which has the right length, where it is absent."""
    value = config.get(key)
    if value is None:
        return tuple(default)
    if not isinstance(value, list) or not set(allowed).issuperset(map(str, value)):
        wanted = " and ".join(map(repr, allowed))
        raise NibbleError(f"{where}: {key} must be a list of {wanted}, got {shown(value)}.")
    if len(value) != len(default):
        raise NibbleError(
            f"{where}: {key} names {len(value)} layers, num_hidden_layers is {len(default)}; make them agree."
        )
    return tuple(value)


# Keys of config.json files, of these architectures or of their relatives, that change what a model computes and that
# nothing here reads; with the one value that leaves the arithmetic as it is here.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "mlp_bias": False,
    "clip_qkv": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "moe_layer_freq": 1,
    "num_zero_experts": 0,
    "swiglu_limit": None,
}


def refuse_unread(config: dict[str, Any], where: str, **only: Any) -> None:
    """Raises NibbleError for a key that changes what the model computes and has another value than the one that is
    computed. only: such keys of an architecture, with that value. A null stands for an absent key.
    """
    for key, value in {**_ONLY, **only}.items():
        given = config.get(key)
        # Of JSON's true and 1 only one is a number.
        if given is not None and (given != value or isinstance(given, bool) != isinstance(value, bool)):
            raise NibbleError(
                f"{where}: {key} is {shown(given)}; only {value!r} is implemented, and another value would compute "
                "something else than the weights were trained for."
            )
