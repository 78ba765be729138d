"""benchmarks.launches: what a training step launches per layer today, its waits, and the counting itself."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import growth, launches, launches_step
from benchmarks.launches_cases import LaunchCase, full_config, targets_of
from benchmarks.launches_step import META, build, measure, supply_rows
from benchmarks.operations import ALLOCATION, Recorder, Total
from models.adapters.lora import trainable_parameters
from models.blocks.documents import Documents
from models.experts.dense import as_fit
from parallel.shards import Shards
from quant.kernels.choice import KERNELS, using
from train.data.batches import make_batch
from train.loop import training_step
from train.optim import build_optimizer

# Launches of each of the first layers at full width, 2 × 2048 tokens, nf4, bfloat16 LoRA of rank 32, recomputation.
# The first layer needs no gradient for its input. What changes a number here changes docs/performance.md too.
FEW_LAYERS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "glm4_moe_lite": ({"num_hidden_layers": 2}, [82, 126]),
    "glm4_moe": ({"num_hidden_layers": 2}, [54, 152]),
    "glm_moe_dsa": ({"num_hidden_layers": 2, "first_k_dense_replace": 1}, [91, 447]),
    # In a window, full.
    "afmoe": ({"num_hidden_layers": 2, "num_dense_layers": 0, "global_attn_every_n_layers": 2}, [114, 116]),
    "qwen3_moe": ({"num_hidden_layers": 2}, [82, 84]),
    # Gated delta rule, attention.
    "qwen3_5_moe": ({"num_hidden_layers": 2, "full_attention_interval": 2}, [143, 118]),
}


@pytest.mark.parametrize("arch", FEW_LAYERS)
def test_launches_of_every_architecture(arch: str) -> None:
    """With our own kernels. Nothing in a layer waits for the device: a tensor without values would raise."""
    fewer, expected = FEW_LAYERS[arch]
    step = measure(LaunchCase(full_config(arch) | fewer, targets=targets_of(arch)))
    assert step.layers == expected
    assert step.moe and step.waits == 0
    assert step.total.launches == sum(step.layers) + step.rest


@pytest.mark.parametrize(
    ("storage", "dtype", "kernels", "expected"),
    [("nf4", "float32", "triton", 140), ("int8", "bfloat16", "triton", 126), ("nf4", "bfloat16", "torch", 588)],
)
def test_launches_of_storages_dtypes_and_torch_forms(storage: str, dtype: str, kernels: str, expected: int) -> None:
    step = measure(LaunchCase(full_config("glm4_moe_lite", 2), storage, dtype, kernels=kernels))
    assert step.layers[1] == expected
    # In torch's forms a layer with experts waits once a step, and not when it is computed again.
    assert step.waits == (0 if kernels == "triton" else 1)


def test_the_one_wait_of_the_torch_forms_is_for_the_rows_of_experts() -> None:
    model = build(LaunchCase(full_config("qwen3_moe", 1)))
    tokens, documents = torch.empty(64, dtype=torch.int64, device=META), Documents.from_lengths([64], META)
    with pytest.raises((NotImplementedError, RuntimeError)) as caught:
        model.hidden(tokens, documents)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert [frame.name for frame in frames if "/models/" in frame.filename][-1] == "on_host"
    (share,) = supply_rows(model)
    model.hidden(tokens, documents).sum().backward()
    assert share.waits == 1


def test_a_step_waits_once_for_loss_and_norm() -> None:
    """When everything before the update is queued, for micro-batches of any number."""
    model = build(LaunchCase(full_config("qwen3_moe", 1)))
    optimizer = build_optimizer("adamw_8bit", trainable_parameters(model), 1e-3)
    batch = make_batch([([1] * 64, [False] + [True] * 63)], [0])
    with using(KERNELS), pytest.raises((NotImplementedError, RuntimeError)) as caught:
        training_step(Shards(model), optimizer, [batch, batch], step=1, max_grad_norm=1.0, device=META)
    (frame,) = [frame for frame in traceback.extract_tb(caught.value.__traceback__) if "/train/optim" in frame.filename]
    assert frame.name == "measure_gradients" and frame.line is not None and ".tolist()" in frame.line
    assert all(parameter.grad is not None for _, parameter in trainable_parameters(model))
    for _ in range(2):  # the update waits for nothing
        optimizer.step()


def test_the_command_prints_and_writes_what_it_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "launches.json"
    argv = ["--arch", "qwen3_moe", "--layers", "1", "--storage", "none", "--length", "256", "--json", str(file)]
    assert launches.main(argv) == 0
    (kept,) = json.loads(file.read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert f"{kept['total']['launches']:,}" in printed and "Qwen3-30B-A3B, 1 layers, none" in printed
    # Of each of 4 stacks of experts, and of attention's side by side (zeros, a copy): to float32, the update, rounding.
    assert kept["update"] == 4 * 3 + 2 + 3
    assert kept["peak"] > kept["weights"] > 2 * 128 * 3 * 768 * 2048
    assert "dequantize_4bit" not in kept["operators"]
    assert launches.main(["--layers", "0"]) == 2


def test_products_count_the_operations_that_torch_counts() -> None:
    a, b = (torch.empty(3, 5, 7, device=META), torch.empty(3, 7, 11, device=META))
    total = torch.empty(5, 9, device=META)

    def multiply() -> None:
        torch.bmm(a, b)
        torch.addmm(total, a[0], torch.empty(7, 9, device=META), alpha=0.5)
        torch.mm(a[1], b[1], out=torch.empty(5, 11, device=META))

    with FlopCounterMode(display=False) as expected:
        multiply()
    with Recorder() as recorder:
        multiply()
    assert _sum(recorder).operations == expected.get_total_flops()


def test_launches_bytes_and_memory_of_single_operations() -> None:
    x = torch.empty(64, 1024, device=META)
    recorder = Recorder()
    recorder.follow([x])
    before = recorder.live
    assert before == 4 * 64 * 1024
    with recorder:
        y = x.view(-1)[: 10 * 1024].unflatten(0, (10, 1024)).t()  # views and an allocation launch nothing
        scratch = torch.empty(3, device=META)
        assert _sum(recorder) == Total()
        assert recorder.live == before + ALLOCATION
        doubled = y * 2.0
        assert _sum(recorder).bytes == 2 * 4 * 10 * 1024
        doubled.add_(y)
        assert _sum(recorder).launches == 2 and _sum(recorder).bytes == 5 * 4 * 10 * 1024
        peak = recorder.peak
        del doubled, scratch
    assert recorder.live == before < peak == recorder.peak


def _sum(recorder: Recorder) -> Total:
    total = Total()
    for one in recorder.totals.values():
        total.add(one)
    return total


@pytest.mark.parametrize(
    ("experts", "hidden", "width", "chunk"),
    [(64, 2048, 1536, 32), (256, 2048, 512, 128), (128, 2048, 1024, 64), (256, 6144, 2048, 10), (8, 128, 64, 8)],
)
def test_as_many_experts_at_a_time_as_fit(experts: int, hidden: int, width: int, chunk: int) -> None:
    """At most 512 MiB of the larger stack, chunks alike."""
    assert as_fit(experts, 2 * width * hidden, torch.bfloat16) == chunk
    assert 2 * 2 * chunk * width * hidden <= 512 * 2**20


def test_growth_is_counted_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count itself is held by the tests above."""

    def counted(case: LaunchCase) -> Any:
        return SimpleNamespace(total=Total(case.rank, seconds=0.5), peak=case.rank << 30)

    monkeypatch.setattr(launches_step, "measure", counted)
    figures, picture = tmp_path / "rank.json", tmp_path / "rank.svg"
    options = ["--values", "8", "64", "--json", str(figures), "--plot", str(picture)]
    assert growth.main(["rank", *options]) == 0
    found = json.loads(figures.read_text(encoding="utf-8"))
    assert [(point["kernels"], point["value"], point["launches"], point["peak"]) for point in found] == [
        ("triton", 8, 8, 8), ("triton", 64, 64, 64), ("torch", 8, 8, 8), ("torch", 64, 64, 64)
    ]  # fmt: skip
    assert "64, torch's forms" in capsys.readouterr().out
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    assert growth.case_of("tokens", 8192, "torch", None).sequences == 8
    assert growth.case_of("length", 8192, "torch", None).length == 8192
    assert growth.case_of("experts", 8, "torch", 2).config["n_routed_experts"] == 8
    assert growth.main(["rank", "--values", "0"]) == 2
    assert growth.main(["rank", "--plot", str(tmp_path / "rank.txt")]) == 2
