"""The model of a run: checked against the config before anything large is read, then loaded and made trainable."""

from __future__ import annotations

import torch

from models.adapter import load_adapter
from models.decoder import CausalLM
from models.hub import HubCheckpoint
from models.load import ModelFolder, load_model
from models.lora import AdapterSpec, add_lora
from models.native import NativeCheckpoint, describe, dtype_name
from models.registry import architecture_for
from quant.errors import NibbleError
from quant.storage import StorageSpec
from train.config import Config
from train.optim import require_device

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_model(config: Config, source: ModelFolder, device: torch.device) -> None:
    """Find what the config asks of a model that it can't give, from config.json and an adapter's files alone.

    Goes through the same steps as `load_trainable_model`, on a model without weights. Raises NibbleError.
    """
    require_device(config.train.optimizer, device)
    spec, dtype = _storage(config)
    where = str(source.path / "config.json")
    architecture = architecture_for(source.config, where)
    parsed = architecture.parse_config(source.config, where)
    _check_length(config, source, where)
    _check_stored(source, spec, dtype)
    make_trainable(architecture.build(parsed, spec, dtype, "meta"), config)


def _check_length(config: Config, source: ModelFolder, where: str) -> None:
    length, limit = config.data.sequence_length, source.config.get("max_position_embeddings")
    scaling = source.config.get("rope_parameters") or source.config.get("rope_scaling") or {}
    factor, trained = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if not isinstance(limit, int) or length <= limit:
        return
    if isinstance(factor, int | float) and isinstance(trained, int) and factor * trained >= length:
        return  # yarn switched on by hand: max_position_embeddings is often left as it was
    raise NibbleError(
        f"data.sequence_length: {length} is more than the model is made for: max_position_embeddings is {limit} in "
        f"{where}.\nSet data.sequence_length to {limit} or less."
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
    """What identifies the base model, wherever it lies: a converted copy has the fingerprint of its source.

    Raises NibbleError for a checkpoint of which files are missing or damaged.
    """
    if source.manifest is not None:
        return NativeCheckpoint(source.path).manifest.fingerprint
    return HubCheckpoint(source.path).fingerprint()


def load_trainable_model(config: Config, source: ModelFolder, device: torch.device) -> CausalLM:
    """The model with what the config trains ready to be trained, and all else frozen."""
    settings = config.model
    model = load_model(
        source.path,
        storage=settings.storage,
        dtype=_DTYPES[settings.dtype],
        device=device,
        double_quant=settings.double_quant,
        progress=True,
    )
    make_trainable(model, config)
    return model


def make_trainable(model: CausalLM, config: Config) -> None:
    """Give `model` its adapter, or make all of it trainable, in place. Raises NibbleError for what doesn't fit it."""
    adapter = config.adapter
    if adapter.kind == "none":
        model.requires_grad_(True)  # parameters only: the router's correction bias, a buffer, is never trained
        return
    spec = AdapterSpec(
        targets=adapter.targets,
        rank=adapter.rank,
        alpha=adapter.alpha,
        rslora=adapter.rslora,
        layers=adapter.layers,
        dtype=_DTYPES[adapter.dtype],
    )
    if adapter.init_from is not None:
        load_adapter(model, adapter.init_from, dtype=spec.dtype, expected=spec)
    else:
        add_lora(model, spec, config.train.seed)


def _storage(config: Config) -> tuple[StorageSpec, torch.dtype]:
    return StorageSpec(config.model.storage, config.model.double_quant), _DTYPES[config.model.dtype]
