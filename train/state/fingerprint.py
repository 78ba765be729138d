"""What a resumed run must share with its checkpoint, and what makes two runs the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from train.config.load import Config

# Files may have moved: what they hold counts, and is compared by train.resume.
_FILES = ("model.path", "data.train", "data.eval")

# Keys that may change between a checkpoint and its resumption: they leave every later weight as it would have been
# (on the same device; another device, or another number of processes, changes rounding only).
_FREE_ON_RESUME = (
    *_FILES,
    "data.on_bad_row",
    "train.activation_checkpointing",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.save_minutes",
    "train.save_async",
    "train.keep_checkpoints",
    "train.resume",
    "train.device",
    "train.tensorboard",
    "output.dir",
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
    if not config.data.template_variables:
        dropped.add("data.template_variables")  # for the same reason
    if train.schedule == "constant" and train.warmup_ratio == 0:
        dropped |= {"train.epochs", "train.max_steps"}
    elif train.max_steps is not None:
        dropped.add("train.epochs")
    return {key: value for key, value in flat.items() if key not in dropped}


def run_identity(config: Config) -> str:
    """Two configs with the same identity describe the same run of the same length, from files of the same names."""
    flat = flat_config(config)
    also = {key: flat[key] for key in (*_FILES, "train.epochs", "train.max_steps")}
    return fingerprint_hash({**resume_fingerprint(config), **also})


def flat_config(config: Config) -> dict[str, Any]:
    """Dotted key -> value (JSON types) of every key."""
    values = config.model_dump(mode="json")
    return {f"{name}.{key}": value for name, section in values.items() for key, value in section.items()}


def fingerprint_hash(fingerprint: dict[str, Any]) -> str:
    """SHA-256 (hex) of a fingerprint, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def resume_differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each key in which a checkpoint's fingerprint differs from this run's; empty when none does."""
    absent = object()
    return [
        f"{key} is {_shown(now, key)}, the checkpoint has {_shown(saved, key)}"
        for key in dict.fromkeys([*now, *saved])
        if now.get(key, absent) != saved.get(key, absent)
    ]


def _shown(fingerprint: dict[str, Any], key: str) -> str:
    return json.dumps(fingerprint[key], ensure_ascii=False) if key in fingerprint else "not set"
