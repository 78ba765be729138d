"""`--check`: what can be said about a run without reading weights, tokenising rows, or writing anything.

Where a row or a file is wrong that shows before torch is imported, which takes longer than everything else here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from quant.common.errors import NibbleError
from train.config.load import Config
from train.config.row_paths import row_files
from train.rows.bad_rows import BadRow

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
    # Only now: it imports torch.
    from models.checkpoint.hub_id import local_folder, looks_like_hub_id

    path = config.model.path
    if looks_like_hub_id(path) and local_folder(path) is None:
        unchecked.insert(
            0, f"model.path: {path} is not on this machine yet; a run downloads it. adapter.targets with it"
        )
        return checked, unchecked
    import torch

    from models.load import open_folder
    from train.model import check_model

    source = open_folder(path)
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
    for row in islice(read_rows(file, form=settings.format, fields=settings.fields, key=key), ROWS):
        count += 1
        try:
            if row.problem is not None:
                raise row.problem
            assert row.values is not None
            parse_row(row.values, settings.format, settings.fields)
        except BadRow as problem:
            problems.append(f"{row.file}:{row.line}: {problem}")
    if not count:
        raise NibbleError(f"{key}: {file} holds no rows.")
    if len(problems) == count or (problems and settings.on_bad_row == "error"):
        number = "none of the first rows can" if len(problems) == count else f"{len(problems)} of the first rows can't"
        raise NibbleError(f"{key}: {number} be used (data.format: {settings.format}): {problems[0]}")
    if problems:
        warn(f"{len(problems)} of the first {count} rows of {file} can't be used and will be skipped: {problems[0]}")
    return "the only row" if count == 1 else f"the first {count} rows"
