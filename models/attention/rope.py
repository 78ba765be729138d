"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with YaRN (Peng et al. 2023, arXiv:2309.00071)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.blocks.configjson import rope_entries
from models.blocks.norm import RMSNorm
from models.kernels.rotary import rotated_heads, rotated_query, usable
from quant.common.errors import NibbleError
from quant.common.jsonfile import flag, number, text
from quant.common.words import shown

MAX_DIMENSIONS = 2**16  # of a head


@dataclass(frozen=True)
class RopeConfig:
    """`frequencies`: float32 [rotary/2] on the host, radians per position of each pair of dimensions.

    `magnitude` scales cosines and sines (YaRN's attention factor); `score_scale` multiplies the softmax scale
    (the square of YaRN's mscale over all dimensions, as DeepSeek-V2 applies it; 1 otherwise).
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0
    score_scale: float = 1.0

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [N, rotary/2], for positions int64 [N]."""
        angles = positions[:, None].to(torch.float32) * _on_device(self.frequencies, positions.device)
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude


@functools.lru_cache(maxsize=64)
def _on_device(frequencies: tuple[float, ...], device: torch.device) -> Tensor:
    """float32, made once: a copy from the host in every pass would wait for the device."""
    return torch.tensor(frequencies, dtype=torch.float32, device=device)


def partial_rotary_factor(config: dict[str, Any], where: str, default: float = 1.0) -> float:
    """The share of a head's dimensions that is rotated, in either spelling, or `default` where the file doesn't say."""
    given = rope_entries(config, where)
    return number(given if "partial_rotary_factor" in given else config, "partial_rotary_factor", default, where)


def rotary_dimensions(config: dict[str, Any], head_dim: int, default: float, where: str) -> int:
    """How many of a head's dimensions partial_rotary_factor rotates."""
    share = partial_rotary_factor(config, where, default)
    if share > 1:
        raise NibbleError(f"{where}: partial_rotary_factor is {share}; it is a share of a head, at most 1.")
    return int(head_dim * share)


def parse_rope(config: dict[str, Any], dim: int, where: str) -> RopeConfig:
    """Reads either spelling of config.json: `rope_parameters` (5.x) or `rope_theta` with `rope_scaling` (4.x).

    dim: rotary dimensions of a head. Raises NibbleError for a rope type that isn't known, and for values that can't be
    computed with.
    """
    given = rope_entries(config, where)
    if dim > MAX_DIMENSIONS:
        raise NibbleError(
            f"{where}: {dim:,} rotary dimensions of a head; at most {MAX_DIMENSIONS:,} are computed with."
        )
    if dim % 2:
        raise NibbleError(f"{where}: {dim} rotary dimensions of a head can't be paired; the number must be even.")
    kind = text(given, "rope_type" if "rope_type" in given else "type", "default", where)
    theta = number(given if "rope_theta" in given else config, "rope_theta", 10000.0, where)
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if kind == "default":
        return RopeConfig(tuple((1.0 / powers).tolist()))
    if kind == "yarn":
        return _yarn(given, config, theta, powers, dim, where)
    raise NibbleError(
        f"{where}: rope_type {shown(kind)} is not supported; 'default' and 'yarn' are.\n"
        "A checkpoint that was trained with another scaling would be computed wrongly, so it is refused."
    )


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn(
    given: dict[str, Any], config: dict[str, Any], theta: float, powers: Tensor, dim: int, where: str
) -> RopeConfig:
    """Slow pairs are interpolated by `factor`, fast ones are left alone, with a linear ramp in between (§3.2)."""
    longest = number(config, "max_position_embeddings", 202752, where)
    spelled = config if config.get("original_max_position_embeddings") is not None else given
    trained = number(spelled, "original_max_position_embeddings", longest, where)
    factor = number(given, "factor", longest / trained, where)

    def pair_with(rotations: float) -> float:
        """The (fractional) index of the pair that turns `rotations` times within the trained context."""
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    if theta == 1:
        raise NibbleError(f"{where}: rope_theta is 1, so that all dimensions turn alike; YaRN can't tell them apart.")
    low = pair_with(number(given, "beta_fast", 32, where))
    high = pair_with(number(given, "beta_slow", 1, where))
    if flag(given, "truncate", True, where):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = (1.0 / (factor * powers)) * (1 - kept) + (1.0 / powers) * kept

    weight_all = number(given, "mscale_all_dim", 1.0, where)
    magnitude = _mscale(factor)
    if "mscale" in given and "mscale_all_dim" in given:
        magnitude = _mscale(factor, number(given, "mscale", 1.0, where)) / _mscale(factor, weight_all)
    magnitude = number(given, "attention_factor", magnitude, where)
    score_scale = _mscale(factor, weight_all) ** 2 if "mscale_all_dim" in given else 1.0
    return RopeConfig(tuple(frequencies.tolist()), magnitude, score_scale)


def rotate_first(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Partial rotary embedding: rotates as many of the first dimensions of x [N, heads, d] as the tables are for."""
    rotary = 2 * tables[0].shape[-1]
    if rotary == x.shape[-1]:
        return rotate(x, tables, interleaved=False)
    return torch.cat((rotate(x[..., :rotary], tables, interleaved=False), x[..., rotary:]), dim=-1)


def rotate_last(x: Tensor, tables: tuple[Tensor, Tensor], *, interleaved: bool) -> Tensor:
    """Rotates as many of the last dimensions of x [N, heads, d] as the tables are for; see `rotate`."""
    if usable(x.device):
        return rotated_query(x, tables, last=True, interleaved=interleaved)
    rotary = 2 * tables[0].shape[-1]
    rest, turned = x.split((x.shape[-1] - rotary, rotary), dim=-1)
    return torch.cat((rest, rotate(turned, tables, interleaved=interleaved)), dim=-1)


def normed_and_rotated(
    query: Tensor, key: Tensor, norms: tuple[RMSNorm, RMSNorm] | None, tables: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """query [N, h, d] and key [N, h', d], each head normed where there are norms, alike but for their weights, and its
    first dimensions rotated where there are tables."""
    fused = usable(query.device)
    if norms is not None and not (fused and not any(norm.weight.requires_grad for norm in norms)):
        query, key = norms[0](query), norms[1](key)
        norms = None
    if fused and (norms is not None or tables is not None):
        weights = (norms[0].weight, norms[1].weight) if norms is not None else None
        eps, offset = (norms[0].eps, norms[0].offset) if norms is not None else (0.0, 0.0)
        return rotated_heads(query, key, weights, eps, offset, tables)
    if tables is not None:
        query, key = rotate_first(query, tables), rotate_first(key, tables)
    return query, key


def rotate(x: Tensor, tables: tuple[Tensor, Tensor], *, interleaved: bool) -> Tensor:
    """Rotates pairs of dimensions of x [N, heads, rotary] by the angles of its position; same dtype, in float32.

    interleaved: pairs are (0, 1), (2, 3) … as in GLM's latent attention; otherwise (0, d/2), (1, d/2 + 1) … The
    result always holds the first members of all pairs, then the second ones: scores do not depend on the order of
    dimensions as long as queries and keys share it.
    """
    cos, sin = (table[:, None] for table in tables)
    wide = x.to(torch.float32)
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
