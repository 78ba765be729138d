"""Small tensors updated together, bit for bit as bitsandbytes updates each, those of bfloat16 as in float32 and then
rounded stochastically; launches of an update and of clipping."""

from __future__ import annotations

from collections import Counter
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.parts import Cut
from quant.common.errors import NibbleError
from quant.kernels.choice import using
from quant.kernels.rounding import keys_of, round_stochastically
from train import blockwise
from train.optim import build_optimizer, clip_gradients
from train.state.optimizer_state import load_optimizer_state, optimizer_state

# 8-bit states from 4096 values on. Blocks that are full, that hold one value, and all but one; matrices and vectors.
SHAPES = {
    "a": (3, 16, 100), "b": (64, 64), "c": (1, 4097), "d": (8, 12), "e": (17, 241), "f": (4351,), "g": (100,),
    "h": (2, 2304), "i": (1, 1), "j": (70, 70), "k": (300, 300),
}  # fmt: skip
DTYPES = {name: torch.float32 if name in "dj" else torch.bfloat16 for name in SHAPES}
ORACLES = {"adamw": bitsandbytes.optim.AdamW, "adamw_8bit": bitsandbytes.optim.AdamW8bit}
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-6}
SEED = 7


def make_parameters(dtypes: dict[str, torch.dtype]) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[name])) for name, shape in SHAPES.items()
    }


def in_float32(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(parameter.detach().float()) for name, parameter in parameters.items()}


