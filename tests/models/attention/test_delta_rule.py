"""The gated delta rule: its chunked form against the token-by-token definition and against transformers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.delta_rule import check_equal_results, report
from models.attention import delta_rule, fla
from models.attention.delta_rule import Blocking, chunked_gated_delta_rule, gated_delta_rule
from models.attention.delta_step import stepwise_gated_delta_rule
from models.blocks.documents import Documents
from models.registry import architecture_for
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.helpers import assert_close, relative_error
from tests.tiny import TINY
from train.output import overview

NAMES = ("query", "key", "value", "decay", "beta")
LENGTHS = [(1,), (64,), (200,), (5, 70, 129), (1, 64, 63, 65, 128), (2, 1, 1, 3), (30, 40, 58)]

Rule = Callable[..., Tensor]


def inputs(
    tokens: int,
    key_heads: int = 2,
    value_heads: int = 4,
    *,
    dk: int = 16,
    dv: int = 8,
    decay: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor]:
    """The five arguments, with gradients, and a gradient of the output. `decay` scales the log of the decay."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    logs = -decay * torch.nn.functional.softplus(normal(tokens, value_heads))
    made = [normal(tokens, key_heads, dk), normal(tokens, key_heads, dk), normal(tokens, value_heads, dv)]
    made += [logs, normal(tokens, value_heads).sigmoid()]
    return [x.requires_grad_() for x in made], normal(tokens, value_heads, dv)


def run(rule: Rule, arguments: Sequence[Tensor], grad: Tensor, *rest: object) -> list[Tensor]:
    """The output and the gradients of all five arguments."""
    out = rule(*arguments, *rest)
    return [out.detach(), *torch.autograd.grad(out, arguments, grad)]


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for name, ours, theirs in zip(("output", *NAMES), actual, expected, strict=True):
        if theirs.any():
            assert_close(ours, theirs, tolerance, what=name)
        else:  # in documents of one token the decay has nothing to act on
            assert not ours.any(), name


@pytest.mark.parametrize("decay", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_chunked_equals_stepwise(lengths: tuple[int, ...], decay: float) -> None:
    documents = Documents.from_lengths(lengths)
    arguments, grad = inputs(sum(lengths), decay=decay)
    actual = run(chunked_gated_delta_rule, arguments, grad, documents)
    assert_all_close(actual, run(stepwise_gated_delta_rule, arguments, grad, documents))


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (1, 4), (3, 6)])
def test_head_groups(heads: tuple[int, int]) -> None:
    documents = Documents.from_lengths((70, 20))
    arguments, grad = inputs(90, *heads, dk=8, dv=24)
    actual = run(chunked_gated_delta_rule, arguments, grad, documents)
    assert_all_close(actual, run(stepwise_gated_delta_rule, arguments, grad, documents))


@pytest.mark.parametrize("heads", [(2, 2), (2, 6)])
def test_equals_transformers(heads: tuple[int, int]) -> None:
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_chunk_gated_delta_rule

    def reference(*arguments: Tensor) -> Tensor:
        return torch_chunk_gated_delta_rule(*(x[None] for x in arguments), use_qk_l2norm_in_kernel=True)[0][0]

    arguments, grad = inputs(150, *heads, dk=32, dv=32)
    actual = run(gated_delta_rule, arguments, grad, Documents.from_lengths([150]))
    assert_all_close(actual, run(reference, arguments, grad))


@pytest.mark.parametrize("lengths", [(5, 70, 129), (1, 64, 63, 65, 128)])
def test_packed_documents_equal_documents_alone(lengths: tuple[int, ...]) -> None:
    arguments, grad = inputs(sum(lengths))
    packed = run(gated_delta_rule, arguments, grad, Documents.from_lengths(lengths))
    pieces = zip(*(x.detach().split(lengths) for x in arguments), strict=True)
    alone = [
        run(gated_delta_rule, [x.requires_grad_() for x in piece], part, Documents.from_lengths([len(part)]))
        for piece, part in zip(pieces, grad.split(lengths), strict=True)
    ]
    assert_all_close(packed, [torch.cat(parts) for parts in zip(*alone, strict=True)])


def test_another_document_is_not_seen_at_all() -> None:
    documents = Documents.from_lengths((70, 20))
    arguments, grad = inputs(90)
    before = run(gated_delta_rule, arguments, grad, documents)
    with torch.no_grad():
        for x in arguments[:3]:
            x[:70] = 1e6 * torch.randn_like(x[:70])
    after = run(gated_delta_rule, arguments, grad, documents)
    for name, first, second in zip(("output", *NAMES), before, after, strict=True):
        assert torch.equal(first[70:], second[70:]), name


