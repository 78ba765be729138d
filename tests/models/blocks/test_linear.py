"""Linear layers of one input, computed together = torch's own operations: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.blocks import linear
from models.blocks.factory import Factory
from models.blocks.linear import Linear, LoRA, keeping_dense, together
from quant.storage import StorageSpec
from tests.helpers import assert_close


def made(kind: str) -> list[Linear]:
    """Without LoRA; with LoRA of two ranks and scales; none of them but int8's and nf4's without a bias."""
    factory = Factory(StorageSpec(kind), torch.float32, "cpu")  # type: ignore[arg-type]
    layers = [Linear(64, out, factory, bias=kind == "none") for out in (8, 20, 12)]
    generator = torch.Generator().manual_seed(0)
    for index, layer in enumerate(layers):
        layer.weight.load_dense(0.2 * torch.randn(layer.weight.shape, generator=generator))
        if index:
            layer.lora = LoRA(layer.weight.shape, rank=3 * index, alpha=4.0)
            torch.nn.init.normal_(layer.lora.B, generator=generator)
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias, generator=generator)
    if kind == "none":
        layers[1].requires_grad_(True)
        layers[2].lora.A.requires_grad_(False)  # type: ignore[union-attr]
    return layers


def in_torch(x: Tensor, layer: Linear) -> Tensor:
    dense = layer.weight.value if layer.weight.kind == "none" else layer.weight.dense()
    y = torch.nn.functional.linear(x, dense, layer.bias)  # type: ignore[arg-type]
    return y if layer.lora is None else y + layer.lora.scaling * (x @ layer.lora.A.t()) @ layer.lora.B.t()


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
@pytest.mark.parametrize("way", ["cpu", "accelerator", "kept"])
def test_together(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's way, an accelerator's, and with dense weights kept from one pass to the other."""
    if way == "accelerator":
        monkeypatch.setattr(linear, "on_cpu", lambda device: False)
    layers = made(kind)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    inputs = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    assert len(inputs) == {"none": 8, "nf4": 5, "int8": 5}[kind]

    def gradients(outputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum((y.square() * (i + 1)).sum() for i, y in enumerate(outputs)), inputs)  # type: ignore[arg-type]

    right = [in_torch(x, layer) for layer in layers]
    if way == "kept":
        with keeping_dense():
            given = list(together(x, *layers))
        monkeypatch.setattr(type(layers[0].weight), "dense", None)  # nothing is made dense again
    else:
        given = list(together(x, *layers))
    ours = gradients(given)
    for one, other in zip((*given, *ours), (*right, *gradients(right)), strict=True):
        assert_close(one, other, 2e-6)