def oracle_of(name: str, parameters: dict[str, nn.Parameter]) -> Any:
    matrices = [(key, x) for key, x in parameters.items() if x.ndim > 1]
    vectors = [(key, x) for key, x in parameters.items() if x.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return ORACLES[name](groups, lr=0.01, **OPTIONS)


def set_gradients(parameters: dict[str, nn.Parameter], step: int, absent: str = "") -> None:
    """Of very different sizes, and values of bfloat16; one row of zeros, of which no block may make anything else."""
    generator = torch.Generator().manual_seed(100 + step)
    for number, (name, parameter) in enumerate(parameters.items()):
        gradient = torch.randn(parameter.shape, generator=generator) * 10.0 ** (number - 5)
        if parameter.ndim > 1:
            gradient[0] = 0
        parameter.grad = None if name in absent else gradient.bfloat16().to(parameter.dtype)


def set_rate(optimizer: Any, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.01 / (1 + step)


def same(a: Tensor, b: Tensor) -> bool:
    """In every bit: the sign of zero too."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def as_rounded(
    theirs: dict[str, nn.Parameter], ours: dict[str, nn.Parameter], steps: dict[str, int]
) -> dict[str, Tensor]:
    """Flat float32 results, rounded where ours are bfloat16: numbers count on from tensor to tensor."""
    first, result = 0, {}
    for name, parameter in theirs.items():
        result[name] = parameter.detach().flatten()
        if ours[name].dtype == torch.bfloat16:
            result[name] = torch.empty(parameter.numel(), dtype=torch.bfloat16)
            round_stochastically(parameter.detach().flatten(), first, keys_of(SEED, steps[name]), out=result[name])
        first += parameter.numel()
    return result


def assert_same(ours: dict[str, nn.Parameter], optimizer: Any, theirs: dict[str, nn.Parameter], oracle: Any) -> None:
    """theirs: float32, which then goes on from ours."""
    steps = {name: optimizer.state[parameter]["step"] for name, parameter in ours.items()}
    for name, expected in as_rounded(theirs, ours, steps).items():
        assert same(ours[name].detach().view(-1), expected), name
    for name, parameter in theirs.items():
        expected, actual = oracle.state[parameter], optimizer.state[ours[name]]
        # What had no gradient yet has no state there.
        for key, value in expected.items():
            if isinstance(value, Tensor):
                assert same(actual[key].view(-1), value.view(-1)), (name, key)
            else:
                assert actual[key] == value, (name, key)
        parameter.data.copy_(ours[name].data)


@pytest.mark.parametrize(
    ("name", "mixed", "together"),
    [
        ("adamw", True, 2**18),
        ("adamw_8bit", False, 2**18),
        ("adamw_8bit", True, 2**18),
        ("adamw_8bit", False, 20_000),
        ("adamw_8bit", True, 20_000),
    ],
)
def test_bit_for_bit_what_bitsandbytes_gives(
    name: str, mixed: bool, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where some have no gradient in some steps, and after going on from a saved state. Bfloat16 parameters then
    are those that it gives in float32, rounded, and their states its own.
    """
    monkeypatch.setattr(blockwise, "CPU_TOGETHER", together)
    dtypes = DTYPES if mixed else dict.fromkeys(SHAPES, torch.float32)
    ours = make_parameters(dtypes)
    theirs = in_float32(ours)
    optimizer = build_optimizer(name, ours.items(), 0.01, weight_decay=0.1, seed=SEED, **OPTIONS)
    oracle = oracle_of(name, theirs)
    assert len({ours[key].untyped_storage().data_ptr() for key in ("a", "b", "c", "e")}) == 1
    for step, absent in enumerate(("", "bi", "c", "", "abcdefghij", "", "j", "", "")):
        if step == 5:
            # Checkpoints hold what they held when bitsandbytes made every step, so that either goes on from either's.
            saved, expected = optimizer_state(optimizer), optimizer_state(oracle)
            assert saved.values == expected.values and saved.tensors.keys() == expected.tensors.keys()
            assert all(same(saved.tensors[key], value) for key, value in expected.tensors.items())
            again = {key: nn.Parameter(parameter.detach().clone()) for key, parameter in ours.items()}
            resumed = build_optimizer(name, again.items(), 0.01, weight_decay=0.1, seed=SEED, **OPTIONS)
            load_optimizer_state(resumed, expected)
            ours, optimizer = again, resumed
        for parameters, one in ((ours, optimizer), (theirs, oracle)):
            set_gradients(parameters, step, absent)
            set_rate(one, step)
            one.step()
        assert_same(ours, optimizer, theirs, oracle)


def test_gradients_of_zero_leave_scales_alone() -> None:
    dtypes = dict.fromkeys(SHAPES, torch.float32)
    ours, theirs = make_parameters(dtypes), make_parameters(dtypes)
    optimizer = build_optimizer("adamw_8bit", ours.items(), 0.01, weight_decay=0.1, **OPTIONS)
    oracle = oracle_of("adamw_8bit", theirs)
    for step in range(4):
        for parameters, one in ((ours, optimizer), (theirs, oracle)):
            set_gradients(parameters, step)
            if step in (0, 2):
                for parameter in parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
            set_rate(one, step)
            one.step()
        assert_same(ours, optimizer, theirs, oracle)


class Dispatched(TorchDispatchMode):
    """Counts operators by name, those that only look at memory in another way left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in ("view", "slice", "detach", "unsqueeze") and not name.startswith("_record_function"):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_launches_of_an_update_and_of_clipping(name: str) -> None:
    """654 LoRA tensors on the meta device, which takes the accelerator's way and has nothing to wait for."""
    small, large = (64, 100), (64, 32, 512)
    parameters = [(f"{i}", nn.Parameter(torch.empty(small, dtype=torch.bfloat16, device="meta"))) for i in range(650)]
    parameters += [(f"large{i}", nn.Parameter(torch.empty(large, dtype=torch.bfloat16, device="meta"))) for i in "1234"]
    optimizer = build_optimizer(name, parameters, 1e-3)
    for _, parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    with using(("stochastic_rounding",)), Dispatched() as counted:
        optimizer.step()
    kind = "optimizer_update_32bit" if name == "adamw" else "optimizer_update_8bit_blockwise"
    launches = {"new_zeros": 1, "_foreach_copy_": 1 + 5, kind: 5, "stochastic_rounding": 5}
    assert counted.names == {**launches, "new_empty": 2 * 5}  # which launches nothing

    on_cpu = [(key, nn.Parameter(torch.zeros(2, 3))) for key, _ in parameters]
    for _, parameter in on_cpu:
        parameter.grad = torch.ones_like(parameter)
    with Dispatched() as counted:
        clip_gradients(on_cpu, 1.0, 1)
    assert counted.names["_foreach_norm"] == counted.names["_foreach_mul_"] == 1
    assert sum(counted.names.values()) <= 12, counted.names


def test_what_is_moved_meanwhile_is_updated_where_it_is() -> None:
    dtypes = dict.fromkeys(SHAPES, torch.float32)
    ours, theirs = make_parameters(dtypes), make_parameters(dtypes)
    optimizer = build_optimizer("adamw_8bit", ours.items(), 0.01, weight_decay=0.1, **OPTIONS)
    oracle = oracle_of("adamw_8bit", theirs)
    for step in range(2):
        ours["c"].data = ours["c"].data.clone()
        for parameters, one in ((ours, optimizer), (theirs, oracle)):
            set_gradients(parameters, step)
            one.step()
        assert_same(ours, optimizer, theirs, oracle)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_step_of_bfloat16_moves_what_rounding_to_the_nearest_would_leave(name: str) -> None:
    """Updates of 2⁻¹² of the weights."""
    parameter = nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
    optimizer = build_optimizer(name, [("a", parameter)], 2**-12)
    for _ in range(40):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert abs(float(parameter.detach().double().mean()) - (1 - 40 * 2**-12)) < 2e-4


@pytest.mark.parametrize(("name", "dim", "parts"), [("adamw", 0, 3), ("adamw_8bit", 0, 2), ("adamw_8bit", 1, 2)])
def test_parts_draw_what_the_whole_draws_and_copies_of_a_part_the_same(name: str, dim: int, parts: int) -> None:
    """Tensors before it are cut too. Blocks of 8-bit states are here those of the whole; along another dimension they
    aren't, and a copy of the part, as another group of processes holds it, is what there is to compare.
    """
    shape = {"before": (6, 50), "a": (6, 4 * 256)}
    whole = {
        key: torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16() for key, size in shape.items()
    }
    gradient = {
        key: torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16() for key, size in shape.items()
    }

    def after(cut: tuple[int, int] | None) -> Tensor:
        """The second tensor, or a part of it, after two steps."""
        held = {}
        for key, size in shape.items():
            start, stop = (
                (0, size[dim]) if cut is None else (size[dim] * cut[0] // cut[1], size[dim] * (cut[0] + 1) // cut[1])
            )
            held[key] = Cut(size, dim, start, stop)
        parameters = {
            key: nn.Parameter(whole[key].narrow(dim, each.start, each.stop - each.start).clone())
            for key, each in held.items()
        }
        optimizer = build_optimizer(name, parameters.items(), 0.01, parts=held if cut is not None else None)
        for _ in range(2):
            for key, each in held.items():
                parameters[key].grad = gradient[key].narrow(dim, each.start, each.stop - each.start).clone()
            optimizer.step()
        return parameters["a"].detach()

    pieces = [after((part, parts)) for part in range(parts)]
    assert all(torch.equal(piece, after((part, parts))) for part, piece in enumerate(pieces))
    if dim == 0:
        assert torch.equal(torch.cat(pieces), after(None))


def test_parts_of_others_memory_stay_where_they_are() -> None:
    parameters = make_parameters(dict.fromkeys(SHAPES, torch.float32))
    before = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    build_optimizer("adamw_8bit", parameters.items(), 0.01, parts={})
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == before
    build_optimizer("adamw_8bit", parameters.items(), 0.01)
    moved = {name for name, parameter in parameters.items() if parameter.data_ptr() != before[name]}
    assert moved == {name for name, parameter in parameters.items() if parameter.numel() < blockwise.CPU_TOGETHER // 4}


def test_what_torchs_optimisers_do_and_this_one_cannot_is_refused() -> None:
    optimizer = build_optimizer("adamw_8bit", make_parameters(DTYPES).items(), 0.01)
    with pytest.raises(NibbleError, match=r"Use train\.state\.optimizer_state\.load"):
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(NibbleError, match="build another one, over all of them"):
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.zeros(3)))]})
