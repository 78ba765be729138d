"""The checks of benchmarks.gpu, of the CPU against itself: they pass, notice what is wrong, and state true bounds."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from benchmarks import (
    gpu_checks,
    gpu_checks_graph,
    gpu_checks_models,
    gpu_checks_sequence,
    gpu_compare,
    gpu_report,
    gpu_timings,
    gpu_train,
)
from benchmarks import gpu_checks_optim as optim
from benchmarks.gpu_cases import GROUPS, Request
from models.adapters.lora import trainable_parameters
from models.attention.indexer import Indexer
from models.blocks.balance import AuxiliaryLoss, BiasUpdate
from models.blocks.documents import Documents
from models.blocks.router import Router
from models.decoder import CausalLM
from models.registry import ARCHITECTURES
from quant.kinds import new_storage
from quant.storage import Storage, StorageSpec
from tests.helpers import relative_error

CPU = torch.device("cpu")


def test_compare_fails_on_wrong_and_on_nan():
    right = torch.ones(4)
    assert gpu_compare.compare("x", [(right * (1 + 1e-6), right)], 1e-5).passed
    assert not gpu_compare.compare("x", [(right * 1.1, right)], 1e-5).passed
    assert not gpu_compare.compare("x", [(right * math.nan, right), (right, right)], 1e-5).passed
    # A small tensor that is wrong beside a large one that is right.
    pairs = [(1e4 * right, 1e4 * right), (right * 1.1, right)]
    assert not gpu_compare.compare_each_norm("x", pairs, 1e-2).passed
    assert not gpu_compare.compare_each_norm("x", [(right * math.nan, right), (right, right)], 1e-2).passed


def test_a_check_that_raises_is_a_failure_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch):
    def broken(device: torch.device) -> Any:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(gpu_checks, "groups", lambda: [("first", broken), ("loss", gpu_checks.loss_in_chunks)])
    found = list(gpu_checks.checks(CPU))
    assert [(check.name, check.passed) for check in found[:1]] == [("first", False)]
    assert found[0].figure == "RuntimeError: no kernel image"
    assert [check.passed for check in found[1:]] == [True, True]
    assert gpu_report.check_line({"name": "loss", "figure": "0 of 1", "passed": None}) == "skip  loss: 0 of 1"


def test_every_device_of_a_check_carries_its_index(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """cuda and cuda:0 aren't equal, and a tensor's device always has the number."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(gpu_checks, "groups", lambda: [("one", lambda device: devices.append(device) or iter(()))])
    monkeypatch.setattr(gpu_timings, "timings", lambda device, tiny: devices.append(device) or iter(()))
    monkeypatch.setattr(gpu_train, "build_random", lambda request, device: devices.append(device) or sys.exit())
    for name in ("cuda", "cuda:0"):
        gpu_checks.main(name, "torch")
        gpu_timings.main(name, tiny=True)
        with pytest.raises(SystemExit):
            gpu_train.run(Request(GROUPS[0], device=name))
    assert devices == [torch.device("cuda", 1)] * 3 + [torch.device("cuda", 0)] * 3


def test_every_architecture_and_storage_is_checked():
    names = {name for name, _ in gpu_checks.groups()}
    known = {model_type for model_type in ARCHITECTURES if model_type != "qwen3_5_moe"}  # computes as its text model
    assert set(gpu_checks_models.TINY) == known
    assert {f"{model_type}, {kind}" for model_type in known for kind in ("none", "nf4", "int8", "documents")} <= names


def passes(found: Any) -> bool:
    checks = list(found)
    assert checks and all(check.passed is not None for check in checks)
    return all(check.passed for check in checks)


