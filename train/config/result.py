"""Where the result of a run lies: below output.dir, by what it trains."""

from __future__ import annotations

from pathlib import Path

from quant.common.errors import NibbleError
from train.config.load import Config

ADAPTER, MODEL = "adapter", "model"


def result_folder(config: Config) -> Path:
    return Path(config.output.dir) / (ADAPTER if config.adapter.kind == "lora" else MODEL)


def finished_result(config: Config, file: str) -> Path:
    """The result of the run of the config in `file`. Raises NibbleError where it isn't there."""
    result = result_folder(config)
    if not result.is_dir():
        raise NibbleError(
            f"{file}: the run has no result yet: there is no {result}.\nFinish it: python -m train --config {file}"
        )
    return result
