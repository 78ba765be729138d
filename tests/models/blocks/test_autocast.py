"""torch.autocast changes nothing of what chooses its dtypes itself: the same bits, forward and backward."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.attention.delta_rule import chunked_gated_delta_rule
from models.attention.indexer import Part, selected_attention
from models.attention.short_conv import short_convolution
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.linear import Linear, LoRA
from models.blocks.norm import RMSNorm
from models.experts.block import Experts
from models.experts.torch_form import combine
from models.load import load_model
from quant.products import without_autocast
from quant.storage import StorageSpec
from tests.helpers import save_tiny_glm
from train.loss import linear_cross_entropy

ROOT = Path(__file__).resolve().parents[3]
TOKENS, HIDDEN = 40, 64
DOCUMENTS = Documents.from_lengths([17, 23])

# What is computed, of which inputs; the inputs that are floating have gradients.
Case = tuple[Callable[..., Tensor], list[Tensor]]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adapted(owner: Linear | Experts, dtype: torch.dtype) -> list[Tensor]:
    """Fill a module's weights, give it LoRA, and return what is trained."""
    trained: list[Tensor] = []
    for layer in (owner,) if isinstance(owner, Linear) else (owner.gate_up_proj, owner.down_proj):
        layer.weight.load_dense(random(*layer.weight.shape, seed=1) * 0.1)
        layer.lora = LoRA(layer.weight.shape, 4, alpha=8.0)
        with torch.no_grad():
            layer.lora.B.copy_(random(*layer.lora.B.shape, seed=2))
        trained += [layer.lora.A, layer.lora.B]
    return trained


def linear(kind: str, dtype: torch.dtype) -> Case:
    layer = Linear(HIDDEN, 32, Factory(StorageSpec(kind), dtype, "cpu"))  # type: ignore[arg-type]
    return lambda x, *_: layer(x), [random(TOKENS, HIDDEN, dtype=dtype), *adapted(layer, dtype)]


def experts(kind: str, dtype: torch.dtype) -> Case:
    block = Experts(4, HIDDEN, 128, Factory(StorageSpec(kind), dtype, "cpu"))  # type: ignore[arg-type]
    chosen = torch.arange(2 * TOKENS).view(TOKENS, 2) % 4
    inputs = [random(TOKENS, HIDDEN, dtype=dtype), random(TOKENS, 2, seed=3).softmax(-1)]
    return lambda x, weights, *_: block(x, chosen, weights), [*inputs, *adapted(block, dtype)]


def norm(kind: str, dtype: torch.dtype) -> Case:
    layer = RMSNorm(HIDDEN, 1e-6, Factory(StorageSpec(), torch.float32, "cpu"))
    return lambda x, *_: layer(x), [random(TOKENS, HIDDEN, dtype=dtype), layer.weight]


def delta_rule(kind: str, dtype: torch.dtype) -> Case:
    heads = [random(TOKENS, count, 16, seed=count, dtype=dtype) for count in (2, 2, 4)]
    inputs = [*heads, -random(TOKENS, 4).abs(), random(TOKENS, 4, seed=1).sigmoid()]
    return lambda *inputs: chunked_gated_delta_rule(*inputs, DOCUMENTS), inputs


def convolution(kind: str, dtype: torch.dtype) -> Case:
    inputs = [random(TOKENS, HIDDEN, dtype=dtype), random(HIDDEN, 4, seed=1)]
    return lambda x, weight: short_convolution(x, weight, DOCUMENTS), inputs


def selected(kind: str, dtype: torch.dtype) -> Case:
    keys = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)).tril().topk(8).indices.int()
    parts = (Part(slice(0, TOKENS), None),)
    inputs = [random(TOKENS, 4, 16, seed=seed, dtype=dtype) for seed in range(3)]
    return lambda q, k, v: selected_attention(q, k, v, parts, keys, 0.25), inputs


