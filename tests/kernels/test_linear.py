"""Linear layers whose dense weights and LoRA are made in one launch = torch's own operations: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.blocks import linear
from models.blocks.factory import Factory
from models.blocks.linear import Linear, LoRA, keeping_dense, room, together
from models.blocks.norm import RMSNorm
from quant.kernels.choice import KERNELS, using
from quant.storage import Kind, StorageSpec
from tests.helpers import assert_close


def made(ranks: tuple[int, ...], storage: Kind = "nf4") -> tuple[RMSNorm, list[Linear]]:
    """A norm, and layers of its output; rank 0: without LoRA."""
    factory = Factory(StorageSpec(storage), torch.float32, "cpu")
    layers = [Linear(128, out, factory) for out in (72, 20, 9)[: len(ranks)]]
    generator = torch.Generator().manual_seed(0)
    for layer, rank in zip(layers, ranks, strict=True):
        layer.requires_grad_(False)
        layer.weight.load_dense(0.2 * torch.randn(layer.weight.shape, generator=generator))
        if rank:
            layer.lora = LoRA(layer.weight.shape, rank, alpha=1.5 * rank)
            nn.init.normal_(layer.lora.B, generator=generator)
    return RMSNorm(128, 1e-5, factory).requires_grad_(False), layers


def in_torch(x: Tensor, layer: Linear) -> Tensor:
    y = x @ layer.weight.dense().t()
    return y if layer.lora is None else y + layer.lora.scaling * (x @ layer.lora.A.t()) @ layer.lora.B.t()


@pytest.mark.parametrize("ranks", [(8,), (8, 0, 16), (3, 4)], ids=str)
@pytest.mark.parametrize("way", ["made again", "kept", "x needs no gradient"])
@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_together(ranks: tuple[int, ...], way: str, storage: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, layers = made(ranks, storage)
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(1), requires_grad=way != "x needs no gradient")
    inputs = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)][not x.requires_grad :]

    def gradients(outputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((y.square() * (i + 1)).sum() for i, y in enumerate(outputs)), inputs)  # type: ignore[arg-type]

    right = [in_torch(norm(x), layer) for layer in layers]
    assert room(*layers) == 0
    with using(KERNELS):
        columns = room(*layers)
        assert columns == {(8,): 8, (8, 0, 16): 24}.get(ranks, 0)
        monkeypatch.setattr(linear, "on_cpu", lambda device: False)
        if columns or way == "kept":
            monkeypatch.setattr(type(layers[0].weight), "dense", None)  # all are made dense in one launch
        normed = norm(x, columns)
        assert normed.shape == (7, 128 + columns)
        if way == "kept":
            with keeping_dense():
                given = list(together(normed, *layers))
            monkeypatch.setattr("models.blocks.linear.dense_together", None)  # nothing is made dense again
        else:
            given = list(together(normed, *layers))
        ours = gradients(given)
    monkeypatch.undo()
    for one, other in zip((*given, *ours), (*right, *gradients(right)), strict=True):
        assert_close(one, other, 2e-6)


def test_int8_of_other_widths_is_multiplied_apart() -> None:
    """Than multiples of 64, which 4 bits always have."""
    layer = Linear(72, 20, Factory(StorageSpec("int8"), torch.float32, "cpu"))
    layer.weight.load_dense(torch.randn(20, 72, generator=torch.Generator().manual_seed(0)))
    layer.lora = LoRA(layer.weight.shape, 8, alpha=8)
    nn.init.normal_(layer.lora.B, generator=torch.Generator().manual_seed(1))
    x = torch.randn(7, 72, generator=torch.Generator().manual_seed(2))
    with using(KERNELS):
        assert room(layer) == 0
        assert_close(layer(x), in_torch(x, layer), 2e-6)


def test_untrained_lora_adds_nothing_to_the_base() -> None:
    norm, layers = made((8, 16))
    for layer in layers:
        nn.init.zeros_(layer.lora.B)  # type: ignore[union-attr]
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(1))
    with using(KERNELS):
        given = together(norm(x, room(*layers)), *layers)
        for layer in layers:
            layer.lora = None
        base = together(norm(x), *layers)
    for one, other in zip(given, base, strict=True):
        assert_close(one, other, 1e-6)


def test_room_of_others_is_left_alone() -> None:
    norm, layers = made((8, 16))
    with using(KERNELS):
        wide = norm(torch.randn(7, 128), room(*layers))
        kept = wide.clone()
        alone = layers[0](wide)
        assert torch.equal(wide[:, 128:], kept[:, 128:])
        assert_close(alone, in_torch(wide[:, :128], layers[0]), 2e-6)
