"""The model of a run: checked against the config before anything large is read, then loaded and made trainable."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models.adapters.files import load_adapter, read_adapter_weights
from models.adapters.lora import add_lora, initialise_lora
from models.adapters.peft_config import CONFIG
from models.adapters.servers import served_targets, serving_note
from models.adapters.targets import AdapterSpec, Target, resolve, within_layer
from models.blocks.balance import AuxiliaryLoss, BiasUpdate
from models.blocks.configjson import text_section
from models.blocks.router import Router, SigmoidRouter
from models.blocks.usage import ExpertUsage
from models.checkpoint.hub import HubCheckpoint
from models.checkpoint.keymap import key_map_of
from models.checkpoint.native import NativeCheckpoint, describe, dtype_name
from models.decoder import CausalLM
from models.load import ModelFolder, load_model, prepare_model
from models.registry import architecture_for
from parallel.load import fill_parts
from parallel.mesh import Meshes, MeshSizes
from parallel.plan import cuts
from parallel.shards import Shards
from quant.choices import named_dtype
from quant.common.errors import NibbleError
from quant.common.jsonfile import number
from quant.common.progress import Bar
from quant.storage import StorageSpec
from train.config.load import Config
from train.config.model_length import check_length
from train.optim import require_device

# DeepSeek-V3's speed of the bias (arXiv:2412.19437 §4.2), and the coefficient of Qwen's configurations.
_BALANCE_RATE = 1e-3


def check_model(config: Config, source: ModelFolder, device: torch.device, sizes: MeshSizes | None = None) -> list[str]:
    """Find what the config asks of a model that it can't give, from config.json and an adapter's files alone.

    Goes through the same steps as `load_trainable_model`, on a model without weights; sizes: of the meshes over which
    the model will be cut, if it will be. Returns warnings. Raises NibbleError.
    """
    require_device(config.train.optimizer, device)
    spec, dtype = _storage(config)
    where = str(source.path / "config.json")
    architecture = architecture_for(source.config, where)
    parsed = architecture.parse_config(source.config, where)
    check_length(config.data.sequence_length, source.config, where)
    _check_stored(source, spec, dtype)
    model = architecture.build(parsed, spec, dtype, "meta")
    warnings = _adapter_warnings(model, config) if config.adapter.kind == "lora" else []
    make_trainable(model, config)
    attach_balance(model, config, source)
    attach_usage(model, config)
    if sizes is not None:
        cuts(model, sizes)
    return warnings


def _adapter_warnings(model: CausalLM, config: Config) -> list[str]:
    key_map = key_map_of(model)
    targets = resolve(key_map, _adapter_spec(model, config), model.model_type)
    warnings = _oversized_ranks(targets)
    if config.adapter.serve_with is None:
        note = serving_note(model.model_type, [target.key for target in targets])
        warnings += [note] if note is not None else []
    return warnings


def _oversized_ranks(targets: Sequence[Target]) -> list[str]:
    above = [target for target in targets if target.rank > min(target.key.shape[-2:])]
    if not above:
        return []
    first, shape = within_layer(above[0].module), list(above[0].key.shape[-2:])
    return [
        f"adapter.rank is more than the smaller side of {len(above)} of {len(targets)} adapted matrices, e.g. "
        f"{above[0].rank} for {first} {shape}: a matrix has no higher rank, so that this only costs memory."
    ]


def _adapter_spec(model: CausalLM, config: Config) -> AdapterSpec:
    adapter, targets = config.adapter, config.adapter.targets
    if adapter.serve_with is not None:
        targets = served_targets(targets, adapter.serve_with, key_map_of(model), model.model_type)
    return AdapterSpec(
        targets=targets,
        rank=adapter.rank,
        alpha=adapter.alpha,
        rslora=adapter.rslora,
        layers=adapter.layers,
        dtype=adapter.dtype,
    )


def _check_stored(source: ModelFolder, spec: StorageSpec, dtype: torch.dtype) -> None:
    made = source.manifest
    if made is None or (made.spec, made.dtype) == (spec, dtype):
        return
    double = f"model.double_quant: {str(made.spec.double_quant).lower()}, "
    raise NibbleError(
        f"model.path: {source.path} is converted to {describe(made.spec, made.dtype)}; the config asks for "
        f"{describe(spec, dtype)}.\nSet model.storage: {made.spec.kind}, {double if made.spec.kind != 'none' else ''}"
        f"model.dtype: {dtype_name(made.dtype)}, or model.path to what it was converted from ({made.source})."
    )


def content_fingerprint(source: ModelFolder) -> str:
    """What identifies the base model, whatever its folder: a converted copy has the fingerprint of its source.

    Raises NibbleError for a checkpoint of which files are missing or damaged.
    """
    if source.manifest is not None:
        return NativeCheckpoint(source.path).manifest.fingerprint
    return HubCheckpoint(source.path).fingerprint()


def load_trainable_model(
    config: Config, source: ModelFolder, device: torch.device, meshes: Meshes | None = None, *, progress: bool = True
) -> Shards:
    """The model with what the config trains ready to be trained, and all else frozen.

    meshes: cut it over these, each process reading its own part; all of them must call this. None: it is whole here.
    progress: of the first process: check the files of a converted checkpoint, and show a bar while weights are read.
    """
    settings, dtype = config.model, config.model.dtype
    if meshes is None:
        model = load_model(
            source.path, settings.storage, dtype, device, double_quant=settings.double_quant, progress=progress
        )
        make_trainable(model, config)
        shards = Shards(model)
    else:
        from parallel.fsdp import materialise, shard

        # Nothing has memory until it is known what this process keeps of it.
        model, reader = prepare_model(
            source.path, settings.storage, dtype, device, double_quant=settings.double_quant, verify=progress
        )
        model.requires_grad_(False)
        make_trainable(model, config)
        parallel = config.parallel
        shards = shard(
            model,
            meshes,
            reshard_after_forward=parallel.reshard_after_forward,
            cpu_offload=parallel.cpu_offload,
        )
        materialise(shards, device, cpu_offload=parallel.cpu_offload)
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(Bar("loading")) if progress else None
            fill_parts(shards, reader, bar.update if bar is not None else None)
        start = start_adapter(config)
        if start is not None:
            read_adapter_weights(model, start, shards.put, layout=config.adapter.init_layout)
        elif config.adapter.kind == "lora":
            initialise_lora(model, config.train.seed, shards.put)
    attach_balance(model, config, source)
    attach_usage(model, config)
    return shards


def start_adapter(config: Config) -> Path | None:
    """The folder of the adapter to start from: adapter.init_from, or its adapter/ where it is a run's folder."""
    if config.adapter.kind == "none" or config.adapter.init_from is None:
        return None
    folder = Path(config.adapter.init_from)
    of_run = folder / "adapter"
    return of_run if (of_run / CONFIG).is_file() and not (folder / CONFIG).is_file() else folder


