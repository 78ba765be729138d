"""The figures of docs/distributed.md, computed again from the sizes of the published models, and what it quotes."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch

from models.adapters.lora import add_lora
from models.adapters.targets import AdapterSpec
from models.checkpoint.keymap import KeyMap, key_map_of
from models.decoder import CausalLM
from models.experts.block import Experts
from models.registry import architecture_for
from parallel.mesh import MeshSizes
from parallel.parts import bounds
from parallel.plan import cuts
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.train.config.test_configs import PUBLISHED
from train.config.load import config_schema
from train.config.schema import keys

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
GIB, MIB, KIB = 2**30, 2**20, 2**10
RANK = 16
MODELS = {
    "GLM-4.7-Flash": ("zai-org/GLM-4.7-Flash", ("attention", "experts")),
    "Qwen3.5-35B-A3B": ("Qwen/Qwen3.5-35B-A3B", ("attention", "linear_attention", "experts")),
    "Trinity-Mini": ("arcee-ai/Trinity-Mini", ("attention", "experts")),
}
CHOSEN = {"GLM-4.7-Flash": 4, "Qwen3.5-35B-A3B": 8, "Trinity-Mini": 8}  # experts per token
# Rows that travel for each of a token's choices, in a layer and pass: there and back, there once more in the
# recomputation, and both ways in the backward pass. And how often a layer is gathered, and its gradients reduced.
TRIPS, GATHERS, REDUCTIONS = 5, 2, 1


@functools.cache
def model_of(name: str) -> tuple[CausalLM, KeyMap]:
    """On the meta device in nf4, with LoRA; its key map."""
    hub_id, targets = MODELS[name]
    architecture = architecture_for(PUBLISHED[hub_id], hub_id)
    config = architecture.parse_config(PUBLISHED[hub_id], hub_id)
    model = architecture.build(config, StorageSpec("nf4"), torch.bfloat16, "meta")
    add_lora(model, AdapterSpec(targets, RANK, 16))
    return model, key_map_of(model)


def bytes_held(model: CausalLM, parts: int) -> tuple[int, float]:
    """Of the process that holds most: frozen weights; LoRA, its gradients and the state of adamw_8bit."""
    rules = cuts(model, MeshSizes(shard=parts))
    frozen, trained = 0, 0.0
    for name, parameter in model.named_parameters():
        dim, count = rules[name].dim, parameter.numel()
        if dim is not None:
            start, stop = bounds(parameter.shape[dim], parts, 0)
            count = count // parameter.shape[dim] * (stop - start)
        if parameter.requires_grad:
            trained += count * (2 * parameter.element_size() + 2 * (1 + 4 / 256))  # two moments and their scales
        else:
            frozen += count * parameter.element_size()
    return frozen, trained


def rows_of(heading: str) -> dict[str, list[str]]:
    """The cells of the first table under a heading, by the first one of each row."""
    section = re.split(r"^#+ ", PAGE.split(f"{heading}\n", 1)[1], flags=re.M)[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in lines}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_process_holds(name: str) -> None:
    model, _ = model_of(name)
    count, *cells, gathered = rows_of("### What a GPU holds")[name]
    assert count == f"{sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.0f} million"
    for parts, cell in zip((1, 2, 4, 8), cells, strict=True):
        frozen, trained = bytes_held(model, parts)
        assert cell == f"{frozen / GIB:.2f} + {trained / GIB:.2f}", parts

    units: dict[str, int] = {}
    for full, parameter in model.named_parameters():
        unit = ".".join(full.split(".")[:3]) if ".layers." in full else full
        size = parameter.nbytes * (2 if parameter.requires_grad else 1)  # its gradient lies beside it for a moment
        units[unit] = units.get(unit, 0) + size
    kept = units["lm_head.weight.value"] + units["model.norm.weight"]
    two = sum(sorted(size for unit, size in units.items() if ".layers." in unit)[-2:])
    assert gathered == f"{(kept + max(two, units['model.embed_tokens.weight'])) / GIB:.2f}"


@pytest.mark.parametrize("name", MODELS)
def test_what_experts_and_tokens_weigh_on_their_way(name: str) -> None:
    model, key_map = model_of(name)
    blocks = [module for module in model.modules() if isinstance(module, Experts)]
    packed = sum(p.nbytes for p in blocks[-1].parameters() if not p.requires_grad)
    lora = sum(p.nbytes for p in blocks[-1].parameters() if p.requires_grad)
    dense = 2 * sum(torch.Size(key.shape).numel() for key in key_map.keys if key.group == "experts") / len(blocks)
    moved = GATHERS * (packed + lora) + REDUCTIONS * lora
    hidden = model.get_parameter("model.norm.weight").numel()
    token = TRIPS * CHOSEN[name] * hidden * 2
    assert rows_of("### When expert parallelism pays")[name] == [
        f"{packed / MIB:.0f} + {lora / MIB:.0f} MiB",
        f"{dense / MIB:,.0f} MiB",
        f"{moved / MIB:,.0f} MiB",
        f"{token // KIB} KiB",
        f"{moved / token:,.0f}",
    ]


def test_how_much_is_gathered_in_a_pass() -> None:
    """The sentence about one GLM-4.7-Flash."""
    model, _ = model_of("GLM-4.7-Flash")
    size = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        size[".layers." in name] += parameter.nbytes
    stated = re.search(r"2 × ([\d.]+) \+ ([\d.]+) = ([\d.]+) GiB", PAGE)
    assert stated is not None
    layers, rest = size[True] / GIB, size[False] / GIB
    assert list(stated.groups()) == [f"{layers:.1f}", f"{rest:.1f}", f"{2 * layers + rest:.1f}"]
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    assert f"of the same model {trained / GIB:.1f} GiB" in " ".join(PAGE.split())
    moved, token = (rows_of("### When expert parallelism pays")["GLM-4.7-Flash"][column] for column in (2, 3))
    sequence = 2048 * int(token.removesuffix(" KiB")) // 1024
    assert f"it is {sequence} MiB against {moved.removesuffix(' MiB')} for" in " ".join(PAGE.split())


def said(error: NibbleError) -> str:
    """As it stands on the terminal and in an indented block of the page."""
    return "\n".join(
        f"    {'error: ' if number == 0 else '       '}{line}" for number, line in enumerate(str(error).splitlines())
    )


def test_the_quoted_error_is_the_one_that_is_raised() -> None:
    model, _ = model_of("GLM-4.7-Flash")
    with pytest.raises(NibbleError) as uneven:
        cuts(model, MeshSizes(shard=6))
    assert said(uneven.value) in PAGE


def test_every_key_that_is_named_exists() -> None:
    named = set(re.findall(r"(?:`|--set )((?:model|adapter|data|train|parallel|output)\.\w+)", PAGE))
    assert {f"parallel.{name}" for name in ("shard", "expert", "replicate", "lost_after", "cpu_offload")} <= named
    assert named <= set(keys(config_schema())), named - set(keys(config_schema()))
