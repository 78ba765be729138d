"""What the processes of tests/parallel/test_exchange.py do: each compares its part with the block of one process.

Every process makes the same inputs for all of them from a seed, and the one-process block computes them all.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.adapters.lora import trainable_parameters
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.linear import ExpertWeights, Linear, LoRA
from models.decoder import CausalLM
from models.experts import torch_form
from models.experts.block import Experts
from models.registry import ARCHITECTURES
from parallel.exchange import ExpertExchange
from parallel.mesh import Meshes, make_meshes, mesh_sizes
from parallel.parts import bounds
from parallel.world import World
from quant.storage import Storage, StorageSpec
from tests.tiny import TINY

EXPERTS, HIDDEN, WIDTH, RANK = 8, 64, 64, 3


def block(kind: str, device: str, *, dtype: torch.dtype, trained: bool) -> Experts:
    """A block with LoRA and without values; `trained`: its dense weights have gradients too."""
    made = Experts(
        EXPERTS, HIDDEN, WIDTH, Factory(StorageSpec(kind), dtype, device)  # type: ignore[arg-type]
    )  # fmt: skip
    for projection in (made.gate_up_proj, made.down_proj):
        projection.lora = LoRA(projection.weight.shape, RANK, alpha=2.0 * RANK, device=device)
        if trained:
            projection.weight.get_parameter("value").requires_grad_(True)
    return made


def fill(module: nn.Module) -> None:
    """Random weights, LoRA, norms and biases, the same in every process."""
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    with torch.no_grad():
        for name, part in module.named_modules():
            if isinstance(part, Linear | ExpertWeights):
                part.weight.load_dense(random(part.weight.shape, 0.15))
            elif not isinstance(part, Storage):
                for tensor in part.parameters(recurse=False):
                    tensor.copy_(random(tensor.shape, 0.2) + ("norm" in name))
        for name, buffer in module.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(random(buffer.shape, 0.2))


def fill_from(module: nn.Module, whole: nn.Module, owned: range | None) -> None:
    """The values of `whole`; of experts those that are owned."""
    theirs = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            value = theirs[name]
            if owned is not None and tensor.shape != value.shape:
                value = value[owned.start : owned.stop]
            tensor.copy_(value)


def largest_error(actual: Tensor, whole: Tensor, part: slice) -> float:
    """The largest difference from a part of `whole`, relative to the largest value of `whole`."""
    expected = whole[part]
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == whole.dtype
    scale = whole.abs().max().item()
    assert scale > 0, "all zeros: the comparison could not fail"
    return (actual.double() - expected.double()).abs().max().item() / scale if actual.numel() else 0.0


def routing(case: dict[str, Any], tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """chosen [N, K] and weights [N, K] of all processes' tokens."""
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    if case["load"] == "uneven":
        scores[:, :2] += 0.7
    elif case["load"] == "one process":  # the first process's experts get everything, the others nothing
        scores[:, case["chosen"] :] = -1
    elif case["load"] == "one expert":
        scores[:, 5] = 2
    weights, chosen = scores.topk(case["chosen"], dim=-1)
    return chosen, weights


def compare(world: World, case: dict[str, Any]) -> dict[str, float]:
    """Output and gradients of one block over all processes: the largest relative error of each."""
    dtype, tokens = getattr(torch, case.get("dtype", "float32")), case["tokens"]
    trained = case.get("trained", False)
    generator = torch.Generator().manual_seed(1)
    total = sum(tokens)
    x = torch.randn(total, HIDDEN, generator=generator).to(dtype)
    target = torch.randn(total, HIDDEN, generator=generator).to(dtype)
    chosen, weights = routing(case, total, generator)

    whole = block(case["kind"], "cpu", dtype=dtype, trained=trained)
    fill(whole)
    group = dist.group.WORLD
    assert group is not None
    owned = range(*bounds(EXPERTS, world.size, world.rank))
    mine = block(case["kind"], "meta", dtype=dtype, trained=trained)
    mine.own(owned)
    mine.to_empty(device="cpu")
    fill_from(mine, whole, owned)
    mine.exchange = ExpertExchange(group, EXPERTS)

    here = slice(sum(tokens[: world.rank]), sum(tokens[: world.rank + 1]))
    wanted = {"x": case.get("x", True), "weights": case.get("weights", True)}

    def run(module: Experts, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        given = {"x": x[part].clone(), "weights": weights[part].clone()}
        for name, tensor in given.items():
            tensor.requires_grad_(wanted[name])
        out = module(given["x"], chosen[part], given["weights"])
        leaves = {name: tensor for name, tensor in given.items() if tensor.requires_grad}
        leaves |= dict(trainable_parameters(module))
        gradients = torch.autograd.grad((out * target[part]).sum(), list(leaves.values()))
        return out.detach(), dict(zip(leaves, gradients, strict=True))

    expected, theirs = run(whole, slice(0, total))
    out, ours = run(mine, here)
    assert ours.keys() == theirs.keys()
    errors = {"out": largest_error(out, expected, here)}
    for name, gradient in ours.items():
        part = here if name in wanted else slice(owned.start, owned.stop)
        errors[name] = largest_error(gradient, theirs[name], part)
    return errors


def model_of(architecture: str, device: str, kind: str, router: bool) -> CausalLM:
    """A tiny model with LoRA on everything but the head, without values. router: it has a LoRA too."""
    made = ARCHITECTURES[architecture]
    config = made.parse_config({**TINY[architecture], "num_hidden_layers": 3}, "tiny")
    model = made.build(config, StorageSpec(kind), torch.float32, device)  # type: ignore[arg-type]
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, Linear | ExpertWeights) and name != "lm_head" and (router or not name.endswith(".gate")):
            module.lora = LoRA(module.weight.shape, RANK, alpha=RANK, device=device)
    return model


