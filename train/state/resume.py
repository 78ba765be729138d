"""Finding a run's checkpoint, checking that it fits, and resuming from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from models.checkpoint.fingerprint import is_sampled
from models.checkpoint.hub import HubCheckpoint
from models.load import ModelFolder
from parallel.shards import Shards
from parallel.texts import gather_texts
from parallel.world import ALONE, World
from quant.common.errors import NibbleError
from quant.common.jsonfile import integer, mapping, number
from quant.common.words import counted
from train.config.load import Config
from train.data.load import Data
from train.model import trained_tensors
from train.output.report import Report
from train.state.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from train.state.checkpoint_folder import folders
from train.state.fingerprint import START_OVER, Record, flat_config, require_keys, resume_fingerprint
from train.state.run_folder import RunFolder


def find_checkpoint(config: Config, folder: RunFolder, report: Report, world: World = ALONE) -> Checkpoint | None:
    """The checkpoint that `train.resume` resumes from. Raises NibbleError rather than overwrite another run's."""
    wanted, here = config.train.resume, folders(folder.checkpoints)
    if wanted == "auto":
        checkpoint = latest_checkpoint(folder.checkpoints, report.note, world)
    else:
        checkpoint = None if wanted == "never" else read_checkpoint(Path(wanted), world)
        foreign = checkpoint is None or checkpoint.path.resolve().parent != folder.checkpoints.resolve()
        if here and foreign:
            raise NibbleError(
                f"train.resume: {wanted}, but {folder.checkpoints} holds checkpoints (the newest: {here[0].name}).\n"
                f"To go on from them set train.resume: auto; or {START_OVER}."
            )
        if foreign and folder.finished.exists():
            raise NibbleError(
                f"train.resume: {wanted}, but a run has finished in {folder.path}.\nTo keep it, {START_OVER}."
            )
    if checkpoint is not None:
        checkpoint.require_complete()
        checkpoint.require_same_config(resume_fingerprint(config))
    return checkpoint


def require_same_config(config: Config, device: torch.device, extend_to: int | None = None) -> None:
    """Raises NibbleError where a process has another config than rank 0, or runs on another kind of device: they would
    wait for each other in different places, or train with different settings.
    """
    values = {**flat_config(config), "train.device": device.type, "--extend-to": extend_to}
    found = [json.loads(text) for text in gather_texts(json.dumps(values))]
    for rank, theirs in enumerate(found):
        different = [
            f"{key} is {json.dumps(theirs.get(key))} there, {json.dumps(value)} for rank 0"
            for key, value in found[0].items()
            if theirs.get(key) != value
        ]
        if different:
            raise NibbleError(
                f"rank {rank} has another config than rank 0: {'; '.join(different[:3])}.\n"
                "Start all processes with the same config and --set options, on the same kind of device."
            )


def require_same_model(fingerprint: str, config: Config) -> str:
    """Rank 0's fingerprint of the base model. fingerprint: this process's, "" for all but the first of each machine.

    Raises NibbleError where a machine has another model under the same name than the others.
    """
    found = gather_texts(fingerprint)
    others = [str(rank) for rank, text in enumerate(found) if text not in ("", found[0])]
    if others:
        raise NibbleError(
            f"model.path: {config.model.path} is another model for rank {', '.join(others)} than for rank 0: its "
            "config.json or weights differ.\nCopy the same folder to every machine, or use one that all of them see."
        )
    return found[0]


def require_same_base(record: Record, base: dict[str, str], config: Config, source: ModelFolder) -> None:
    """Raises NibbleError when the record is of a run on another base model, whatever its folder.

    base: name and fingerprint (train.model.content_fingerprint) of this run's, which is in `source`.
    """
    fingerprint, was = record.state["base"]["fingerprint"], record.state["base"]["name"]
    if fingerprint == base["fingerprint"]:
        return
    if is_sampled(fingerprint) != is_sampled(base["fingerprint"]):  # one of them is of an earlier version of nibble
        if source.manifest is None:
            renew = "Checkpoints from now on hold a fingerprint of all its data."
            if HubCheckpoint(source.path).has_fingerprint(fingerprint, renew):
                return
        else:
            raise NibbleError(
                f"whether {config.model.path} is the model that {record.path} was trained on ({was}) can't be\n"
                "checked: one of them was made by an earlier version of nibble, with another kind of fingerprint.\n"
                f"Set model.path to the hub's folder ({source.manifest.source})."
            )
    was = "what was there then" if was == base["name"] else was
    raise NibbleError(
        f"model.path: {config.model.path} is not the model that {record.path} was trained on ({was}):\n"
        f"config.json or the weights differ. Set model.path to that model, or {START_OVER}."
    )


def restore_data(record: Record, data: Data, total_steps: int) -> None:
    """Let the rows go on after those that the run has seen.

    Raises NibbleError when they are other rows, or the run now has fewer steps.
    """
    if record.step > total_steps:
        raise NibbleError(
            f"{record.path} is at step {record.step}, beyond this run's last step, {total_steps}.\n"
            "Raise train.max_steps or train.epochs, or name an earlier checkpoint in train.resume."
        )
    data.train.restore(record.state["batches"])
    if record.state["held_out"] != (data.held_out.fingerprint() if data.held_out is not None else None):
        raise NibbleError(
            f"the held-out rows are not those of {record.path}, so that losses could not be compared: data.eval\n"
            f"has changed. Restore it, or {START_OVER}."
        )


def restore(
    checkpoint: Checkpoint | None,
    folder: RunFolder,
    shards: Shards,
    optimizer: Optimizer,
    total_steps: int,
    report: Report,
    world: World = ALONE,
) -> dict[str, Any]:
    """Put everything back to where the checkpoint was taken, so that the run goes on as if it had not stopped.

    Returns how far the run had come (the fields of train.loop.Progress); empty without a checkpoint.
    """
    if checkpoint is None:
        return {}
    progress = _progress(checkpoint)
    checkpoint.load_tensors(trained_tensors(shards).items(), shards.parts)
    reset = checkpoint.load_optimizer(optimizer, shards.parts)
    elsewhere = checkpoint.path.parent.parent / folder.metrics.name
    if world.first and not folder.metrics.exists() and elsewhere.exists():
        shutil.copyfile(elsewhere, folder.metrics)  # the checkpoint of another folder brings its history with it
    report.note(f"resuming from {checkpoint.path}, after step {checkpoint.step} of {total_steps}")
    if reset:
        report.note(
            f"the 8-bit optimiser state of {counted(len(reset), 'tensor')} is reset to zero: here it is cut into other "
            "parts than in the checkpoint, and blocks of 8-bit values can't be cut again"
        )
    return progress


def _progress(checkpoint: Checkpoint) -> dict[str, Any]:
    where, saved = f"{checkpoint.path}: progress", mapping(checkpoint.state, "progress", str(checkpoint.path))
    counts = ("step", "tokens", "labelled_tokens", "peak_memory_bytes")
    require_keys(saved, (*counts, "seconds"), where)
    seconds = number(saved, "seconds", 0, where) if saved["seconds"] != 0 else 0.0
    return {"seconds": seconds, **{key: integer(saved, key, 0, where, least=0, most=2**62) for key in counts}}