@pytest.mark.parametrize("heads", [(2, 2), (1, 2)])
def test_gradients_in_float64(heads: tuple[int, int]) -> None:
    documents = Documents.from_lengths((3, 9, 1))
    arguments, _ = inputs(13, *heads, dk=3, dv=2, dtype=torch.float64)
    small = Blocking(chunk=4, chunks=2, heads=1)
    assert torch.autograd.gradcheck(lambda *x: chunked_gated_delta_rule(*x, documents, small), arguments)


def test_blocking_does_not_matter() -> None:
    documents = Documents.from_lengths((5, 200, 129))
    arguments, grad = inputs(334)
    expected = run(chunked_gated_delta_rule, arguments, grad, documents, Blocking(64, 100, 100))
    for blocking in (Blocking(64, 1, 1), Blocking(64, 2, 3), Blocking(32, 3, 2), Blocking(16, 5, 4)):
        actual = run(chunked_gated_delta_rule, arguments, grad, documents, blocking)
        assert_all_close(actual, expected, 2e-6)


@pytest.mark.parametrize("strength", [-50.0, -1e3])
def test_strong_decay_forgets_without_overflow(strength: float) -> None:
    documents = Documents.from_lengths((100, 30))
    arguments, grad = inputs(130, decay=0.1)
    with torch.no_grad():
        arguments[3][10:40] = strength
        arguments[3][::7] = strength
    actual = run(chunked_gated_delta_rule, arguments, grad, documents)
    for name, tensor in zip(("output", *NAMES), actual, strict=True):
        assert tensor.isfinite().all(), name
    # What is left after a strong decay is as exact as before it: sums of decays are not subtracted from one another.
    assert_all_close(actual, run(stepwise_gated_delta_rule, arguments, grad, documents))


def test_equal_keys_that_overwrite_one_another() -> None:
    # The hardest triangular system: every key collides with every other, nothing decays, beta is almost one.
    arguments, grad = inputs(128, decay=0.0)
    with torch.no_grad():
        arguments[1].copy_(arguments[1][:1].expand_as(arguments[1]))
        arguments[4].fill_(0.99)
    documents = Documents.from_lengths([128])
    *actual, d_decay, d_beta = run(chunked_gated_delta_rule, arguments, grad, documents)
    *expected, expected_decay, expected_beta = run(stepwise_gated_delta_rule, arguments, grad, documents)
    for name, ours, theirs in zip(
        ("output", "query", "key", "value", "beta"), (*actual, d_beta), (*expected, expected_beta), strict=True
    ):
        assert_close(ours, theirs, what=name)
    # What has been overwritten can decay without effect: that gradient is small, and as exact as the one of beta.
    assert (d_decay - expected_decay).abs().max() <= 1e-5 * expected_beta.abs().max()


def test_keys_of_length_zero() -> None:
    arguments, grad = inputs(80)
    with torch.no_grad():
        arguments[0][3] = arguments[1][5] = arguments[1][70:] = 0.0
    documents = Documents.from_lengths([80])
    actual = run(chunked_gated_delta_rule, arguments, grad, documents)
    expected = run(stepwise_gated_delta_rule, arguments, grad, documents)
    assert_all_close(actual, expected)


def test_bfloat16_arguments_and_float32_states() -> None:
    documents = Documents.from_lengths((5, 70, 129))
    wide, grad = inputs(204)
    arguments = [x.detach().bfloat16().requires_grad_() for x in wide[:3]] + wide[3:]
    actual = run(gated_delta_rule, arguments, grad.bfloat16(), documents)
    rounded = [x.detach().float().requires_grad_() for x in arguments]
    expected = run(stepwise_gated_delta_rule, rounded, grad.bfloat16().float(), documents)
    assert [x.dtype for x in actual] == [torch.bfloat16] * 4 + [torch.float32] * 2
    for name, ours, theirs in zip(("output", *NAMES), actual, expected, strict=True):
        # Only the results are rounded, once, to eight binary digits.
        assert relative_error(ours, theirs) <= (2**-8 if ours.dtype == torch.bfloat16 else 1e-5), name


