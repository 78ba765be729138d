"""What is to be evaluated, from the command's options and a run's config. Nothing here needs torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.adapters.packing import Packing
from quant.common.errors import NibbleError
from train.config.load import Config, load_config, parse_config
from train.config.result import finished_result
from train.config.row_paths import row_files
from train.config.sections import REQUIRED, ModelConfig, RowFiles
from train.rows.files import read_rows
from train.rows.parse import columns_read

CHOICES = ("question", "choices", "answer")  # the columns of a file of multiple-choice questions

Task = Literal["rows", "choices"]


@dataclass(frozen=True)
class Request:
    """config: of a run, or filled up with defaults; `model`, `adapter` and `rows` are in place of what it says.

    model: its storage and dtype are meant only where they were given (`model.model_fields_set`): a converted folder
    has its own. double_quant: None where the storage or the folder says it. adapter: folder of an adapter, or None.
    layout: of that adapter, what --layout says.
    rows, key: the files, and what names them in messages; None: the rows that the run of the config holds out of
    data.train. length_given: whether data.sequence_length is wanted rather than a default. task: what the rows are.
    """

    config: Config
    model: ModelConfig
    double_quant: bool | None
    adapter: Path | None
    layout: Packing | None
    device: str | None
    rows: RowFiles | None
    key: str
    length_given: bool
    task: Task


def request_of(arguments: argparse.Namespace) -> Request:
    """Raises NibbleError for what is missing or doesn't fit together."""
    config = _config(arguments)
    settings = config.data
    rows, key = (arguments.data, "--data") if arguments.data else (settings.eval, "data.eval")
    if rows is None and settings.eval_fraction is None:
        raise NibbleError(f"{arguments.config} has no held-out rows (data.eval, data.eval_fraction): give --data FILE.")
    model, adapter = _model(arguments, config)
    if arguments.layout is not None and arguments.adapter is None:
        raise NibbleError("--layout is about an adapter: give --adapter.")
    task = _task(arguments, config, rows, key)
    _check_overrides(arguments, config, rows, task)
    return Request(
        config=config,
        model=model,
        double_quant=_double_quant(arguments, config),
        adapter=adapter,
        layout=arguments.layout,
        device=arguments.device or config.train.device,
        rows=rows,
        key=key,
        length_given=arguments.config is not None or "sequence_length" in settings.model_fields_set,
        task=task,
    )


def _config(arguments: argparse.Namespace) -> Config:
    overrides = list(arguments.overrides)
    if arguments.format in REQUIRED:
        overrides.append(f"data.format={arguments.format}")
    if arguments.config is not None:
        return load_config(arguments.config, overrides)
    if arguments.model is None or arguments.data is None:
        raise NibbleError("MODEL and --data FILE are needed, or --config of a run (see --help).")
    # What isn't evaluated has to be there all the same. JSON is YAML.
    values = {"model": {"path": arguments.model}, "data": {"train": arguments.data}, "output": {"dir": "."}}
    return parse_config(json.dumps(values, ensure_ascii=False), overrides, "the command")


def _check_overrides(arguments: argparse.Namespace, config: Config, rows: RowFiles | None, task: Task) -> None:
    """Raises NibbleError for a --set without effect: of a key that only a training reads, or that another option or the
    kind of task decides. (Of multiple choice, data.fields is refused wherever it comes from.)
    """
    of_run, lora = arguments.config is not None, config.adapter.kind == "lora"
    of_result = of_run and (arguments.adapter if lora else arguments.model) is None
    has_effect = {
        "model.path": of_run and arguments.model is None and lora,
        "model.storage": arguments.storage is None,
        "model.double_quant": arguments.storage is None,
        "model.dtype": arguments.dtype is None,
        "adapter.kind": of_run,
        "data.train": rows is None,
        "data.eval_fraction": rows is None,
        "data.eval": arguments.data is None,
        "data.format": arguments.format is None and task == "rows",
        "data.fields": True,
        "data.template_variables": True,
        "data.sequence_length": True,
        "data.on_bad_row": True,
        "train.seed": not isinstance(rows, str),
        "train.keep_best": of_result,
        "train.device": arguments.device is None,
        "parallel.cpu_offload": True,
        "parallel.lost_after": True,
        "output.dir": of_result,
    }
    for override in arguments.overrides:
        key = ".".join(override.partition("=")[0].strip().split(".")[:2])
        if not has_effect.get(key, False):
            why = "it is decided by what else is given" if key in has_effect else "only a training reads that key"
            raise NibbleError(f"--set {override} has no effect on this evaluation: {why}.\nLeave it out.")


def _model(arguments: argparse.Namespace, config: Config) -> tuple[ModelConfig, Path | None]:
    """The model, and the adapter to put on it."""
    changes: dict[str, object] = {}
    adapter = Path(arguments.adapter) if arguments.adapter else None
    if arguments.model is not None:
        changes["path"] = arguments.model
    if arguments.config is not None:
        if config.adapter.kind == "lora" and adapter is None:
            adapter = finished_result(config, arguments.config)
        elif config.adapter.kind == "none" and arguments.model is None:
            changes["path"] = str(finished_result(config, arguments.config))
    if adapter is not None and not adapter.is_dir():
        raise NibbleError(f"--adapter: {adapter}: no such folder. Paths start at the current directory ({Path.cwd()}).")
    if arguments.storage is not None:
        changes["storage"] = arguments.storage
    if arguments.dtype is not None:
        changes["dtype"] = arguments.dtype
    return config.model.model_copy(update=changes), adapter


def _double_quant(arguments: argparse.Namespace, config: Config) -> bool | None:
    """What the config or --set says, as far as it is about the storage that is asked for; true is the default."""
    model = config.model
    default = "storage" not in model.model_fields_set and model.double_quant
    return None if arguments.storage is not None or default else model.double_quant


def _task(arguments: argparse.Namespace, config: Config, rows: RowFiles | None, key: str) -> Task:
    """--format, or what the columns of the first row say."""
    if arguments.format is not None or rows is None:
        return "choices" if arguments.format == "choices" else "rows"
    settings, file = config.data, row_files(rows, key)[0].path
    if not file.lower().removesuffix(".gz").endswith((".json", ".jsonl")):
        return "rows"
    first = next((row.values for row in read_rows(file, form=settings.format, key=key) if row.values is not None), {})
    needed = [name for name, must in columns_read(settings.format, settings.fields, first).items() if must]
    return "choices" if set(CHOICES) <= first.keys() and not set(needed) <= first.keys() else "rows"
