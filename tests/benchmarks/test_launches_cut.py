"""What one process launches of a model that several hold, and where it waits for the device."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from benchmarks.launches_cases import LaunchCase, full_config
from benchmarks.launches_cut import CPU, EqualExchange, cut
from benchmarks.launches_step import Step, build, measure
from models.experts.block import Experts
from parallel.exchange import ExpertExchange
from parallel.world import World
from quant.fourbit import code
from quant.kernels.choice import KERNELS, using
from train.data.batches import make_batch
from train.loop import training_step
from train.optim import build_optimizer

LAYERS = 1
GATHERS = 2 * LAYERS + 3  # layers twice; embedding, head and final norm once
FSDP2 = {
    "all_gather_copy_in": GATHERS, "_allgather_base_": GATHERS, "split_with_sizes_copy": GATHERS,
    "chunk_cat": LAYERS, "_reduce_scatter_base_": LAYERS, "_to_copy": LAYERS,  # summed in float32
}  # fmt: skip


def step_of(processes: int, expert: int = 1) -> Step:
    return measure(LaunchCase(full_config("qwen3_moe", LAYERS), processes=processes, expert=expert))


def test_a_cut_model_launches_what_one_process_does_and_fsdp2s_own() -> None:
    """And so computes with the same kernels. A wait for the device would raise."""
    alone, one = step_of(1), step_of(2)
    counts, counts_alone = ({name: total.launches for name, total in step.operators.items()} for step in (one, alone))
    more = {name: count - counts_alone.get(name, 0) for name, count in counts.items()}
    # Less only of what makes tables when they are first needed.
    assert {name: count for name, count in more.items() if count > 0} == FSDP2
    kernels = {name: count for name, count in counts_alone.items() if name in KERNELS}
    assert {name: count for name, count in counts.items() if name in KERNELS} == kernels
    assert {"grouped_product", "dequantise_four_bit"} <= kernels.keys()
    assert one.weights == pytest.approx(alone.weights / 2, rel=1e-3)
    assert not isinstance(code("nf4", CPU), torch._subclasses.FakeTensor)


def test_an_exchange_waits_once_a_layer_for_what_it_sends() -> None:
    """Not in the recomputation and the backward pass. Nine messages a layer: the counts; rows and weights to the
    experts and again in the recomputation, and rows back; three in the backward pass.
    """
    step = step_of(2, expert=2)
    assert step.waits == LAYERS
    assert step.operators["alltoall_base_"].launches == 9 * LAYERS
    assert step.per_moe_layer < 180


@pytest.mark.parametrize("expert", [1, 2])
def test_a_step_of_a_cut_model_waits_once_at_its_end(expert: int) -> None:
    class Known(World):
        """The numbers of labels and tokens are in host memory, where processes sum them."""

        def sum(self, tensor: Tensor) -> Tensor:
            return tensor if tensor.is_floating_point() else numbers

    numbers = torch.tensor([126, 128])
    model = build(LaunchCase(full_config("qwen3_moe", 1)))
    batch = make_batch([([1] * 64, [False] + [True] * 63)], [0])
    with using(KERNELS), cut(model, 2, expert) as shards:
        optimizer = build_optimizer("adamw", shards.parameters, 1e-3)
        with pytest.raises(DataDependentOutputException) as caught:
            training_step(shards, optimizer, [batch, batch], step=1, max_grad_norm=1.0, device=CPU, world=Known())
        frames = [frame for frame in traceback.extract_tb(caught.value.__traceback__) if "/train/" in frame.filename]
        assert frames[-1].name == "measure_gradients" and ".tolist()" in str(frames[-1].line)
        assert all(parameter.grad is not None for _, parameter in shards.parameters)
    exchanges = [module.exchange for module in model.modules() if isinstance(module, Experts)]
    assert [exchange.waits for exchange in exchanges if isinstance(exchange, EqualExchange)] == [2] * (expert - 1)


def test_the_wait_of_an_exchange_is_for_its_counts() -> None:
    model = build(LaunchCase(full_config("qwen3_moe", 1)))
    batch = make_batch([([1] * 64, [True] * 64)], [0])
    with using(KERNELS), cut(model, 2, 2):
        for module in model.modules():
            if isinstance(module, Experts):
                assert isinstance(module.exchange, EqualExchange)
                module.exchange = ExpertExchange(module.exchange.group, module.exchange.experts)
        with pytest.raises(DataDependentOutputException) as caught:
            model.hidden(batch.tokens, batch.documents)
    frames = [frame for frame in traceback.extract_tb(caught.value.__traceback__) if "/parallel/" in frame.filename]
    assert frames[-1].name == "on_host"
