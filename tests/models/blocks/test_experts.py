"""The routed experts against a plain autograd computation, and the memory they need."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.blocks.factory import Factory
from models.blocks.linear import Linear, LoRA
from models.experts.block import Experts
from quant.storage import StorageSpec
from tests.helpers import assert_close, relative_error

EXPERTS, HIDDEN, WIDTH, CHOSEN, TOKENS, RANK = 6, 64, 128, 2, 37, 4


def make_block(kind: str, dtype: torch.dtype = torch.float32, lora: bool = True, trained: bool = False) -> Experts:
    generator = torch.Generator().manual_seed(0)
    block = Experts(
        EXPERTS, HIDDEN, WIDTH, Factory(StorageSpec(kind), dtype, "cpu")  # type: ignore[arg-type]
    )  # fmt: skip
    for projection in (block.gate_up_proj, block.down_proj):
        shape = projection.weight.shape
        projection.weight.load_dense(torch.randn(shape, generator=generator) * 0.1)
        if trained:
            projection.weight.value.requires_grad_(True)
        if lora:
            projection.lora = LoRA(shape, RANK, alpha=2.0 * RANK)
            with torch.no_grad():
                projection.lora.A.copy_(torch.randn(projection.lora.A.shape, generator=generator) * 0.2)
                projection.lora.B.copy_(torch.randn(projection.lora.B.shape, generator=generator) * 0.2)
    return block


def make_input(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores[:, 3] = -1  # an expert that no token chooses
    weights, chosen = scores.topk(CHOSEN, dim=-1)
    return x.requires_grad_(), chosen, weights.clone().requires_grad_()


def plainly(block: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Every expert for every token with merged weights, masked by the routing; all by autograd."""
    out = torch.zeros(x.shape[0], HIDDEN)
    merged = []
    for projection in (block.gate_up_proj, block.down_proj):
        value = getattr(projection.weight, "value", None)
        weight = value if value is not None else projection.weight.dense(dtype=torch.float32)
        if projection.lora is not None:
            weight = weight + projection.lora.scaling * projection.lora.B @ projection.lora.A
        merged.append(weight)
    for expert in range(EXPERTS):
        gate, up = (x @ merged[0][expert].T).chunk(2, dim=-1)
        share = ((chosen == expert) * weights).sum(-1, keepdim=True)
        out = out + share * ((F.silu(gate) * up) @ merged[1][expert].T)
    return out


def gradients(block: Experts, out: Tensor, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    named = {name: p for name, p in block.named_parameters() if p.requires_grad}
    leaves = (*inputs, *named.values())
    results = torch.autograd.grad((out * target).sum(), leaves)
    return dict(zip(("x", "weights", *named), results, strict=True))


@pytest.mark.parametrize("kind", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("at_a_time", [None, 1, 4, EXPERTS])
def test_output_and_gradients_equal_autograd(kind: str, at_a_time: int | None) -> None:
    """One expert at a time (CPU) and several in one grouped product (accelerators) compute the same."""
    block = make_block(kind, trained=kind == "none")
    block.experts_at_a_time = at_a_time
    x, chosen, weights = make_input()
    out, expected = block(x, chosen, weights), plainly(block, x, chosen, weights)
    assert_close(out, expected, what="output")
    theirs = gradients(block, expected, (x, weights))
    ours = gradients(block, out, (x, weights))
    assert len(ours) == (8 if kind == "none" else 6)
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], what=name)
    assert not ours["gate_up_proj.lora.B"][3].any(), "an expert without tokens has a gradient of zero"


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_grouped_products_hold_together_at_any_rank(rank: int) -> None:
    """Ranks whose rows are not a multiple of 16 bytes cannot go through the grouped kernel."""
    block = make_block("none", lora=False)
    for projection in (block.gate_up_proj, block.down_proj):
        projection.lora = LoRA(projection.weight.shape, rank, alpha=1.0)
        torch.nn.init.normal_(projection.lora.A)
        torch.nn.init.normal_(projection.lora.B)
    x, chosen, weights = make_input()
    results = []
    for at_a_time in (1, 3):
        block.experts_at_a_time = at_a_time
        results.append(gradients(block, block(x, chosen, weights), (x, weights)))
    for name, gradient in results[0].items():
        assert_close(results[1][name], gradient, what=name)


