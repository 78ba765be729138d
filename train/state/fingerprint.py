"""What a resumed run must share with what is in its folder: a checkpoint, or the record of a finished run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from quant.common.errors import NibbleError
from quant.common.jsonfile import integer, mapping, text
from quant.common.words import shown
from train.config.load import Config

START_OVER = "start a new run in another output.dir, or with --restart, which moves this one aside"

# Files may have moved: what they hold counts, and is compared by train.resume.
_FILES = ("model.path", "data.train", "data.eval")

# Keys that may change between a checkpoint and its resumption: they leave every later weight as it would have been
# (on the same device; another device, or another number of processes, changes rounding only).
_FREE_ON_RESUME = (
    *_FILES,
    "data.on_bad_row",
    "train.activation_checkpointing",
    "train.kernels",
    "train.cuda_graph",
    "train.log_every",
    "train.eval_every",
    "train.keep_best",
    "train.patience",
    "train.patience_delta",
    "train.save_every",
    "train.save_minutes",
    "train.save_async",
    "train.keep_checkpoints",
    "train.resume",
    "train.device",
    "train.tensorboard",
    "output.dir",
    "output.expert_usage",
)
# A run may go on with any number of processes.
_FREE_SECTION = "parallel."


def resume_fingerprint(config: Config) -> dict[str, Any]:
    """Dotted key -> value (JSON types) of everything that a resumed run must share with its checkpoint.

    The length of the run counts, since the warm-up and the decay are shares of it; with a constant schedule and no
    warm-up it does not, so that such a run can be extended.
    """
    flat = flat_config(config)
    dropped = {key for key in flat if key in _FREE_ON_RESUME or key.startswith(_FREE_SECTION)}
    if config.adapter.kind == "none":
        dropped |= {key for key in flat if key.startswith("adapter.") and key != "adapter.kind"}
    train = config.train
    if train.balance == "none":
        # As in checkpoints of versions that didn't know these keys.
        dropped |= {"train.balance", "train.balance_rate"}
    dropped |= {f"adapter.{key}" for key in ("serve_with", "init_layout") if getattr(config.adapter, key) is None}
    if not config.data.template_variables:
        dropped.add("data.template_variables")  # for the same reason
    if train.schedule == "constant" and train.warmup_ratio == 0:
        dropped |= {"train.epochs", "train.max_steps"}
    elif train.max_steps is not None:
        dropped.add("train.epochs")
    return {key: value for key, value in flat.items() if key not in dropped}


@dataclass(frozen=True)
class Record:
    """What a run was made of when `path` (a checkpoint, or run.json) was written, at `step`.

    state, JSON: "fingerprint" (`resume_fingerprint`), "started" (ISO date), "base" (name and fingerprint of the model),
    "batches" (`StepBatches.state`), "held_out" (fingerprint of the rows, or null); of an extended run "extended"
    (train.state.extension).
    """

    path: Path
    step: int
    state: dict[str, Any]

    def require_same_config(self, fingerprint: dict[str, Any]) -> None:
        """Raises NibbleError naming the keys in which state["fingerprint"] differs from this run's `fingerprint`."""
        differences = resume_differences(self.state["fingerprint"], fingerprint)
        if differences:
            them = "it" if len(differences) == 1 else "them"
            raise NibbleError(
                f"{self.path} was written by another config: {'; '.join(differences)}.\n"
                f"Set {them} as before to continue it, or {START_OVER}."
            )

    def require_complete(self) -> None:
        """Raises NibbleError naming what of `state` is missing or of another type."""
        where, state = str(self.path), self.state
        require_keys(state, ("fingerprint", "started", "base", "batches", "held_out"), where)
        _, base, batches = (mapping(state, key, where, null=False) for key in ("fingerprint", "base", "batches"))
        require_keys(base, ("name", "fingerprint"), f"{where}: base")
        require_keys(batches, ("epoch", "position", "seed", "sequences", "data"), f"{where}: batches")
        for key in ("name", "fingerprint"):
            text(base, key, "", f"{where}: base")
        for key in ("epoch", "position", "seed", "sequences"):
            integer(batches, key, 0, f"{where}: batches", least=0, most=2**48)
        text(batches, "data", "", f"{where}: batches")
        for key in ("started", "held_out") if state["held_out"] is not None else ("started",):
            text(state, key, "", where)
        try:
            datetime.fromisoformat(state["started"])
        except ValueError as error:
            raise NibbleError(f"{where}: started is no date: {shown(state['started'])}.") from error


def require_keys(values: dict[str, Any], keys: Iterable[str], where: str) -> None:
    missing = [key for key in keys if key not in values]
    if missing:
        raise NibbleError(f"{where} lacks {', '.join(missing)}: it is damaged, or of another version of nibble.")


def flat_config(config: Config) -> dict[str, Any]:
    """Dotted key -> value (JSON types) of every key."""
    values = config.model_dump(mode="json")
    return {f"{name}.{key}": value for name, section in values.items() for key, value in section.items()}


def resume_differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each key in which a saved fingerprint differs from this run's; empty when none does."""
    absent = object()
    return [
        f"{key} is {_value(now, key)} now, {_value(saved, key)} there"
        for key in dict.fromkeys([*now, *saved])
        if now.get(key, absent) != saved.get(key, absent)
    ]


def _value(fingerprint: dict[str, Any], key: str) -> str:
    return json.dumps(fingerprint[key], ensure_ascii=False) if key in fingerprint else "not set"