def sums(kind: str, dtype: torch.dtype) -> Case:
    """What tokens that have travelled (parallel/exchange.py) and those that have not are summed by."""
    return lambda slots: combine(slots, None, 2, dtype), [random(TOKENS, HIDDEN, dtype=dtype)]


def loss(kind: str, dtype: torch.dtype) -> Case:
    labels = torch.arange(TOKENS) % 50
    inputs = [random(TOKENS, HIDDEN, dtype=dtype), random(50, HIDDEN, seed=1, dtype=dtype)]
    return lambda hidden, head: linear_cross_entropy(hidden, head, labels, TOKENS), inputs


CASES = [
    *((case, kind) for case in (linear, experts) for kind in ("none", "nf4", "int8")),
    *((case, "") for case in (norm, delta_rule, convolution, selected, sums, loss)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("case", "kind"), CASES)
def test_the_same_bits(case: Callable[[str, torch.dtype], Case], kind: str, dtype: torch.dtype) -> None:
    function, inputs = case(kind, dtype)
    for tensor in inputs:
        tensor.requires_grad_()

    def results() -> list[Tensor]:
        out = function(*inputs)
        return [out, *torch.autograd.grad((out * random(*out.shape, seed=9).to(out.dtype)).sum(), inputs)]

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.mm(random(2, 2), random(2, 2)).dtype == torch.bfloat16
        found = results()
    for ours, without in zip(found, expected, strict=True):
        assert ours.dtype == without.dtype
        assert torch.equal(ours, without)


def test_every_autograd_function_is_among_them() -> None:
    """A new one needs a case above. Those of models/kernels launch kernels, which autocast leaves alone."""
    found = set()
    for package in ("quant", "models", "parallel", "train"):
        for path in {*(ROOT / package).rglob("*.py")} - {*(ROOT / "models" / "kernels").iterdir()}:
            found.update(re.findall(r"class (\w+)\(torch\.autograd\.Function\)", path.read_text()))
    assert found == {
        *("_LoRALinear", "_SaveForBackward", "_Compute", "_WideRMSNorm", "_Chunked", "_ShortConvolution"),
        *("_SelectedAttention", "_LinearCrossEntropy", "_Send", "_Return"),
        *("_InKernels", "_SideBySide"),  # in tests/kernels: test_delta_rule.py, test_linear.py
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_under_autocast_computes_what_it_does_without(checkpointing: bool, tmp_path: Path) -> None:
    save_tiny_glm(tmp_path)
    model = load_model(tmp_path, "none", torch.float32).train()
    model.requires_grad_(True)
    model.activation_checkpointing = checkpointing
    tokens = torch.arange(20).view(2, 10)

    def results(autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(tokens)
        trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
        return [logits, *torch.autograd.grad(logits.square().sum(), trained)]

    for ours, without in zip(results(True), results(False), strict=True):
        assert torch.equal(ours, without)


def test_a_lora_by_itself_changes_nothing_and_learns() -> None:
    """B is zero and A isn't, as PEFT has them; on the meta device nothing is drawn."""
    state = torch.get_rng_state()
    assert LoRA((32, HIDDEN), 4, alpha=8.0, device="meta").A.is_meta
    assert torch.equal(torch.get_rng_state(), state)
    for shape in ((32, HIDDEN), (3, 32, HIDDEN)):
        lora = LoRA(shape, 4, alpha=8.0)
        assert lora.B.count_nonzero() == 0
        # PEFT: nn.init.kaiming_uniform_(A, a=sqrt(5)) of every [R, in].
        assert 0.9 * HIDDEN**-0.5 < lora.A.abs().max() <= HIDDEN**-0.5
        assert lora.A.unique().numel() > 0.9 * lora.A.numel()


def test_tensors_may_be_given_by_name() -> None:
    @without_autocast
    def doubled(*, x: Tensor) -> Tensor:
        return x @ x

    x = torch.eye(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert doubled(x=x).dtype == torch.float32
    assert torch.equal(doubled(x=x), x)