def make_trainable(model: CausalLM, config: Config) -> None:
    """Give `model` its adapter, or make all of it trainable, in place. Raises NibbleError for what doesn't fit it."""
    adapter = config.adapter
    if adapter.kind == "none":
        model.requires_grad_(True)  # parameters only: the router's correction bias, a buffer, is never trained
        for module in model.modules():
            if getattr(module, "never_trained", False):  # what has no gradient: an indexer, which only chooses keys
                module.requires_grad_(False)
        return
    spec = _adapter_spec(model, config)
    start = start_adapter(config)
    if start is not None:
        load_adapter(model, start, dtype=spec.dtype, expected=spec, layout=adapter.init_layout)
    else:
        add_lora(model, spec, config.train.seed)


def trained_tensors(shards: Shards) -> dict[str, Tensor]:
    """All that a training step changes, by name: trained parameters, as far as this process holds them, and the biases
    that balance routers.
    """
    balance = shards.model.balance
    return {**dict(shards.parameters), **(balance.buffers() if balance is not None else {})}


def attach_balance(model: CausalLM, config: Config, source: ModelFolder) -> None:
    """Let `model` balance its experts as train.balance asks. Raises NibbleError where that doesn't fit the model."""
    method = config.train.balance
    if method == "none":
        return
    routers = [module for module in model.modules() if isinstance(module, Router)]
    biased = any(isinstance(router, SigmoidRouter) for router in routers)
    setting, name = f"train.balance: {method}", model.model_type
    if not routers:
        raise NibbleError(f"{setting}, but no layer of this {name} has experts.\nSet train.balance: none.")
    if method == "aux_loss" and biased:
        full = "" if config.adapter.kind == "none" else " with adapter.kind: none"
        raise NibbleError(
            f"{setting} is for softmax routers; those of {name} are sigmoid routers, balanced by their bias.\n"
            f"Set train.balance: bias_update{full}, or none."
        )
    if method == "bias_update" and not biased:
        raise NibbleError(
            f"{setting} is for sigmoid routers; those of {name} are softmax routers, without a bias to update.\n"
            "Set train.balance: aux_loss, or none."
        )
    if not any(parameter.requires_grad for router in routers for parameter in router.parameters()):
        raise NibbleError(
            f"{setting}, but no router is trained: adapter.targets has none ({', '.join(config.adapter.targets)}).\n"
            "Add router to adapter.targets, or set train.balance: none."
        )
    kind = AuxiliaryLoss if method == "aux_loss" else BiasUpdate
    model.balance = kind(model, _balance_rate(config, source))


def attach_usage(model: CausalLM, config: Config) -> None:
    """Let `model` count its experts' tokens where output.expert_usage asks. Raises NibbleError where it has none."""
    if config.output.expert_usage is None:
        return
    if not any(isinstance(module, Router) for module in model.modules()):
        raise NibbleError(
            f"output.expert_usage is set, but no layer of this {model.model_type} has experts.\n"
            "Set output.expert_usage: null."
        )
    model.usage = ExpertUsage(model)


def _balance_rate(config: Config, source: ModelFolder) -> float:
    rate = config.train.balance_rate
    if rate is not None or config.train.balance == "bias_update":
        return rate or _BALANCE_RATE
    # The file of a vision-language model has a section for its text model.
    where = str(source.path / "config.json")
    try:
        return number(text_section(source.config, where), "router_aux_loss_coef", _BALANCE_RATE, where)
    except NibbleError as error:
        raise NibbleError(f"{error}\ntrain.balance: aux_loss needs it, or train.balance_rate in its place.") from error


def _storage(config: Config) -> tuple[StorageSpec, torch.dtype]:
    return StorageSpec(config.model.storage, config.model.double_quant), named_dtype(config.model.dtype)