def cut(model: CausalLM, meshes: Meshes) -> None:
    """FSDP2: experts over the processes that own the same ones, what else is in a layer over all of them."""
    ignored = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    for layer in model.model.layers:
        units = [(part, meshes.expert_shards()) for part in layer.modules() if isinstance(part, Experts)]
        for module, mesh in (*units, (layer, meshes.dense_shards())):
            sharded = fully_shard(module, mesh=mesh, ignored_params=ignored)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)


def step(model: CausalLM, tokens: Tensor, length: list[int], target: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """Hidden states, gradients (whole, of experts those of the owned ones), and how often experts were multiplied."""
    model.zero_grad()
    with mock.patch.object(torch_form, "forward", wraps=torch_form.forward) as forward:
        hidden = model.hidden(tokens, Documents.from_lengths(length))
        (hidden * target).sum().backward()
    gradients = {}
    for name, parameter in trainable_parameters(model):
        assert parameter.grad is not None, name
        grad = parameter.grad
        gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
    return hidden.detach(), gradients, forward.call_count


def compare_model(world: World, case: dict[str, Any]) -> dict[str, float]:
    """Experts owned and cut, layers cut: hidden states and gradients against the whole model's."""
    sizes = mesh_sizes(world, expert=case["expert"], replicate=case.get("replicate", 1))
    meshes = make_meshes(sizes, torch.device("cpu"))
    owned = range(*bounds(EXPERTS, sizes.expert, meshes.owner))

    def made(device: str) -> CausalLM:
        return model_of(case["architecture"], device, case["kind"], case.get("router", True))

    whole, mine = made("cpu"), made("meta")
    fill(whole)
    for module in mine.modules():
        if isinstance(module, Experts):
            module.own(owned)
            module.exchange = ExpertExchange(meshes.expert_group, EXPERTS)
    mine.to_empty(device="cpu")
    fill_from(mine, whole, owned)
    cut(mine, meshes)

    generator = torch.Generator().manual_seed(3)
    lengths = [11 + 2 * index for index in range(world.size)]
    tokens = torch.randint(0, 128, (sum(lengths),), generator=generator)
    target = torch.randn(sum(lengths), HIDDEN, generator=generator)
    here = slice(sum(lengths[: world.rank]), sum(lengths[: world.rank + 1]))
    expected, theirs, calls = step(whole, tokens, lengths, target)
    errors = {}
    for recompute in (False, True):
        mine.activation_checkpointing = recompute
        out, ours, ours_calls = step(mine, tokens[here], [lengths[world.rank]], target[here])
        assert ours_calls == calls, "the recomputation ends before the experts"
        assert ours.keys() == theirs.keys()
        assert all(isinstance(p, DTensor) for p in mine.model.layers.parameters() if p.ndim), "all is freed again"
        what = "recomputed" if recompute else "kept"
        errors[f"{what} hidden"] = largest_error(out, expected, here)
        for name, gradient in ours.items():
            part = slice(None) if gradient.shape == theirs[name].shape else slice(owned.start, owned.stop)
            errors[f"{what} {name}"] = largest_error(gradient, theirs[name], part)
    return errors


def compare_all(
    world: World, blocks: dict[str, dict[str, Any]], models: dict[str, dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Errors of every case, by its name and then by what is compared."""
    results = {name: compare(world, case) for name, case in blocks.items()}
    return results | {name: compare_model(world, case) for name, case in models.items()}