@pytest.mark.parametrize("needed", range(5))
def test_only_gradients_that_are_needed(monkeypatch: pytest.MonkeyPatch, needed: int) -> None:
    documents = Documents.from_lengths((50, 40))
    arguments, grad = inputs(90)
    expected = run(chunked_gated_delta_rule, arguments, grad, documents)[1 + needed]
    results: list[tuple[Tensor | None, ...]] = []
    original = delta_rule._Gradients.result

    def result(self: delta_rule._Gradients) -> tuple[Tensor | None, ...]:
        results.append(original(self))
        return results[-1]

    monkeypatch.setattr(delta_rule._Gradients, "result", result)
    alone = [x if index == needed else x.detach() for index, x in enumerate(arguments)]
    (actual,) = torch.autograd.grad(chunked_gated_delta_rule(*alone, documents), alone[needed], grad)
    assert_close(actual, expected, 1e-6, what=NAMES[needed])
    assert [x is not None for x in results[0]] == [index == needed for index in range(5)]


def test_what_is_kept_for_the_backward_pass() -> None:
    arguments, _ = inputs(640)
    documents = Documents.from_lengths([640])
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked_gated_delta_rule(*arguments, documents, Blocking(chunk=64, chunks=5, heads=1))
    known = {x.data_ptr() for x in (*arguments, documents.positions)}
    others = [x for x in kept if x.data_ptr() not in known]
    assert [tuple(x.shape) for x in others] == [(2, 4, 16, 8)], "one state per block of chunks and nothing else"


def test_value_heads_that_no_key_heads_divide() -> None:
    arguments, _ = inputs(10, 2, 3)
    with pytest.raises(ValueError, match="3 value heads are not a multiple of 2 key heads"):
        chunked_gated_delta_rule(*arguments, Documents.from_lengths([10]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_torch_form_is_used_on_cpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    calls = []

    def chunked(*arguments: object) -> None:
        calls.append(arguments)

    monkeypatch.setattr(delta_rule, "chunked_gated_delta_rule", chunked)
    arguments, _ = inputs(10)
    gated_delta_rule(*(x.to(dtype) for x in arguments), Documents.from_lengths([10]))
    assert len(calls) == 1


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fla") is None,
    reason="needs CUDA and flash-linear-attention",
)
@pytest.mark.parametrize("heads", [(2, 2), (2, 4)])
def test_flash_linear_attention_equals_stepwise(heads: tuple[int, int]) -> None:
    lengths = (5, 70, 129)
    wide, grad = inputs(sum(lengths), *heads, dk=64, dv=64)
    arguments = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in wide[:3]]
    arguments += [x.detach().cuda().requires_grad_() for x in wide[3:]]
    grad = grad.to("cuda", torch.bfloat16)
    documents = Documents.from_lengths(lengths, "cuda")
    actual = run(gated_delta_rule, arguments, grad, documents)
    exact = [x.detach().float().requires_grad_() for x in arguments]
    expected = run(stepwise_gated_delta_rule, exact, grad.float(), documents)
    for name, ours, theirs in zip(("output", *NAMES), actual, expected, strict=True):
        assert relative_error(ours, theirs) < 2e-2, name


def test_the_benchmark_checks_that_both_sides_computed_the_same() -> None:
    native = {"norms": [1.0] * 6}
    check_equal_results(native, {"norms": [1.0 + 5e-5] * 6})
    with pytest.raises(NibbleError, match=r"norm of the gradient of decay is 1\.0 here, 1\.1 there"):
        check_equal_results(native, {"norms": [1.0, 1.0, 1.0, 1.0, 1.1, 1.0]})


def test_the_benchmark_reports_medians_and_targets() -> None:
    def results(*seconds: float, peak: int) -> list[dict[str, float]]:
        return [{"forward": value, "backward": 3 * value, "peak": peak} for value in seconds]

    sides = {"nibble": results(0.1, 0.3, 0.2, peak=300 << 20), "transformers": results(1, 2, 9, peak=1000 << 20)}
    lines = report(sides, targets=True).splitlines()
    assert lines[2].split() == ["nibble", "0.20", "0.60", "0.80", "300"]
    assert lines[4] == "time: 0.100 of the peer's (1/10.0); target 1/8: met"
    assert lines[5] == "peak memory: 0.300 of the peer's (1/3.3); target 1/4: NOT MET"


