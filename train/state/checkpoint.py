"""Checkpoints of a run: written whole or not at all, verified when read, no pickle.

    step-000123/
      weights/                the trained tensors, each process's parts in files of its own (parallel/checkpoint.py)
      optimizer/              the optimiser's tensors (train/state/optimizer_state.py), in the same way
      state.json              step, the run's own state, the optimiser's values
      manifest.json           size and SHA-256 of the files above

Any number of processes reads it, one included.

A checkpoint is written to .partial-step-000123, flushed to the disk and renamed, so that a folder named step-… is
complete whenever a process or a machine dies. Older ones are deleted only after that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from models.checkpoint.tensorfile import DTYPE_NAMES, read_header
from parallel.parts import Cut, Part
from parallel.texts import gather_texts
from parallel.world import ALONE, World
from quant.common.errors import NibbleError
from quant.common.files import disk_error, sync_folder, write_atomically
from quant.common.jsonfile import integer, mapping, read_json
from quant.common.terminal import say
from quant.common.words import some
from train.state.checkpoint_folder import (
    FORMAT,
    MANIFEST,
    OPTIMIZER,
    REPLACED,
    STATE,
    UNFINISHED,
    WEIGHTS,
    folders,
    is_name,
    problem,
    prune,
    recover,
    tidy,
)
from train.state.fingerprint import START_OVER, Record, require_keys
from train.state.optimizer_state import OptimizerState, check_values, load_optimizer_state, room_for_state

# parallel.checkpoint is imported where it is used: torch's distributed checkpoint takes a second to import.


class UnusableCheckpointError(NibbleError):
    """A checkpoint that isn't what was written, or in a format that this version doesn't know."""


def to_stderr(message: str) -> None:
    say(message, sys.stderr)


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is written from. The tensors are this process's; those in the cuts are parts."""

    step: int
    weights: Mapping[str, Tensor]
    cuts: Mapping[str, Cut]
    optimizer: Mapping[str, Tensor]
    optimizer_cuts: Mapping[str, Cut]
    text: bytes  # state.json


def write_snapshot(
    directory: Path,
    snapshot: Snapshot,
    keep: int,
    report: Callable[[str], None],
    world: World,
    group: dist.ProcessGroup | None,
) -> Path:
    """The work of `train.state.saver.CheckpointSaver.save`, on all processes of `group`; returns the folder."""
    final = directory / f"step-{snapshot.step:06d}"
    partial = directory / f"{UNFINISHED}{final.name}"
    try:
        with _raise_on_all(final, group):
            if world.first:
                directory.mkdir(parents=True, exist_ok=True)
                tidy(directory)
                partial.mkdir()
        with _raise_on_all(final, group):
            written = _write_tensors(partial, snapshot, group)
        everything = gather_texts(json.dumps(written), group)
        with _raise_on_all(final, group):
            if world.first:
                write_atomically(partial / STATE, snapshot.text)
                files = {name: entry for text in everything for name, entry in json.loads(text).items()}
                unknown = {str(path.relative_to(partial)) for path in partial.rglob("*.safetensors")} - files.keys()
                if unknown:  # torch's writer would have to have left the file system that hashes
                    raise RuntimeError(f"{partial}: {min(unknown)} was written without its hash")
                files[STATE] = {"size": len(snapshot.text), "sha256": hashlib.sha256(snapshot.text).hexdigest()}
                manifest = {"format": FORMAT, "step": snapshot.step, "files": files}
                write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
                if final.exists():
                    final.rename(directory / f"{REPLACED}{final.name}")
                partial.rename(final)
                sync_folder(directory)
    except NibbleError as error:
        if world.first:
            shutil.rmtree(partial, ignore_errors=True)
        raise NibbleError(f"{error}\n{_what_is_left(directory, snapshot.step)}") from error
    if world.first:
        prune(directory, snapshot.step, keep, report)
    # No process starts the next step, where waiting is limited, while the first deletes old checkpoints.
    gather_texts("", group)
    return final


