"""A model cut over processes with FSDP2 (torch's fully_shard), as parallel/plan.py says.

The frozen weights are cut and gathered as they are stored, packed bytes and scales, since they are plain parameters. No
mixed-precision policy is used: it would cast the float32 scales of 4-bit blocks. Gradients are summed, not averaged:
the loss is divided by the labelled tokens of all processes.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Replicate, Shard

from models.decoder import CausalLM, Decoder
from models.experts.block import Experts
from parallel.exchange import ExpertExchange
from parallel.mesh import Meshes
from parallel.parts import Part, bounds
from parallel.plan import cuts, units
from parallel.shards import Shards, is_cut


def shard(model: CausalLM, meshes: Meshes, *, reshard_after_forward: bool = True, cpu_offload: bool = False) -> Shards:
    """Cut `model`, which is on the meta device and has its adapter and its requires_grad already, in place.

    reshard_after_forward: free a layer's weights after its forward pass and gather them again for the backward pass.
    cpu_offload: parts, gradients and optimiser state are in host memory.
    Raises NibbleError for what can't be cut evenly.
    """
    rules = cuts(model, meshes.sizes)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    parts = {}
    for name, shape in shapes.items():
        dim = rules[name].dim
        if dim is not None:
            start, stop = bounds(shape[dim], meshes.sizes.parts, meshes.part)
            parts[name] = Part(shape, dim, start, stop, meshes.dense, (Replicate(), Shard(dim)))
    if meshes.sizes.expert > 1:
        _own_experts(model, meshes)
    placements = {parameter: rules[name].dim for name, parameter in model.named_parameters()}
    ignored = {parameter for parameter, dim in placements.items() if dim is None}

    def placement(parameter: nn.Parameter) -> Shard:
        dim = placements[parameter]
        assert dim is not None
        return Shard(dim)

    offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
    # LoRA may be bfloat16; its gradients are summed in float32 all the same.
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for unit, module in units(model, meshes.sizes):
        sharded = fully_shard(
            module,
            mesh=meshes.expert_shards() if unit.over == "owners" else meshes.dense_shards(),
            reshard_after_forward=reshard_after_forward and not unit.kept,
            shard_placement_fn=placement,
            mp_policy=precision,
            offload_policy=offload,
            ignored_params=ignored,
        )
        # Left to itself FSDP2 would prefetch an embedding for a backward pass that doesn't need it.
        sharded.set_unshard_in_backward(unit.backward)
        sharded.set_gradient_divide_factor(1.0)
        # A plain sum: gloo knows no sum that divides on the way.
        sharded.set_force_sum_reduction_for_comms(True)
    _prefetch(model.model)
    # What the model is entered by, beside forward.
    register_fsdp_forward_method(model, "hidden")
    if isinstance(model.lm_head, FSDPModule):
        register_fsdp_forward_method(model.lm_head, "reduce")
    return Shards(model, meshes, parts)


def _own_experts(model: CausalLM, meshes: Meshes) -> None:
    for module in model.modules():
        if isinstance(module, Experts):
            everyone = module.experts
            start, stop = bounds(everyone, meshes.sizes.expert, meshes.owner)
            module.own(range(start, stop))
            module.exchange = ExpertExchange(meshes.expert_group, everyone)


def _prefetch(decoder: Decoder) -> None:
    """Gather the next layer, with experts that are a unit of their own, while one computes: the host, which asks for
    it, waits for the routing in every layer.
    """
    layers = [layer for layer in decoder.layers if isinstance(layer, FSDPModule)]
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([part for part in following.modules() if isinstance(part, FSDPModule)])


def materialise(shards: Shards, device: torch.device, *, cpu_offload: bool = False) -> None:
    """Give a cut model uninitialised memory: of every tensor this process's part."""
    model = shards.model
    model.to_empty(device="cpu" if cpu_offload else device)
    if cpu_offload and device.type != "cpu":
        # What isn't cut stays on the device; FSDP2 brings the rest there layer by layer.
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not is_cut(parameter):
                    empty = torch.empty_like(parameter, device=device)
                    setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=device))