@pytest.mark.parametrize(
    "group",
    [*gpu_checks.groups()[:5], *gpu_checks_sequence.groups(), gpu_checks.groups()[-1]],
    ids=lambda group: group[0],
)
def test_checks_of_blocks_pass_on_the_cpu(group: gpu_compare.Group):
    found = list(group[1](CPU))
    assert all(check.passed is not False for check in found), found
    skipped = [check.name for check in found if check.passed is None]
    assert bool(skipped) == (group[0] in ("kernels", "flash-linear-attention")), "only these need a GPU"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_in_chunks_has_gradients_in_every_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    loss, given = gpu_checks.linear_cross_entropy, []

    def scaled(h: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        given.append(h.dtype)
        return loss(h, *rest, **options) * (1.1 if len(given) % 2 else 1.0)  # the device's goes first

    monkeypatch.setattr(gpu_checks, "linear_cross_entropy", scaled)
    monkeypatch.setattr(gpu_checks, "DTYPES", ((dtype, 5e-2),))
    (check,) = gpu_checks.loss_in_chunks(CPU)
    assert check.passed is False, "a loss and gradients that are a tenth too large"
    assert given == [dtype, torch.float32]


# bitsandbytes' CUDA kernel for FP4: a tree of comparisons of |x| with these, then 8 more for x < 0; ascending codes.
FP4_EDGES = torch.tensor([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333])
FP4_CODES = torch.tensor([0b000, 0b001, 0b110, 0b111, 0b100, 0b101, 0b010, 0b011])


def fp4_as_on_cuda(matrix: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in/2]."""
    blocks = matrix.float().view(-1, 64)
    x = (blocks * (1 / blocks.abs().amax(1, keepdim=True))).view_as(matrix)
    codes = FP4_CODES[torch.bucketize(x.abs(), FP4_EDGES)] + 8 * (x < 0)
    return (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)


def test_fp4_of_cuda_differs_in_the_sign_of_zero_and_on_edges():
    """The 1.2 % of bytes that differ in the check of the storage on CUDA, from the kernel's comparisons alone."""
    matrix = gpu_compare.random((512, 512), 2, torch.bfloat16)
    storage = new_storage(StorageSpec("fp4"), (512, 512), torch.bfloat16, CPU, "matrix")
    storage.load_dense(matrix)
    here, there = storage.packed, fp4_as_on_cuda(matrix)
    assert 0.0115 < (here != there).double().mean() < 0.0125
    values, wrong = gpu_checks.off_edge("fp4", matrix, here, there)
    assert (values, wrong) == (194, 0)

    def codes(packed: torch.Tensor) -> torch.Tensor:
        return torch.stack((packed >> 4, packed & 15), -1).view(-1, 64)

    blocks = matrix.double().view(-1, 64)
    x = blocks / blocks.abs().amax(1, keepdim=True)
    near_zero = (x != 0) & (x.abs() < 1 / 384)
    assert bool((codes(there)[near_zero] == 8 * (x < 0)[near_zero]).all())
    assert bool((codes(here)[near_zero] == 8 * (x > 0)[near_zero]).all())
    assert int((codes(here) != codes(there)).sum()) == int(near_zero.sum()) + values

    neighbour = there.clone()
    neighbour[7, 7] ^= 0b0100_0000  # another value, off the edge
    assert gpu_checks.off_edge("fp4", matrix, here, neighbour) == (195, 1)


@pytest.mark.parametrize("spec", gpu_checks.SPECS[:-1], ids=str)
def test_a_code_that_is_not_the_nearest_is_noticed(spec: StorageSpec, monkeypatch: pytest.MonkeyPatch):
    made = []

    def changed(*given: Any) -> Storage:
        storage = new_storage(*given)
        load, number = storage.load_dense, len(made)

        def load_and_change(matrix: torch.Tensor) -> None:
            load(matrix)
            if number % 2:
                storage.packed[3, 5] += 1

        storage.load_dense = load_and_change  # type: ignore[method-assign]
        made.append(storage)
        return storage

    monkeypatch.setattr(gpu_checks, "new_storage", changed)
    monkeypatch.setattr(gpu_checks, "SPECS", (spec, None))
    (check,) = gpu_checks.quantising(CPU)
    assert check.passed is False and " 1 of them not on an edge" in check.figure


def test_checks_of_blocks_notice_documents_that_are_mixed_up(monkeypatch: pytest.MonkeyPatch):
    def merged(lengths: Any, device: Any = "cpu", padding: int = 0) -> Documents:
        return from_lengths([sum(lengths)], device, padding)

    from_lengths = Documents.from_lengths
    monkeypatch.setattr(Documents, "from_lengths", staticmethod(merged))
    for check in (gpu_checks_sequence.attention, gpu_checks_sequence.window_attention, gpu_checks_sequence.convolution):
        assert not any(found.passed for found in check(CPU) if "1000" not in found.name)


def test_checks_of_blocks_notice_what_is_left_out(monkeypatch: pytest.MonkeyPatch):
    sequence = gpu_checks_sequence
    attend, select, rule = sequence.causal_attention, sequence.selected_attention, sequence.chunked_gated_delta_rule
    monkeypatch.setattr(
        sequence, "causal_attention", lambda q, k, v, documents, scale, window: attend(q, k, v, documents, scale)
    )
    found = [check.passed for check in sequence.window_attention(CPU)]
    assert found == [False, False, False, False, True, True], "the last window is longer than any document"

    def one_less(q: Any, k: Any, v: Any, parts: Any, selected: torch.Tensor, scale: float) -> torch.Tensor:
        return select(q, k, v, parts, selected[:, 1:], scale)

    monkeypatch.setattr(sequence, "selected_attention", one_less)
    assert not any(check.passed for check in sequence.attention_to_selected(CPU))
    monkeypatch.setattr(
        sequence,
        "chunked_gated_delta_rule",
        lambda q, k, v, decay, beta, documents: rule(q, k, v, decay * 1.1, beta, documents),
    )
    assert not any(check.passed for check in sequence.delta_rule(CPU))


WHOLE = dict(zip(gpu_checks_models.TINY, ("none", "nf4", "none", "int8", "nf4", "int8"), strict=True))


def some_slow(names: Iterable[str]) -> list[Any]:
    """Two that differ most are tried on every change."""
    quick = ("glm4_moe_lite", "qwen3_5_moe_text")
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("model_type", some_slow(WHOLE))
def test_checks_of_models_pass_on_the_cpu_and_can_fail(model_type: str, monkeypatch: pytest.MonkeyPatch):
    spec = next(spec for spec in gpu_checks_models.SPECS if spec.kind == WHOLE[model_type])
    assert passes(gpu_checks_models.whole_model(model_type, spec, CPU))

    def other(model: CausalLM) -> CausalLM:
        copied = copy.deepcopy(model)
        trainable_parameters(copied)[1][1].data.mul_(1.02)
        return copied

    monkeypatch.setattr(gpu_checks_models, "copy", types.SimpleNamespace(deepcopy=other))
    _, gradients = itertools.islice(gpu_checks_models.whole_model(model_type, spec, CPU), 2)
    assert gradients.passed is False, "those of a copy in float32 that is another one"


@pytest.mark.parametrize("model_type", some_slow(gpu_checks_models.TINY))
def test_checks_of_models_do_not_hang_on_rounding(model_type: str):
    """A device that rounds otherwise makes the same choices of experts and keys, and gradients within the tolerance."""
    model = gpu_checks_models.tiny_model(model_type, gpu_checks_models.NF4, torch.float32, CPU)
    chosen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, given, out: chosen.append(out[0].sort(-1).values))
        elif isinstance(module, Indexer):
            module.register_forward_hook(lambda module, given, out: chosen.append(out.sort(-1).values))
    found = []
    for _ in range(2):
        chosen.clear()
        model.zero_grad()
        loss = gpu_checks_models.batch_loss(model, CPU)
        loss.backward()
        found.append((loss.item(), [x.clone() for x in gpu_checks_models.gradients(model)], list(chosen)))
        weight = model.model.embed_tokens.weight.data
        weight.mul_(1 + 1e-6 * gpu_compare.random(tuple(weight.shape), 0))
    (loss_a, gradients_a, chosen_a), (loss_b, gradients_b, chosen_b) = found
    assert len(chosen_a) >= 2 and all(map(torch.equal, chosen_a, chosen_b))
    assert abs(loss_a - loss_b) < 2e-6 * loss_a
    worst = max(map(relative_error, gradients_b, gradients_a))
    assert 0 < worst < 3e-5, "the tolerance is 1e-4"


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", pytest.param("glm_moe_dsa", marks=pytest.mark.slow)])
def test_checks_of_documents_pass_on_the_cpu_and_can_fail(model_type: str, monkeypatch: pytest.MonkeyPatch):
    assert passes(gpu_checks_models.packed_documents(model_type, CPU))
    from_lengths = Documents.from_lengths
    monkeypatch.setattr(
        Documents,
        "from_lengths",
        staticmethod(lambda lengths, device="cpu", padding=0: from_lengths([sum(lengths)], device, padding)),
    )
    assert not any(check.passed for check in gpu_checks_models.packed_documents(model_type, CPU))


