"""`--check`: what can be said about a run without reading weights, tokenising rows, or writing anything.

What is wrong with a row, a file or a length shows before torch is imported, which takes longer than everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from models.checkpoint.hub_id import local_folder, looks_like_hub_id, resolve_model
from models.checkpoint.side_files import CONFIG, read_config
from quant.common.errors import NibbleError
from train.config.load import Config
from train.config.model_length import check_length
from train.config.row_paths import row_files
from train.rows.bad_rows import BadRow
from train.rows.columns import Columns

ROWS = 100  # of each file


def check(config: Config, warn: Callable[[str], None]) -> tuple[list[str], list[str]]:
    """What was checked, and what wasn't. warn: receives a line for what a run would do nevertheless.

    Raises NibbleError for the first thing that is wrong.
    """
    checked = ["the keys of the config, and that the files it names are there"]
    unchecked = ["weights", "tokens of the rows and the chat template", "memory, and whether the device is there"]
    for key, value in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        for file in row_files(value, key) if value is not None else ():
            checked.append(
                f"{_check_rows(config, file.path, key, warn)} of {file.path} ({key}): data.format, data.fields"
            )
    path = config.model.path
    if looks_like_hub_id(path) and local_folder(path) is None:
        unchecked.insert(
            0, f"model.path: {path} is not on this machine yet; a run downloads it. adapter.targets with it"
        )
        return checked, unchecked
    folder = resolve_model(path)
    check_length(config.data.sequence_length, read_config(folder)[1], str(folder / CONFIG))
    # Only now: the names and sizes of what can be trained are those of the model's modules.
    import torch

    from models.load import open_folder
    from train.model import check_model

    source = open_folder(folder)
    for warning in check_model(config, source, torch.device("cpu" if config.train.device == "cpu" else "cuda")):
        warn(warning)
    adapter = "adapter.targets, adapter.layers and adapter.rank" if config.adapter.kind == "lora" else "what is trained"
    checked.append(f"{source.path / 'config.json'}: the architecture, {adapter}, data.sequence_length, model.storage")
    return checked, unchecked


def _check_rows(config: Config, file: str | Path, key: str, warn: Callable[[str], None]) -> str:
    """Read and check the first rows; returns how many, in words."""
    from train.rows.files import read_rows
    from train.rows.parse import parse_row

    settings, count, problems = config.data, 0, list[str]()
    columns = Columns(settings.format, settings.fields)
    rows = read_rows(file, form=settings.format, fields=settings.fields, key=key, columns=columns, at_a_time=ROWS)
    for row in islice(rows, ROWS):
        count += 1
        try:
            if row.problem is not None:
                raise row.problem
            assert row.values is not None
            columns.add(row.values)
            parse_row(row.values, settings.format, settings.fields)
        except BadRow as problem:
            problems.append(f"{row.file}:{row.line}: {problem}")
    if not count:
        raise NibbleError(f"{key}: {file} holds no rows.")
    columns.require_joined(key, str(file))
    if unused := columns.unused_text(count):
        warn(f"{key}: {unused}")
    if len(problems) == count or (problems and settings.on_bad_row == "error"):
        number = "none of the first rows can" if len(problems) == count else f"{len(problems)} of the first rows can't"
        raise NibbleError(f"{key}: {number} be used (data.format: {settings.format}): {problems[0]}")
    if problems:
        warn(f"{len(problems)} of the first {count} rows of {file} can't be used and will be skipped: {problems[0]}")
    return "the only row" if count == 1 else f"the first {count} rows"