@pytest.mark.parametrize("kind", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_lora_is_bit_identical_to_the_base(kind: str, dtype: torch.dtype) -> None:
    block = make_block(kind, dtype)
    x, chosen, weights = make_input(dtype)
    for projection in (block.gate_up_proj, block.down_proj):
        assert projection.lora is not None
        torch.nn.init.zeros_(projection.lora.B)
    adapted = block(x, chosen, weights)
    block.gate_up_proj.lora = block.down_proj.lora = None
    assert torch.equal(adapted, block(x, chosen, weights))


def test_bfloat16_follows_float32() -> None:
    block, narrow = make_block("nf4"), make_block("nf4", torch.bfloat16)
    x, chosen, weights = make_input(torch.bfloat16)
    out = narrow(x, chosen, weights)
    assert out.dtype == torch.bfloat16
    wide = x.detach().float().requires_grad_()
    expected = block(wide, chosen, weights)
    assert relative_error(out.float(), expected) < 2e-2
    theirs, ours = gradients(block, expected, (wide, weights)), gradients(narrow, out.float(), (x, weights))
    for name, gradient in ours.items():
        assert relative_error(gradient.float(), theirs[name]) < 3e-2, name


def test_a_fully_skewed_routing() -> None:
    """All tokens to the same experts, so that most chunks are empty."""
    block = make_block("nf4")
    x, _, weights = make_input()
    chosen = torch.tensor([4, 5]).expand(TOKENS, 2).contiguous()
    for at_a_time in (1, 4):
        block.experts_at_a_time = at_a_time
        assert_close(block(x, chosen, weights), plainly(block, x, chosen, weights))


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_autograd(kind: str, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Linear(
        HIDDEN, WIDTH, Factory(StorageSpec(kind), torch.float32, "cpu"), bias=bias  # type: ignore[arg-type]
    )  # fmt: skip
    layer.weight.load_dense(torch.randn(WIDTH, HIDDEN, generator=generator))
    layer.lora = LoRA((WIDTH, HIDDEN), RANK, alpha=3.0)
    torch.nn.init.normal_(layer.lora.A, generator=generator)
    torch.nn.init.normal_(layer.lora.B, generator=generator)
    if kind == "none":
        layer.weight.value.requires_grad_(True)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    weight = layer.weight.value if kind == "none" else layer.weight.dense(dtype=torch.float32)
    expected = F.linear(x, weight + layer.lora.scaling * layer.lora.B @ layer.lora.A, layer.bias)
    out = layer(x)
    assert_close(out, expected)
    leaves = (x, *(p for p in layer.parameters() if p.requires_grad))
    target = torch.randn(out.shape, generator=generator)
    theirs = torch.autograd.grad((expected * target).sum(), leaves)
    ours = torch.autograd.grad((out * target).sum(), leaves)
    assert len(ours) == 3 + bias + (kind == "none")
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other)


MEMORY = """
import ctypes, sys, torch
from models.experts.block import Experts
from models.blocks.factory import Factory
from models.blocks.linear import LoRA
from quant.storage import StorageSpec

def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

hidden, width = 512, 512
torch.set_num_threads(1)
def block(experts):
    made = Experts(experts, hidden, width, Factory(StorageSpec("nf4"), torch.float32, "cpu"))
    for projection in (made.gate_up_proj, made.down_proj):
        projection.lora = LoRA(projection.weight.shape, 1, alpha=1.0)
        torch.nn.init.normal_(projection.lora.A)
        for tensor in projection.weight.parameters():
            tensor.random_(0, 256) if tensor.dtype == torch.uint8 else tensor.fill_(0.01)
    return made
def step(made, experts):
    x = torch.randn(256, hidden, requires_grad=True)
    weights, chosen = torch.rand(256, experts).topk(4, dim=-1)
    made(x, chosen, weights).sum().backward()
step(block(4), 4)  # libraries and thread pools take their memory before counting begins
for experts in map(int, sys.argv[1:]):
    made = block(experts)
    # Only what the step adds on top of the packed experts counts. Freed memory that the process kept would hide it.
    try:
        ctypes.CDLL(None).malloc_trim(0)
        open("/proc/self/clear_refs", "w").write("5")
    except (OSError, AttributeError):
        sys.exit("the peak can't be reset")
    before = resident("VmRSS")
    step(made, experts)
    print(resident("VmHWM") - before)
"""


def test_working_memory_does_not_grow_with_the_number_of_experts() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY, "8", "128"], capture_output=True, text=True)
    if "the peak can't be reset" in done.stderr:
        pytest.skip("needs glibc's malloc_trim and a writable /proc/self/clear_refs")
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    dense = 120 * 3 * 512 * 512 * 4  # what the additional experts, or their B·A, would take if they were made dense
    assert many < few + 0.03 * dense, f"8 experts: {few / 2**20:.1f} MiB, 128 experts: {many / 2**20:.1f} MiB"
