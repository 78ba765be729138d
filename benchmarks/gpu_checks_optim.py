"""Three steps of every optimiser on a device, with the same gradients as float32 AdamW on the CPU.

The gradients are recorded once, at the first weights: where other moments lead to other weights, and these to other
gradients, nothing could be said about how far two runs may part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from benchmarks.gpu_checks_models import NF4, batch_loss, tiny_model
from benchmarks.gpu_compare import CPU, Check, compare
from models.adapters.lora import trainable_parameters
from quant.common.errors import NibbleError
from train.optim import build_optimizer, clip_gradients

LEARNING_RATE, BETAS, EPS = 1e-3, (0.9, 0.999), 1e-8
BLOCK = 256  # values that share a scale in an 8-bit moment
MIN_8BIT_SIZE = 4096  # tensors of fewer values have float32 moments
# Of the scale: on the CPU bitsandbytes finds a code by a table of 65536 places in [-1, 1]. Its CUDA kernel searches the
# codes themselves, but goes on to the next one where a tiny value would lose its sign, which is less far.
GRID = 1 / 65535
# Of the learning rate, per step: CUDA's fast power is wrong by up to 4e-7, which is 4e-4 of 1 - 0.999; the rest is the
# weight's own rounding and the order in which the norm is summed.
ROUNDING = 1e-3


def optimisers(device: torch.device) -> Iterator[Check]:
    """How far the weights moved; for 8-bit moments, value by value within what their rounding allows."""
    weights, gradients = recorded()
    expected, clipped = moved("adamw", weights, gradients, CPU)
    bounds = [bound_8bit(each, LEARNING_RATE) for each in clipped]
    for name in ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"):
        label = f"three steps of {name}"
        try:
            actual, _ = moved(name, weights, gradients, device)
        except NibbleError as error:
            yield Check(label, str(error).splitlines()[0], None)
            continue
        if name.endswith("8bit"):
            yield within(label, actual, expected, bounds)
        else:
            yield compare(label, list(zip(actual, expected, strict=True)), ROUNDING)
    half = [[x.bfloat16() for x in tensors] for tensors in (weights, *gradients)]
    found, _ = moved("adamw_8bit", half[0], half[1:], device)
    finite = all(bool(tensor.isfinite().all()) and bool(tensor.any()) for tensor in found)
    yield Check("three steps of adamw_8bit on bfloat16 LoRA", "all finite, all moved" if finite else "not", finite)


def recorded() -> tuple[list[Tensor], list[list[Tensor]]]:
    """LoRA's weights, and their gradients for three batches, on the CPU in float32."""
    model = tiny_model("glm4_moe_lite", NF4, torch.float32, CPU)
    parameters = [parameter for _, parameter in trainable_parameters(model)]
    gradients = [list(torch.autograd.grad(batch_loss(model, CPU, seed), parameters)) for seed in (60, 61, 62)]
    return [parameter.detach() for parameter in parameters], gradients


def moved(
    name: str,
    weights: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
    device: torch.device,
    learning_rate: float = LEARNING_RATE,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """By how much each tensor changed; and, for each tensor, its gradients as they were after clipping."""
    named = [(str(number), nn.Parameter(x.to(device, copy=True))) for number, x in enumerate(weights)]
    optimizer = build_optimizer(name, named, learning_rate, BETAS, EPS)
    clipped: list[list[Tensor]] = [[] for _ in named]
    for step, each in enumerate(gradients):
        for (_, parameter), gradient in zip(named, each, strict=True):
            parameter.grad = gradient.to(device, copy=True)
        clip_gradients(named, 1.0, step)
        for (_, parameter), kept in zip(named, clipped, strict=True):
            assert parameter.grad is not None
            kept.append(parameter.grad.detach().clone())
        optimizer.step()
    return [parameter.detach().to(CPU) - x for (_, parameter), x in zip(named, weights, strict=True)], clipped


def bound_8bit(gradients: Sequence[Tensor], learning_rate: float) -> Tensor:
    """float64 of a gradient's shape: how far AdamW with 8-bit moments may be from float32 AdamW after these steps.

    Each step takes the stored moments m and v, makes them m ← β₁m + (1-β₁)g and v ← β₂v + (1-β₂)g², moves the weight by
    lr · m/(1-β₁ᵗ) / (√(v/(1-β₂ᵗ)) + ε), and only then rounds them: the first step is exact. An error that a moment
    has is multiplied by β, and rounding adds its own (`_rounding`). The movement is monotone in m and in v, so that its
    furthest values are at the corners of what m and v may be; v, however, never is below (1-β₂)g².
    """
    shape, small = gradients[0].shape, gradients[0].numel() < MIN_8BIT_SIZE
    m, v, m_error, v_error, bound = (torch.zeros(gradients[0].numel(), dtype=torch.float64) for _ in range(5))
    for step, gradient in enumerate(gradients, 1):
        g = gradient.double().flatten()
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        m_error, v_error = BETAS[0] * m_error, BETAS[1] * v_error
        exact = _movement(m, v, step)
        least = torch.maximum(v - v_error, (1 - BETAS[1]) * g * g)
        corners = [_movement(m + way * m_error, w, step) for way in (-1, 1) for w in (least, v + v_error)]
        worst = torch.stack([(corner - exact).abs() for corner in corners]).amax(0)
        bound += learning_rate * (worst + ROUNDING)
        if not small:
            m_error = m_error + _rounding(m, m_error, signed=True)
            v_error = v_error + _rounding(v, v_error, signed=False)
    return bound.view(shape)


def _movement(m: Tensor, v: Tensor, step: int) -> Tensor:
    """In learning rates."""
    return m / (1 - BETAS[0] ** step) / ((v / (1 - BETAS[1] ** step)).sqrt() + EPS)


def _rounding(x: Tensor, error: Tensor, signed: bool) -> Tensor:
    """How far 8 bits may take x ± error, flat: half the gap between the neighbouring codes, times the block's scale.

    The gaps widen with the value, so the widest one up to the largest that the value may be is taken.
    """
    from bitsandbytes.functional import create_dynamic_map

    code = create_dynamic_map(signed=signed).double()
    code = code[code >= 0]
    gaps = code.diff().cummax(0).values
    blocks = torch.nn.functional.pad(torch.stack((x.abs() - error, x.abs() + error)), (0, -len(x) % BLOCK))
    low, high = blocks.view(2, -1, BLOCK).amax(-1).repeat_interleave(BLOCK, 1)[:, : len(x)].clamp(min=1e-38)
    furthest = ((x.abs() + error) / low + GRID).clamp(max=1)
    gap = gaps[torch.searchsorted(code[1:], furthest).clamp(max=len(gaps) - 1)]
    return high * (gap / 2 + GRID)


def within(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor], bounds: Sequence[Tensor]) -> Check:
    """Every value's distance from what is expected as a share of its own bound."""
    shares = [((x.double() - y).abs() / bound).flatten() for x, y, bound in zip(actual, expected, bounds, strict=True)]
    share = torch.cat(shares).max().item()
    usual = torch.cat([bound.flatten() for bound in bounds]).median().item()
    return Check(name, f"{share:.2f} of what rounding allows ({usual:.0e} for most values)", share <= 1)
