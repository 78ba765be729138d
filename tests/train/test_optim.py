"""Optimisers against torch and bitsandbytes, clipping, and states that go on bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from parallel.parts import Cut
from quant.common.errors import NibbleError
from train.optim import (
    NAMES,
    NonFiniteError,
    build_optimizer,
    check_loss,
    clip_gradients,
)
from train.state.fingerprint import START_OVER
from train.state.optimizer_state import OptimizerState, load_optimizer_state, optimizer_state

SHAPES = {"stack.A": (3, 16, 100), "matrix.A": (64, 72), "small.A": (8, 12), "norm.weight": (100,)}


def make_parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Above and below the 4096 values from which 8-bit states are kept, with a last block that isn't full."""
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def set_gradients(parameters: dict[str, nn.Parameter], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def run(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(parameters, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()


def through_json(state: OptimizerState) -> OptimizerState:
    """A copy as a file would give it back."""
    tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
    return OptimizerState(tensors, json.loads(json.dumps(state.values)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_resumed_state_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    whole = make_parameters(dtype)
    optimizer = build_optimizer(name, whole.items(), 0.01, weight_decay=0.1)
    run(whole, optimizer, range(5))

    first = make_parameters(dtype)
    interrupted = build_optimizer(name, first.items(), 0.01, weight_decay=0.1)
    run(first, interrupted, range(2))
    saved = through_json(optimizer_state(interrupted))
    second = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in first.items()}
    resumed = build_optimizer(name, second.items(), 0.01, weight_decay=0.1)
    load_optimizer_state(resumed, saved)
    run(second, resumed, range(2, 5))

    for key in whole:
        assert torch.equal(whole[key], second[key]), key
    expected, actual = optimizer_state(optimizer), optimizer_state(resumed)
    assert actual.values == expected.values
    assert actual.tensors.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        assert torch.equal(tensor, actual.tensors[key]), key


def test_saved_state_is_not_touched_by_the_resumed_run() -> None:
    parameters = make_parameters()
    optimizer = build_optimizer("adamw", parameters.items(), 0.01)
    run(parameters, optimizer, range(1))
    saved = through_json(optimizer_state(optimizer))
    copy = through_json(saved)
    load_optimizer_state(optimizer, saved)
    run(parameters, optimizer, range(1, 2))
    for key, tensor in copy.tensors.items():
        assert torch.equal(saved.tensors[key], tensor), key


def test_8bit_keeps_small_tensors_in_float32() -> None:
    parameters = make_parameters()
    optimizer = build_optimizer("adamw_8bit", parameters.items(), 0.01)
    run(parameters, optimizer, range(1))
    tensors = optimizer_state(optimizer).tensors
    assert tensors["state1.stack.A"].dtype == tensors["state2.matrix.A"].dtype == torch.uint8
    assert tensors["state1.small.A"].dtype == tensors["state2.norm.weight"].dtype == torch.float32
    assert "absmax1.stack.A" in tensors
    assert not any(name.startswith("qmap") for name in tensors)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_state_before_the_first_step_and_of_a_parameter_without_gradient(name: str) -> None:
    parameters = make_parameters()
    optimizer = build_optimizer(name, parameters.items(), 0.01)
    before = through_json(optimizer_state(optimizer))
    assert not any(tensor.any() for tensor in before.tensors.values())
    set_gradients(parameters, 0)
    parameters["small.A"].grad = None
    optimizer.step()
    saved = through_json(optimizer_state(optimizer))
    assert not any(tensor.any() for key, tensor in saved.tensors.items() if key.endswith("small.A"))
    # Versions before left it out.
    less = OptimizerState(
        {key: tensor for key, tensor in saved.tensors.items() if not key.endswith("small.A")},
        {**saved.values, "steps": {key: step for key, step in saved.values["steps"].items() if key != "small.A"}},
    )
    start = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    run(parameters, optimizer, range(1, 2))
    for state in (saved, less):
        copies = {key: nn.Parameter(tensor.clone()) for key, tensor in start.items()}
        resumed = build_optimizer(name, copies.items(), 0.01)
        load_optimizer_state(resumed, before)
        load_optimizer_state(resumed, state)
        run(copies, resumed, range(1, 2))
        assert all(torch.equal(copies[key], parameters[key]) for key in copies)


def test_adamw_keeps_float32_moments_for_bfloat16_parameters() -> None:
    """Updates equal those of torch's AdamW in float32, then rounded up or down."""
    parameters = make_parameters(torch.bfloat16)
    optimizer = build_optimizer("adamw", parameters.items(), 0.01, weight_decay=0.1)
    exact = {name: nn.Parameter(parameter.detach().float()) for name, parameter in parameters.items()}
    oracle = build_optimizer("adamw", exact.items(), 0.01, weight_decay=0.1)
    assert type(oracle) is torch.optim.AdamW
    set_gradients(parameters, 0)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        exact[name].grad = parameter.grad.float()
    optimizer.step()
    oracle.step()
    for name, tensor in optimizer_state(optimizer).tensors.items():
        assert tensor.dtype == torch.float32, name
    for name, parameter in parameters.items():
        difference = (parameter.float() - exact[name]).abs() / exact[name].abs().clamp(min=1e-3)
        assert difference.max() < 2**-7, name


def test_weight_decay_reaches_matrices_only() -> None:
    for name in ("adamw", "adamw_8bit"):
        parameters = make_parameters()
        before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
        optimizer = build_optimizer(name, parameters.items(), 0.5, weight_decay=0.1)
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for key, parameter in parameters.items():
            expected = before[key] if parameter.ndim == 1 else before[key] * (1 - 0.5 * 0.1)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


def test_frozen_parameters_are_left_out() -> None:
    parameters = make_parameters()
    parameters["stack.A"].requires_grad_(False)
    optimizer = build_optimizer("adamw", parameters.items(), 0.01)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert names == ["matrix.A", "small.A", "norm.weight"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize("max_norm", [0.5, 1e6, None])
def test_clipping_equals_torch(max_norm: float | None) -> None:
    parameters, oracle = make_parameters(), make_parameters()
    set_gradients(parameters, 0)
    set_gradients(oracle, 0)
    expected = float(torch.nn.utils.clip_grad_norm_(oracle.values(), max_norm or float("inf")))
    assert clip_gradients(parameters.items(), max_norm, 1) == pytest.approx(expected, rel=1e-6)
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, oracle[name].grad, rtol=1e-6, atol=0)


def test_norm_of_bfloat16_gradients_is_float32() -> None:
    parameters = make_parameters(torch.bfloat16)
    set_gradients(parameters, 0)
    everything = torch.cat([parameter.grad.double().flatten() for parameter in parameters.values()])  # type: ignore[union-attr]
    assert clip_gradients(parameters.items(), None, 1) == pytest.approx(float(everything.norm()), rel=1e-6)


def test_one_norm_of_parts_on_two_processes() -> None:
    whole = make_parameters()
    set_gradients(whole, 0)
    parts: list[dict[str, nn.Parameter]] = [{}, {}]
    for name, parameter in whole.items():
        # One tensor is whole on both; small.A lies on the first alone, and the second has no gradient for it.
        cut = 8 if name == "small.A" else 2
        gradient = parameter.grad
        assert gradient is not None
        for i, part in enumerate(parts):
            piece = slice(None) if name == "matrix.A" else slice(0, cut) if i == 0 else slice(cut, None)
            part[name] = nn.Parameter(parameter.detach()[piece])
            part[name].grad = None if part[name].numel() == 0 else gradient[piece].clone()

    squares: list[Tensor] = []
    for part in parts:  # what each would send

        def send(values: Tensor) -> Tensor:
            squares.append(values)
            return values

        clip_gradients(part.items(), None, 1, total=send, replicated={"matrix.A"})
    expected = clip_gradients(whole.items(), 1.0, 1)
    for part in parts:
        norm = clip_gradients(part.items(), 1.0, 1, total=lambda _: squares[0] + squares[1], replicated={"matrix.A"})
        assert norm == pytest.approx(expected, rel=1e-6)
    for name, parameter in whole.items():
        pieces = [gradient for part in parts if (gradient := part[name].grad) is not None]
        together = pieces[0] if name == "matrix.A" else torch.cat(pieces)
        torch.testing.assert_close(together, parameter.grad, rtol=1e-6, atol=0)


def test_a_process_that_holds_nothing() -> None:
    for name in ("adamw", "adamw_8bit"):
        empty = {"stack.A": nn.Parameter(torch.zeros(0, 100))}
        optimizer = build_optimizer(name, empty.items(), 0.01, parts={"stack.A": Cut((100, 100), 0, 100, 100)})
        empty["stack.A"].grad = torch.zeros(0, 100)
        assert clip_gradients(empty.items(), 1.0, 1, total=lambda squares: squares + 9.0) == 3.0
        optimizer.step()
        saved = optimizer_state(optimizer)
        assert saved.tensors == {}
        load_optimizer_state(optimizer, saved)


def test_settings_of_one_optimiser_are_not_those_of_another() -> None:
    parameter = nn.Parameter(torch.zeros(1000))
    for size, dtype in ((5000, torch.uint8), (None, torch.float32), (1000, torch.float32)):
        parts = {"a": Cut((size,), 0, 0, 1000)} if size is not None else None
        optimizer = build_optimizer("adamw_8bit", [("a", parameter)], 0.01, parts=parts)
        assert optimizer_state(optimizer).tensors["state1.a"].dtype == dtype, (
            "this version of bitsandbytes settles in another way, or elsewhere than in init_state, whether a state has "
            "8 bits: see _allocate_states"
        )
        parameter.grad = torch.ones(1000)
        optimizer.step()
        assert optimizer_state(optimizer).tensors["state1.a"].dtype == dtype
        assert optimizer_state(optimizer).values["steps"] == {"a": 1}
        assert parameter.detach().unique().numel() == 1 and parameter[0] < 0


def test_no_gradients_have_norm_zero() -> None:
    assert clip_gradients(make_parameters().items(), 1.0, 1) == 0.0


ADVICE = "Lower train.learning_rate or lengthen train.warmup_ratio, and look at the rows of this step."


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_gradient_names_the_tensor(value: float) -> None:
    parameters = make_parameters()
    set_gradients(parameters, 0)
    gradient = parameters["matrix.A"].grad
    assert isinstance(gradient, Tensor)
    gradient[3, 4] = value
    with pytest.raises(NonFiniteError) as caught:
        clip_gradients(parameters.items(), 1.0, 12)
    assert str(caught.value) == (
        f"step 12: the gradient of matrix.A is not finite ({value}). No weight was changed in this step.\n{ADVICE}"
    )
    small = parameters["small.A"].grad
    assert isinstance(small, Tensor)
    assert small.abs().max() > 1  # not clipped


def test_norm_too_large_for_float32() -> None:
    parameters = make_parameters()
    set_gradients(parameters, 0, scale=1e38)
    with pytest.raises(NonFiniteError, match=r"step 3: the gradient of stack.A is not finite \(inf\)"):
        clip_gradients(parameters.items(), 1.0, 3)


def test_non_finite_loss() -> None:
    check_loss(1.5, 7)
    with pytest.raises(NonFiniteError) as caught:
        check_loss(float("nan"), 7)
    assert str(caught.value) == f"step 7: the loss is not finite (nan). No weight was changed in this step.\n{ADVICE}"


# -------------------------------------------------------------------------------------------------------------- errors


def test_unknown_name() -> None:
    with pytest.raises(NibbleError) as caught:
        build_optimizer("adam", make_parameters().items(), 0.01)
    assert str(caught.value) == f"train.optimizer: 'adam' is unknown. Choose one of {', '.join(NAMES)}."


def test_nothing_to_train() -> None:
    with pytest.raises(NibbleError, match=r"nothing to train: no parameter requires a gradient\. Set adapter\.targets"):
        build_optimizer("adamw", [("a", nn.Parameter(torch.zeros(2), requires_grad=False))], 0.01)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_needs_cuda(name: str) -> None:
    with pytest.raises(NibbleError) as caught:
        build_optimizer(name, make_parameters().items(), 0.01)
    assert str(caught.value) == (
        f"train.optimizer: {name} needs CUDA (it pages its state between GPU and host); this run is on cpu.\n"
        f"Use {name.removeprefix('paged_')}, or train.device: cuda."
    )


def saved_after_one_step(name: str = "adamw", dtype: torch.dtype = torch.float32) -> OptimizerState:
    parameters = make_parameters(dtype)
    optimizer = build_optimizer(name, parameters.items(), 0.01)
    run(parameters, optimizer, range(1))
    return through_json(optimizer_state(optimizer))


def test_state_of_another_optimiser() -> None:
    with pytest.raises(NibbleError) as caught:
        load_optimizer_state(build_optimizer("adamw_8bit", make_parameters().items(), 0.01), saved_after_one_step())
    assert str(caught.value) == (
        "the checkpoint's optimiser is torch.AdamW, this run's is bitsandbytes.AdamW8bit.\n"
        f"Set train.optimizer (and the trained dtype) as they were, or {START_OVER}."
    )


def test_state_of_a_parameter_that_is_not_trained() -> None:
    parameters = make_parameters()
    del parameters["small.A"]
    with pytest.raises(NibbleError) as caught:
        load_optimizer_state(build_optimizer("adamw", parameters.items(), 0.01), saved_after_one_step())
    assert str(caught.value) == (
        "the checkpoint holds optimiser state of 1 parameter that this run doesn't train, such as small.A.\n"
        f"Train the same parameters, or {START_OVER}."
    )


@pytest.mark.parametrize(("name", "first"), [("adamw", "exp_avg"), ("adamw_8bit", "state1")])
def test_state_of_another_shape(name: str, first: str) -> None:
    parameters = make_parameters()
    parameters["matrix.A"] = nn.Parameter(torch.zeros(32, 144))
    with pytest.raises(NibbleError) as caught:
        load_optimizer_state(build_optimizer(name, parameters.items(), 0.01), saved_after_one_step(name))
    dtype = "float32" if name == "adamw" else "uint8"
    assert str(caught.value) == (
        "the checkpoint's optimiser state of matrix.A doesn't fit:"
        f" {first} is [64, 72] {dtype}, here [32, 144] {dtype}.\n"
        f"Train the same parameters in the same dtype, or {START_OVER}."
    )


def test_state_that_lacks_something_or_has_too_much() -> None:
    for name, key in (("adamw", "exp_avg_sq"), ("adamw", "step"), ("adamw_8bit", "absmax2")):
        saved = saved_after_one_step(name)
        del saved.tensors[f"{key}.stack.A"]
        with pytest.raises(NibbleError, match=f"state of stack.A doesn't fit: it lacks {key}.\n"):
            load_optimizer_state(build_optimizer(name, make_parameters().items(), 0.01), saved)
    saved = saved_after_one_step("adamw_8bit")
    saved.tensors["extra.stack.A"] = torch.zeros(1)
    with pytest.raises(NibbleError, match="it has extra, which this optimiser doesn't keep"):
        load_optimizer_state(build_optimizer("adamw_8bit", make_parameters().items(), 0.01), saved)
