"""Experts that several processes own between them against the block of one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.blocks.factory import Factory
from models.blocks.linear import LoRA
from models.experts.block import Experts
from parallel.exchange import ExpertExchange
from quant.storage import StorageSpec
from tests.processes import run_processes

EXPERTS, HIDDEN, WIDTH, RANK = 6, 64, 128, 4


def make_block(kind: str, device: str) -> Experts:
    block = Experts(
        EXPERTS, HIDDEN, WIDTH, Factory(StorageSpec(kind), torch.float32, device)  # type: ignore[arg-type]
    )  # fmt: skip
    for projection in (block.gate_up_proj, block.down_proj):
        projection.lora = LoRA(projection.weight.shape, RANK, alpha=1.0, device=device)
    return block


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_own_keeps_some_of_the_experts(kind: str) -> None:
    block, before = make_block(kind, "meta"), make_block(kind, "meta")
    assert block.owned == range(EXPERTS)
    assert block.down_proj.lora is not None
    block.down_proj.lora.A.requires_grad_(False)
    if kind == "none":
        block.gate_up_proj.weight.get_parameter("value").requires_grad_(True)
    trained = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    block.gate_up_proj.weight.name = "a name"
    block.own(range(2, 5))
    assert (block.owned, block.experts) == (range(2, 5), 3)
    assert block.gate_up_proj.weight.shape == (3, 2 * WIDTH, HIDDEN)
    assert block.gate_up_proj.weight.name == "a name"
    whole = dict(before.named_parameters())
    parts = dict(block.named_parameters())
    assert parts.keys() == whole.keys()
    for name, part in parts.items():
        assert part.shape == (3, *whole[name].shape[1:]), name
        assert (part.dtype, part.is_meta) == (whole[name].dtype, True), name
        assert part.requires_grad == trained[name], name


def test_own_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="weight has values already"):
        make_block("nf4", "cpu").own(range(3))
    for owned in (range(4, 8), range(3, 3), range(0, 6, 2)):
        with pytest.raises(ValueError, match="there are 6"):
            make_block("nf4", "meta").own(owned)


def test_experts_must_be_dealt_out_evenly() -> None:
    group: Any = SimpleNamespace(size=lambda: 4)
    with pytest.raises(ValueError, match="6 experts can't be distributed evenly over 4 processes"):
        ExpertExchange(group, 6)


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_a_block_without_rows(kind: str) -> None:
    block = make_block(kind, "cpu")
    for tensor in block.parameters():
        tensor.data.zero_()
    x = torch.zeros(0, HIDDEN, requires_grad=True)
    weights = torch.zeros(0, 2, requires_grad=True)
    out = block(x, torch.zeros(0, 2, dtype=torch.int64), weights)
    assert out.shape == (0, HIDDEN)
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weights.grad is not None and weights.grad.shape == weights.shape
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)


def check(size: int, blocks: dict[str, dict[str, Any]], models: dict[str, dict[str, Any]]) -> None:
    """float32: within 1e-5 of one process. bfloat16: results travel rounded, two roundings of 2⁻⁹ more."""
    for rank, results in enumerate(run_processes(size, "tests.dist_workers.exchange:compare_all", blocks, models)):
        assert results.keys() == blocks.keys() | models.keys()
        for case, errors in results.items():
            tolerance = 1e-2 if case in blocks and blocks[case].get("dtype") == "bfloat16" else 1e-5
            assert len(errors) >= (5 if case in blocks else 60), errors
            for what, error in errors.items():
                assert error <= tolerance, f"rank {rank}, {case}, {what}: relative error {error:.2e}"


def test_two_processes() -> None:
    tokens = [13, 29]
    blocks: dict[str, dict[str, Any]] = {
        "uneven loads": {"kind": "nf4", "load": "uneven", "chosen": 4, "tokens": tokens},
        "nothing for one process": {"kind": "int8", "load": "one process", "chosen": 2, "tokens": tokens},
        "one expert": {"kind": "none", "trained": True, "load": "one expert", "chosen": 1, "tokens": tokens},
        "no tokens in one process": {"kind": "nf4", "load": "uneven", "chosen": 2, "tokens": [0, 29]},
        "no tokens at the owner": {"kind": "nf4", "load": "one process", "chosen": 1, "tokens": [0, 29]},
        "first layer": {"kind": "nf4", "load": "uneven", "chosen": 2, "tokens": tokens, "x": False},
        "frozen router": {"kind": "none", "load": "uneven", "chosen": 2, "tokens": tokens, "weights": False},
        "only LoRA": {
            "kind": "int8", "load": "uneven", "chosen": 2, "tokens": tokens, "x": False, "weights": False
        },
        "bfloat16": {"kind": "nf4", "load": "uneven", "chosen": 4, "tokens": tokens, "dtype": "bfloat16"},
    }  # fmt: skip
    models = {"owned": {"architecture": "glm4_moe_lite", "kind": "nf4", "expert": 2}}
    check(2, blocks, models)


@pytest.mark.slow
def test_four_processes() -> None:
    tokens = [13, 0, 29, 8]
    blocks: dict[str, dict[str, Any]] = {
        "uneven loads": {"kind": "int8", "load": "uneven", "chosen": 4, "tokens": tokens},
        "one expert": {"kind": "nf4", "load": "one expert", "chosen": 1, "tokens": tokens},
        "one process": {"kind": "none", "trained": True, "load": "one process", "chosen": 2, "tokens": tokens},
    }
    models: dict[str, dict[str, Any]] = {
        "owned and cut": {"architecture": "glm4_moe_lite", "kind": "int8", "expert": 2},
        "recomputed within its layer": {"architecture": "afmoe", "kind": "nf4", "expert": 2, "router": False},
        "owned in two copies": {"architecture": "glm4_moe_lite", "kind": "nf4", "expert": 2, "replicate": 2},
    }
    check(4, blocks, models)