@contextlib.contextmanager
def _raise_on_all(path: Path, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A NibbleError, or an OSError concerning `path`, in here on one process is a NibbleError on all of them."""
    message, cause = "", None
    try:
        yield
    except (OSError, NibbleError) as error:
        cause = error
        message = str(disk_error(error, Path(error.filename or path)) if isinstance(error, OSError) else error)
    for text in gather_texts(message, group):
        if text:
            raise NibbleError(text) from cause


def _write_tensors(partial: Path, snapshot: Snapshot, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """The manifest's entries for the files that this process wrote."""
    from parallel.checkpoint import save_parts

    contents = {
        WEIGHTS: (snapshot.weights, snapshot.cuts),
        OPTIMIZER: (snapshot.optimizer, snapshot.optimizer_cuts),
    }
    written = {}
    for folder, (tensors, cuts) in contents.items():
        for name, entry in save_parts(partial / folder, tensors, cuts, group).items():
            written[f"{folder}/{name}"] = entry
        sync_folder(partial / folder)
    sync_folder(partial)
    return written


def _what_is_left(directory: Path, step: int) -> str:
    try:
        earlier = folders(directory)
    except OSError:  # the folder itself may be what can't be read
        earlier = []
    kept = f"{earlier[0]} is as it was" if earlier else "there is no earlier one"
    return f"The checkpoint of step {step} was not written; {kept}."


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checkpoint(Record):
    """A verified checkpoint. `state` is what `CheckpointSaver.save` was given; tensors are read when asked for."""

    optimizer_values: dict[str, Any]

    def load_tensors(
        self, named_tensors: Iterable[tuple[str, Tensor]], parts: Mapping[str, Part] | None = None
    ) -> None:
        """Copy the saved tensors into the trained ones of the same names, one at a time.

        Those named in `parts` are a part of the saved one. Each process reads what it holds, and waits for no other.
        Raises NibbleError, before anything is copied, when names, shapes or dtypes differ.
        """
        from parallel.checkpoint import load_parts

        tensors, parts = dict(named_tensors), parts or {}
        folder, saved = self._saved(WEIGHTS)
        missing = [name for name in tensors if name not in saved]
        unexpected = [name for name in saved if name not in tensors]
        if missing or unexpected:
            lists = [("lacks", missing), ("has, and this run doesn't train,", unexpected)]
            raise NibbleError(
                f"{self.path} belongs to another set of trained tensors: it "
                + "; it ".join(f"{verb} {some(names, 3)}" for verb, names in lists if names)
                + f".\nSet adapter and model as they were, or {START_OVER}."
            )
        for name, tensor in tensors.items():
            shape, dtype = saved[name]
            theirs = f"{list(shape)} {DTYPE_NAMES[dtype]}"
            ours = f"{list(parts[name].shape if name in parts else tensor.shape)} {DTYPE_NAMES[tensor.dtype]}"
            if theirs != ours:
                raise NibbleError(
                    f"{self.path}: {name} is {theirs}, this run's is {ours}.\n"
                    f"Set adapter and model as they were, or {START_OVER}."
                )
        load_parts(folder, tensors, parts)

    def load_optimizer(self, optimizer: Optimizer, parts: Mapping[str, Part] | None = None) -> tuple[str, ...]:
        """Put the saved state into a new optimiser of the same kind over the same parameters.

        parts: of the parameters of which the optimiser has a part. Each process reads what it holds. Returns the names
        of the parameters whose state is reset (`room_for_state`), the same on all processes. Raises
        NibbleError when kind, parameters or shapes differ.
        """
        state = self.optimizer_state(parts)
        load_optimizer_state(optimizer, state, parts)
        return state.reset

    def optimizer_state(self, parts: Mapping[str, Part] | None = None) -> OptimizerState:
        """For `load_optimizer_state`; a part of those named in `parts`. Tensors are on the host."""
        from parallel.checkpoint import load_parts

        folder, saved = self._saved(OPTIMIZER)
        state = room_for_state(saved, self.optimizer_values, parts or {})
        load_parts(folder, state.tensors, state.cuts)
        return state

    def _saved(self, what: str) -> tuple[Path, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
        """The folder to read the weights or the optimiser's state from, and shapes and dtypes of its tensors."""
        from parallel.checkpoint import saved_tensors

        alone = self.path / f"{what}.safetensors"  # of format 1: two files in one folder
        if alone.is_file():
            names, both = read_header(alone), saved_tensors(self.path)
            return self.path, {name: both[name] for name in names}
        return self.path / what, saved_tensors(self.path / what)


def latest_checkpoint(
    directory: Path, report: Callable[[str], None] = to_stderr, world: World = ALONE
) -> Checkpoint | None:
    """The newest checkpoint in `directory` that is whole; None when there is none at all.

    Half-written ones are ignored. `report` gets a line for each damaged one that is skipped. Raises NibbleError when
    there are checkpoints and none can be used: starting over should be the user's decision.

    On several processes all call it; they find what the first one finds, and each verifies its share of the files.
    """
    found: list[str] = []
    with _raise_on_all(directory):
        if world.first:
            recover(directory)
            found = [path.name for path in folders(directory)]
    found = json.loads(gather_texts(json.dumps(found))[0])
    unusable: list[str] = []
    for name in found:
        try:
            checkpoint = read_checkpoint(directory / name, world)
        except UnusableCheckpointError as error:
            unusable.append(str(error).partition("\n")[0])
            continue
        for message in unusable:
            report(f"{message} Continuing from {checkpoint.path.name} instead.")
        return checkpoint
    if unusable:
        more = f" The same goes for {len(unusable) - 1} before it." if len(unusable) > 1 else ""
        raise NibbleError(f"{unusable[0]}{more}\nNo checkpoint there can be continued; {START_OVER}.")
    return None


def read_checkpoint(path: Path, world: World = ALONE) -> Checkpoint:
    """The checkpoint in the folder `path`, after checking its files against their SHA-256.

    On several processes all call it, and each checks its share of the files.
    Raises NibbleError when it isn't a checkpoint, UnusableCheckpointError when it is damaged or of another format.
    """
    with _raise_on_all(path):
        _require_checkpoint(path)
    found = gather_texts(problem(path, hashes=True, share=(world.rank, world.size)) or "")
    wrong = next((text for text in found if text), None)
    if wrong is not None:
        raise UnusableCheckpointError(f"{path} can't be used: {wrong}.\nContinue from another one, or {START_OVER}.")
    where = str(path / STATE)
    try:
        saved = read_json(path / STATE, dict)
        require_keys(saved, ("step", "run", "optimizer"), where)
        step, optimizer = (
            integer(saved, "step", 0, where, least=0, most=2**48),
            mapping(saved, "optimizer", where, null=False),
        )
        check_values(optimizer, where)
        return Checkpoint(path, step, mapping(saved, "run", where, null=False), optimizer)
    except NibbleError as error:
        raise UnusableCheckpointError(f"{error}\nContinue from another one, or {START_OVER}.") from error


def _require_checkpoint(path: Path) -> None:
    if not path.is_dir() or not ((path / MANIFEST).exists() or is_name(path.name)):
        inside = next((d for d in (path, path / "checkpoints") if folders(d)), None)
        hint = f"Did you mean {folders(inside)[0]}?" if inside else "Checkpoints are the step-… folders of a run."
        raise NibbleError(f"{path} is {'not a checkpoint' if path.exists() else 'not there'}. {hint}")