@pytest.mark.parametrize(("model_type", "method"), [("glm4_moe_lite", BiasUpdate), ("qwen3_5_moe_text", AuxiliaryLoss)])
def test_checks_of_balance_pass_on_the_cpu_and_can_fail(model_type: str, method: Any, monkeypatch: pytest.MonkeyPatch):
    balanced = gpu_checks_models._balanced
    expected = balanced(model_type, method, CPU)
    real = sum(gpu_checks_models.PADDED) - gpu_checks_models.PADDING
    assert expected[0].sum(-1).unique().tolist() == [2 * 3 * real], "two micro-batches, three experts a token"
    assert len(expected[2]) > len(expected[0]), "every router has gradients"

    answers = [expected, expected]
    monkeypatch.setattr(gpu_checks_models, "_balanced", lambda *given: answers.pop())
    assert passes(gpu_checks_models.balance(model_type, method, CPU))
    wrong = (expected[0] + 1, [x * 1.1 for x in expected[1]], [x * 1.1 for x in expected[2]])
    answers = [wrong, expected]
    assert not any(check.passed for check in gpu_checks_models.balance(model_type, method, CPU))


def test_flash_linear_attention_that_is_missing_is_not_passed(monkeypatch: pytest.MonkeyPatch):
    find = gpu_compare.importlib.util.find_spec
    for there, reason in ((None, "not installed"), (object(), "needs CUDA")):
        monkeypatch.setattr(
            gpu_compare.importlib.util, "find_spec", lambda name, there=there: there if name == "fla" else find(name)
        )
        assert gpu_compare.without_flash_linear_attention(CPU) == reason
        (check,) = gpu_checks_sequence.flash_linear_attention(CPU)
        assert (check.figure, check.passed) == (f"flash-linear-attention: {reason}", None)
    monkeypatch.setitem(sys.modules, "fla", None)  # there, but can't be imported
    with pytest.raises(ImportError):
        gpu_compare.without_flash_linear_attention(torch.device("cuda"))


