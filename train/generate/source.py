"""Which model is asked: a folder or hub id with an adapter, or what a run's config names; and loading it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.adapters.packing import Packing
from models.checkpoint.remembered import State, state_of
from models.decoder import CausalLM
from models.load import load_model, open_folder
from models.use_kernels import use_kernels
from parallel.device import choose_device
from quant.common.errors import NibbleError
from train.config.load import load_config
from train.config.model_length import longest_context
from train.config.result import finished_result
from train.data.template_files import load_chat_template
from train.data.tokenizer import load_tokenizer
from train.generate.answers import Answerer
from train.generate.settings import read_settings


@dataclass(frozen=True)
class Source:
    """A checkpoint and an adapter for it; storage, double_quant, dtype, device and kernels where a config says them.

    result: what a config's run made, where that is asked. plain, variables: of a run whose rows are no conversations,
    and of its chat template.
    """

    model: str
    adapter: str | None = None
    storage: str | None = None
    double_quant: bool | None = None
    dtype: str | None = None
    device: str | None = None
    kernels: str = "auto"
    layout: Packing | None = None
    result: str | None = None
    plain: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


def source_of(model: str | None, adapter: str | None, config_file: str | None, layout: Packing | None = None) -> Source:
    """Of MODEL and --adapter, or of --config. layout: of --adapter. Raises NibbleError, e.g. where the run has no
    result yet.
    """
    if layout is not None and adapter is None:
        raise NibbleError("--layout is about an adapter: give --adapter.")
    if config_file is None:
        assert model is not None
        return Source(model, adapter, layout=layout)
    config = load_config(config_file)
    lora = config.adapter.kind == "lora"
    result = None if lora and adapter else str(finished_result(config, config_file))
    return Source(
        config.model.path if lora or result is None else result,
        adapter or (result if lora else None),
        config.model.storage,
        config.model.double_quant,
        config.model.dtype,
        config.train.device,
        config.train.kernels,
        layout,
        result,
        plain=config.data.format == "text",
        variables=config.data.template_variables,
    )


def load_source(
    source: Source,
    *,
    storage: str | None,
    dtype: str | None,
    device: str | None,
    given: Mapping[str, Any],
    stop_texts: Sequence[str],
    seed: int | None,
    plain: bool,
    variables: Mapping[str, Any],
    note: Callable[[str], None],
) -> Answerer:
    """The model, not read yet, with its tokenizer, template and settings; what is None is as the source has it.

    note: gets a line with the settings, and warnings. Raises NibbleError.
    """
    where = choose_device(device or source.device)
    folder = open_folder(source.model)
    if source.adapter is not None and not Path(source.adapter).is_dir():
        raise NibbleError(f"--adapter: {source.adapter} is no folder. Wanted: one with adapter_config.json.")
    tokenizer = load_tokenizer(folder.path)
    plain = plain or source.plain
    template = None
    if not plain:
        try:
            template = load_chat_template(
                folder.path, tokenizer.special_tokens, variables={**source.variables, **variables}
            )
        except NibbleError as error:
            where_given = "--template-variable:" if variables else "data.template_variables:"
            raise NibbleError(str(error).replace("data.template_variables:", where_given, 1)) from error
    if source.result is not None:
        note(f"result of the run: {source.result}")
    settings, warnings = read_settings(given, folder.path, tokenizer, stop_texts=stop_texts, seed=seed)
    for warning in warnings:
        note(f"warning: {warning}")
    note(settings.said)
    # A config's double_quant is about the config's storage.
    double_given = source.double_quant if storage in (None, source.storage) else None
    kind, double, kept = folder.stored(storage or source.storage, double_given, dtype or source.dtype)
    stored = (folder.path, kind, kept, where)

    def load() -> CausalLM:
        use_kernels(where, source.kernels)
        return load_model(*stored, source.adapter, double_quant=double, layout=source.layout, progress=True)

    longest = longest_context(folder.config, str(folder.path / "config.json"))
    weights = [_state(Path(path)) for path in (folder.path, source.adapter) if path is not None]
    made_of = json.dumps([weights, kind, double, kept, source.layout])
    return Answerer(load, tokenizer, template, settings, folder.path, plain, longest, made_of)


def _state(folder: Path) -> State:
    """Changes when a file of weights or settings does."""
    return state_of(folder, (path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
