"""A model cut with FSDP2 on a device, by one process: NCCL and the device's streams, but no network yet."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu_checks_models import LENGTHS, NF4, TINY, gradients, tiny_model
from benchmarks.gpu_compare import CPU, Check, Group, compare
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec, adaptable, groups_of
from models.blocks.documents import Documents
from models.checkpoint.keymap import key_map_of
from models.decoder import CausalLM
from models.experts.block import Experts
from models.registry import ARCHITECTURES
from parallel.world import World, process_group
from train.loss import linear_cross_entropy


def groups() -> list[Group]:
    ways = {"cut": (False, False), "cut, in host memory": (True, False), "cut, tokens exchanged": (False, True)}
    return [
        (f"{model_type}, {name}", functools.partial(cut_model, model_type, name, *how))
        for model_type in TINY
        for name, how in ways.items()
    ]


def cut_model(model_type: str, name: str, offload: bool, exchanged: bool, device: torch.device) -> Iterator[Check]:
    """Two micro-batches, recomputed: loss and summed gradients against the whole model on the CPU."""
    from parallel.exchange import ExpertExchange
    from parallel.fsdp import materialise, shard
    from parallel.mesh import MeshSizes, make_meshes

    reference = tiny_model(model_type, NF4, torch.float32, CPU)
    expected = sum(_loss(reference, CPU, seed) for seed in (60, 61))
    with process_group(World(), device):
        architecture = ARCHITECTURES[model_type]
        config = architecture.parse_config(TINY[model_type], "config.json")
        model = architecture.build(config, NF4, torch.float32, "meta")
        model.requires_grad_(False)
        add_lora(model, AdapterSpec(tuple(groups_of(adaptable(key_map_of(model)))), rank=8, alpha=16))
        meshes = make_meshes(MeshSizes(), device)
        if exchanged:
            for module in model.modules():
                if isinstance(module, Experts):
                    module.exchange = ExpertExchange(meshes.expert_group, module.experts)
        shards = shard(model, meshes, cpu_offload=offload)
        materialise(shards, device, cpu_offload=offload)
        whole = dict(reference.named_parameters())
        for key, parameter in model.named_parameters():
            shards.put(parameter, whole[key].detach())
        for key, buffer in model.named_buffers():
            buffer.copy_(dict(reference.named_buffers())[key])
        model.activation_checkpointing = True
        model.train()
        actual = torch.stack([_loss(model, device, seed) for seed in (60, 61)]).sum()
        shards.take_gradients()
        got = [parameter.grad for _, parameter in shards.parameters if parameter.grad is not None]
        assert len(got) == len(trainable_parameters(reference)), "every LoRA has a gradient"
        yield compare(f"{model_type}, {name}: loss", [(actual, torch.as_tensor(expected))], 1e-5)
        pairs = list(zip(got, gradients(reference), strict=True))
        yield compare(f"{model_type}, {name}: gradients of LoRA", pairs, 1e-4)


def _loss(model: CausalLM, device: torch.device, seed: int) -> Tensor:
    """As gpu_checks_models.batch_loss, through the head's own unit; its gradients are added."""
    total = sum(LENGTHS)
    tokens = torch.randint(0, model.vocabulary, (total,), generator=torch.Generator().manual_seed(seed))
    labels = torch.cat((tokens[1:], tokens[:1])).to(device)
    hidden = model.hidden(tokens.to(device), Documents.from_lengths(LENGTHS, device))
    loss = model.head.reduce(hidden, lambda x, weight: linear_cross_entropy(x, weight, labels, 2 * total))
    loss.backward()
    return loss.detach()
