"""Where the result of a run lies: below output.dir, by what it trains."""

from __future__ import annotations

from pathlib import Path

from quant.common.errors import NibbleError
from train.config.load import Config

ADAPTER, MODEL, BEST = "adapter", "model", "-best"


def result_folder(config: Config) -> Path:
    return Path(config.output.dir) / (ADAPTER if config.adapter.kind == "lora" else MODEL)


def finished_result(config: Config, file: str) -> Path:
    """The result of the run of the config in `file`: the best one where train.keep_best kept it, else the last one.

    Raises NibbleError where the run has none yet.
    """
    result = result_folder(config)
    if not result.is_dir():
        raise NibbleError(
            f"{file}: the run has no result yet: there is no {result}.\nFinish it: python -m train --config {file}"
        )
    best = result.with_name(result.name + BEST)
    return best if config.train.keep_best and best.is_dir() else result