def test_a_run_on_a_gpu_says_which_form_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "qwen3_5_moe_text", **TINY["qwen3_5_moe_text"]}
    architecture = architecture_for(config, "tiny")
    model = architecture.build(architecture.parse_config(config, "tiny"), StorageSpec("nf4"), torch.bfloat16, "meta")
    monkeypatch.setattr(overview, "device_name", str)

    def shown(device: str) -> str:
        return overview.model_text(model, "tiny", Path("tiny"), torch.device(device))

    assert "gated delta rule" not in shown("cpu")
    for found, text in (
        (False, "by torch, slower than flash-linear-attention"),
        (True, "by flash-linear-attention"),
    ):
        monkeypatch.setattr(overview, "uses_fla", lambda device, dtype, found=found: found)
        assert f"gated delta rule {text}" in shown("cuda")


@pytest.mark.parametrize(
    ("distribution", "version", "right"),
    [
        ("fla_core", "0.4.2", False),
        ("fla_core", "0.5.0", True),
        ("fla_core", "0.10.1", True),
        ("fla_core", "1.0", True),
        ("flash_linear_attention", "0.1.2", False),
        (None, "of unknown version", False),
    ],
)
def test_an_old_flash_linear_attention_is_not_used(
    distribution: str | None,
    version: str,
    right: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An installation that is found as any other is; nothing of it is imported."""
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text("raise AssertionError")
    if distribution is not None:
        (tmp_path / f"{distribution}-{version}.dist-info").mkdir()
        about = f"Metadata-Version: 2.1\nName: {distribution.replace('_', '-')}\nVersion: {version}\n"
        (tmp_path / f"{distribution}-{version}.dist-info" / "METADATA").write_text(about)
    monkeypatch.syspath_prepend(tmp_path)
    fla.fla_version.cache_clear()
    try:
        for _ in range(2):
            assert (fla.fla_version() is not None) == right
            assert right or not fla.uses_fla(torch.device("cuda"), torch.bfloat16)
        assert not fla.uses_fla(torch.device("cpu"), torch.bfloat16)
        assert not fla.uses_fla(torch.device("cuda"), torch.float32)
    finally:
        fla.fla_version.cache_clear()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (not right)
    assert right or f"flash-linear-attention {version} isn't used: before 0.5.0 it" in said[0]


class _WrongGradient(torch.autograd.Function):
    """Leaves a value as it is, and doubles its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


def test_flash_linear_attention_is_tried_forward_and_backward() -> None:
    def right(*arguments: Tensor) -> Tensor:
        documents = Documents.from_lengths(arguments[5].diff().tolist())
        return chunked_gated_delta_rule(*arguments[:5], documents)

    def wrong(query: Tensor, *rest: Tensor) -> Tensor:
        return 1.1 * right(query, *rest)

    def one_document(*arguments: Tensor) -> Tensor:
        return chunked_gated_delta_rule(*arguments[:5], Documents.from_lengths([len(arguments[0])]))

    def wrong_backward(query: Tensor, *rest: Tensor) -> Tensor:
        return right(_WrongGradient.apply(query), *rest)

    def raising(*arguments: Tensor) -> Tensor:
        raise RuntimeError("PassManager::run failed\nand more")

    def without_numbers(*arguments: Tensor) -> Tensor:
        return right(*arguments) * float("nan")

    cpu = torch.device("cpu")
    assert fla.failure_of(right, cpu) is None
    assert "output differs" in (fla.failure_of(wrong, cpu) or "")
    assert "output differs" in (fla.failure_of(one_document, cpu) or "")
    assert "output differs" in (fla.failure_of(without_numbers, cpu) or "")
    assert "gradient of query differs" in (fla.failure_of(wrong_backward, cpu) or "")
    assert fla.failure_of(raising, cpu) == "RuntimeError: PassManager::run failed"


def test_an_installation_that_fails_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rule = tmp_path / "fla" / "ops" / "gated_delta_rule"
    rule.mkdir(parents=True)
    for folder in (tmp_path / "fla", tmp_path / "fla" / "ops"):
        (folder / "__init__.py").write_text("")
    raising = "def chunk_gated_delta_rule(*given, **named):\n    raise RuntimeError('its backward fails')\n"
    (rule / "__init__.py").write_text(raising)
    about = tmp_path / "fla_core-0.6.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fla-core\nVersion: 0.6.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for cached in (fla.fla_version, fla._is_right):
        cached.cache_clear()
    try:
        assert [fla._is_right(torch.device("cpu")) for _ in range(2)] == [False, False]
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "fla"]:
            del sys.modules[name]
        for cached in (fla.fla_version, fla._is_right):
            cached.cache_clear()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "flash-linear-attention 0.6.0 isn't used: RuntimeError: its backward fails" in said and "3.7.1" in said
    assert "\n" not in said