# ------------------------------------------------------------------------------------------------ optimisers in 8 bits


def searched_8bit(weights: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """By how much AdamW moves the weights as bitsandbytes' CUDA kernel computes it: the nearest code, found by search,
    and the one beyond it where a first moment would lose its sign.
    """
    from bitsandbytes.functional import create_dynamic_map

    (b1, b2), x = optim.BETAS, weights.clone()
    signed, unsigned = create_dynamic_map(signed=True), create_dynamic_map(signed=False)

    def rounded(values: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        blocks = values.view(-1, optim.BLOCK)
        scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)
        found = torch.bucketize(blocks / scale, (code[1:] + code[:-1]) / 2)
        if code is signed:
            found -= ((blocks < 0) & (code[found] == 0)).int()
        return (code[found] * scale).view_as(values)

    m = v = torch.zeros_like(x)
    for step, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        x -= optim.LEARNING_RATE * m / (1 - b1**step) / ((v / (1 - b2**step)).sqrt() + optim.EPS)
        m, v = rounded(m, signed), rounded(v, unsigned)
    return x - weights


GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x,
    "a few large": lambda x: x**5,
    "tiny": lambda x: 1e-7 * x,
    "many zeros": lambda x: x * (x.abs() > 1),
    "rows of all sizes": lambda x: x * torch.logspace(-6, 0, len(x))[:, None],
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_bound_of_8bit_moments_holds_and_can_be_missed(kind: str):
    draw = torch.Generator().manual_seed(0)
    weights = [0.1 * torch.randn(96, 256, generator=draw)]
    given = [[GRADIENTS[kind](torch.randn(96, 256, generator=draw))] for _ in range(3)]
    expected, clipped = optim.moved("adamw", weights, given, CPU)
    bounds = [optim.bound_8bit(clipped[0], optim.LEARNING_RATE)]
    table, _ = optim.moved("adamw_8bit", weights, given, CPU)
    for actual in (table, [searched_8bit(weights[0], clipped[0])]):
        check = optim.within("x", actual, expected, bounds)
        assert check.passed, check
    for rate in (0.9, 1.5):
        other, _ = optim.moved("adamw_8bit", weights, given, CPU, rate * optim.LEARNING_RATE)
        assert not optim.within("x", other, expected, bounds).passed
        exceeded = (other[0] - expected[0]).abs() > bounds[0]
        assert exceeded.sum() > 0.2 * (given[0][0] != 0).sum(), "not a single value alone"
    assert not optim.within("x", [torch.full_like(weights[0], math.nan)], expected, bounds).passed


def test_small_tensors_have_no_rounding_to_allow_for():
    gradients = [torch.randn(16, 255, generator=torch.Generator().manual_seed(0))] * 3
    torch.testing.assert_close(optim.bound_8bit(gradients, 1.0), torch.full((16, 255), 3 * optim.ROUNDING).double())
    gradients = [torch.cat((gradient, gradient[:1])) for gradient in gradients]  # 4335 values
    assert optim.bound_8bit(gradients, 1.0).min() > 4 * optim.ROUNDING


def test_steps_of_a_model_whose_pass_cannot_be_recorded_are_the_usual_ones():
    """As on a CPU, whose attention asks for the lengths of documents."""

    class NoGraphs:
        def record(self, work: Any) -> Any:
            work()

        def release(self) -> None: ...

    found = gpu_checks_graph._train("glm4_moe_lite", CPU, graph=True, recorder=NoGraphs())
    usual = gpu_checks_graph._train("glm4_moe_lite", CPU, graph=False)
    assert found[0] == usual[0] and all(map(torch.equal, found[1], usual[1]))
    (note,) = found[2]
    assert note.startswith("no CUDA graph, passes are computed as usual: ") and not usual[2]
    (check,) = gpu_checks_graph.replayed("glm4_moe_lite", CPU)
    assert check.passed is None
