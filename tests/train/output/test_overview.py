"""What a run on several processes says of itself before its first step."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec
from models.registry import ARCHITECTURES
from parallel.mesh import MeshSizes
from quant.storage import StorageSpec
from tests.dist_workers.overview import plan, table, tiny_model
from tests.processes import run_processes
from tests.tiny import TINY
from train.output import overview
from train.output.parameter_table import parameter_table, whole_tensors

CPU = torch.device("cpu")
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
CASES = [
    ["nf4", 4, [1, 1, 2]],
    ["nf4", 4, [1, 2, 1]],
    ["int8", 4, [2, 1, 1]],
    ["none", 0, [1, 2, 1]],
]


def sizes_in(text: str) -> dict[str, float]:
    """What precedes each size in a text, and the size in bytes."""
    memory = text[text.index("  memory ") :].replace("\n", " ").replace("each process: ", "").replace("memory ", "")
    found = re.findall(r"(\w[\w ,]*?) ([\d.]+) (B|KiB|MiB|GiB)", memory)
    return {words.split()[-1]: float(number) * UNITS[unit] for words, number, unit in found}


@pytest.fixture(scope="module")
def cut() -> list[Any]:
    """By case and rank: table, first text, plan."""
    by_rank = run_processes(2, "tests.dist_workers.overview:shown", CASES)
    return list(zip(*by_rank, strict=True))


def test_the_table_is_the_same_whatever_is_held(cut: list[Any]) -> None:
    for (storage, rank, _), shown in zip(CASES, cut, strict=True):
        expected = json.loads(json.dumps(table(tiny_model(storage, rank))))
        assert expected[-1][4] > 0
        for rows, _, _ in shown:
            assert rows == expected


def test_the_processes_are_said(cut: list[Any]) -> None:
    threads = r"\d+ threads?"
    for (_, _, sizes), shown in zip(CASES, cut, strict=True):
        for _, text, _ in shown:
            assert re.search(rf" · 2 × .*, {threads} each$", text.splitlines()[0])
            replicate, expert, shard = sizes
            share = "1/2 of the weights" if replicate == 1 else "the whole model"
            line = f"  processes 2 = {replicate} replicate × {expert} expert × {shard} shard; each holds {share}"
            assert f"\n{line}\n" in text


def test_a_process_holds_its_part_of_everything(cut: list[Any]) -> None:
    for (storage, rank, sizes), shown in zip(CASES, cut, strict=True):
        full = [] if rank else ["adapter.kind=none", "model.storage=none"]
        whole = sizes_in(plan(tiny_model(storage, rank), None, *full))
        assert set(whole) == {"weights", "gradients", "optimiser", *(["LoRA"] if rank else [])}
        for name, size in whole.items():
            held = sum(sizes_in(text)[name] for _, _, text in shown) / sizes[0]
            # Replicated are single numbers, routers among trained bfloat16 weights, and buffers. Scales of optimiser
            # blocks are rounded up in every part.
            assert size * 0.99 <= held <= size * 1.04, (storage, sizes, name, size, held)
        for _, _, text in shown:
            assert re.search(
                r"  memory    each process: weights .*; on top come\n {12}at most \S+ KiB of gathered", text
            )


@pytest.mark.parametrize("model_type", [name for name in TINY if name != "qwen3_5_moe"])  # as its text model
@pytest.mark.parametrize("storage", ["nf4", "none"])
def test_whole_tensors_are_those_of_an_uncut_model(model_type: str, storage: Any) -> None:
    architecture = ARCHITECTURES[model_type]
    config = architecture.parse_config(dict(TINY[model_type]), "tiny")
    model = architecture.build(config, StorageSpec(storage), torch.bfloat16, "meta")
    if storage == "nf4":
        add_lora(model, AdapterSpec(("attention", "experts", "router"), {"attention": 4, "experts": 2, "router": 1}, 1))
    else:
        model.requires_grad_(True)
    held = dict((*model.named_parameters(), *model.named_buffers()))
    tensors = whole_tensors(model)
    assert {tensor.name for tensor in tensors} == held.keys() and len(tensors) == len(held)
    for tensor in tensors:
        actual = held[tensor.name]
        assert (tensor.shape, tensor.dtype) == (tuple(actual.shape), actual.dtype), tensor.name
        assert (tensor.trained, tensor.nbytes) == (actual.requires_grad, actual.nbytes), tensor.name
        assert tensor.lora == (".lora." in tensor.name)
    total = parameter_table(model)[-1]
    assert total.trained == sum(parameter.numel() for _, parameter in trainable_parameters(model))
    assert total.nbytes == sum(tensor.nbytes for name, tensor in held.items() if ".lora." not in name)


# --- what is gathered


def layers_of(model: Any, experts: int = 1) -> dict[str, list[int]]:
    """Bytes by what stands before the name of a tensor: weights and gradients; experts divided by `experts`."""
    found: dict[str, list[int]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        unit = ".".join(name.split(".")[:3]) if ".layers." in name else name
        size = tensor.nbytes // (experts if ".experts." in name else 1)
        weights, gradients = found.get(unit, (0, 0))
        found[unit] = [weights + size, gradients + size * tensor.requires_grad]
    return found


@pytest.mark.parametrize("sizes", [MeshSizes(1, 1, 4), MeshSizes(1, 2, 2), MeshSizes(2, 4, 1)])
@pytest.mark.parametrize(("storage", "rank"), [("nf4", 4), ("none", 0)])
def test_at_most_two_layers_and_the_head_are_gathered(storage: str, rank: int, sizes: MeshSizes) -> None:
    model = tiny_model(storage, rank)
    units = layers_of(model, sizes.expert)
    layers = [units[f"model.layers.{layer}"] for layer in range(3)]
    two = [sum(sorted(column)[1:]) for column in zip(*layers, strict=True)]
    kept = [units["lm_head.weight.value"][i] + units["model.norm.weight"][i] for i in (0, 1)]
    embedding = units["model.embed_tokens.weight"]
    peak = sum(kept) + max(embedding[0], two[0]) + max(embedding[1], two[1])
    full = ["adapter.kind=none", "model.storage=none"] if storage == "none" else []
    text = plan(model, sizes, *full)
    assert f"at most {overview.format_bytes(peak)} of gathered layers and their gradients, and activations\n" in text

    everything = sum(size for size, _ in units.values()) + kept[1] + max(embedding[1], two[1])
    text = plan(model, sizes, "parallel.reshard_after_forward=false", *full)
    assert f"at most {overview.format_bytes(everything)} of gathered" in text


def test_offloaded_parts_are_in_host_memory() -> None:
    text = plan(tiny_model("nf4", 4), MeshSizes(), "parallel.cpu_offload=true")
    assert re.search(
        r"  memory    weights .*, optimiser [\d.]+ KiB,\n            in host memory; on the device are at most ", text
    )
    assert max(map(len, text.splitlines())) <= 120


# --- words


def test_one_process_says_nothing_of_processes() -> None:
    for sizes in (None, MeshSizes()):
        text = overview.model_text(tiny_model("nf4", 4), "tiny", Path("tiny"), CPU, sizes)
        assert "processes" not in text and " × " not in text.splitlines()[0]
    plain = plan(tiny_model("nf4", 4), None)
    assert "each process" not in plain and "gathered" not in plain and "warning" not in plain


def test_title_of_many_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "device_name", lambda device: "NVIDIA H100")
    model, cuda, folder = tiny_model("nf4", 4), torch.device("cuda:0"), Path("tiny")
    text = overview.model_text(model, "tiny", folder, cuda, MeshSizes(2, 2, 4), machines=2)
    assert text.splitlines()[0].endswith(" · 16 × NVIDIA H100 (2 machines)")
    assert "  processes 16 = 2 replicate × 2 expert × 4 shard; each holds 1/8 of the weights\n" in text
    text = overview.model_text(model, "tiny", folder, cuda, MeshSizes(4, 1, 1))
    assert text.splitlines()[0].endswith(" · 4 × NVIDIA H100")
    assert "each holds the whole model\n" in text
    assert overview.model_text(model, "tiny", folder, cuda).splitlines()[0].endswith(" · 1 × NVIDIA H100")


@pytest.mark.parametrize(
    ("micro", "accumulation", "processes", "warning"),
    [
        (2, 4, 8, None),
        (2, 4, 4, None),
        (2, 2, 8, "4 of 8 processes get no rows: 4 sequences a step, distributed 1 at a time."),
        (2, 3, 4, "1 of 4 processes get no rows: 6 sequences a step, distributed 2 at a time."),
        (1, 1, 2, "1 of 2 processes get no rows: 1 sequence a step, distributed 1 at a time."),
        (1, 1, 1, None),
    ],
)
def test_processes_without_work(micro: int, accumulation: int, processes: int, warning: str | None) -> None:
    overrides = (f"train.micro_batch_size={micro}", f"train.gradient_accumulation={accumulation}")
    text = plan(tiny_model("nf4", 4), MeshSizes(1, 1, processes), *overrides)
    fix = f"            Raise train.gradient_accumulation (it is {accumulation}), or start fewer processes.\n"
    assert ("no rows" in text) == (warning is not None)
    assert warning is None or f"  warning   {warning}\n{fix}" in text
