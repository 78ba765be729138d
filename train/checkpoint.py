"""Checkpoints of a run: written whole or not at all, verified when read, no pickle.

    step-000123/
      weights.safetensors     the trained tensors
      optimizer.safetensors   the optimiser's tensors (train.optim.OptimizerState)
      state.json              step, the run's own state, the optimiser's values, random number generators
      manifest.json           size and SHA-256 of the files above

A checkpoint is written to .partial-step-000123, flushed to the disk and renamed, so that a folder named step-… is
complete whenever the process or the machine dies. Older ones are deleted only after that.
"""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from models.tensorfile import (
    DTYPE_NAMES,
    TensorWriter,
    disk_error,
    read_header,
    sha256_file,
    sync_folder,
    write_atomically,
)
from quant.errors import NibbleError
from train.fingerprint import resume_differences
from train.optim import OptimizerState

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
FORMAT = 1

_NAME = re.compile(r"step-(\d{6,})")
# Folders on their way in or out. A replaced one comes back when the process died before its successor was in place.
_PARTIAL, _REPLACED, _DELETED = ".partial-", ".replaced-", ".deleted-"
_START_ANEW = "start anew in another output.dir"


class UnusableCheckpointError(NibbleError):
    """A checkpoint that isn't what was written, or in a format that this version doesn't know."""


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizer: OptimizerState,
    state: dict[str, Any],
    keep: int,
    report: Callable[[str], None] = _to_stderr,
) -> Path:
    """Write the checkpoint of `step` into `directory` and delete all but the newest `keep`; returns its folder.

    `tensors` are the trained ones by name, in any dtype and on any device (one at a time is copied to the host).
    `state` is whatever the run needs to go on, as JSON types; "fingerprint" in it is what `require_same_config`
    compares. The random number generators are saved too. Checkpoints of later steps, left by a run that was taken up
    again from an earlier one, are deleted. `report` is told of old checkpoints that couldn't be deleted.

    Raises NibbleError naming the path when the disk is full or not writable; earlier checkpoints are then as before.
    """
    directory = Path(directory)
    final = directory / f"step-{step:06d}"
    partial = directory / f"{_PARTIAL}{final.name}"
    text = {"step": step, "run": state, "optimizer": optimizer.values, "rng": rng_state()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _tidy(directory)
        partial.mkdir()
        _write_tensors(partial / WEIGHTS, tensors)
        _write_tensors(partial / OPTIMIZER, optimizer.tensors)
        write_atomically(partial / STATE, json.dumps(text, indent=1).encode())
        files = {
            name: {"size": (partial / name).stat().st_size, "sha256": sha256_file(partial / name)}
            for name in (WEIGHTS, OPTIMIZER, STATE)
        }
        manifest = {"format": FORMAT, "step": step, "files": files}
        write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        if final.exists():
            final.rename(directory / f"{_REPLACED}{final.name}")
        partial.rename(final)
        sync_folder(directory)
    except (OSError, NibbleError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = disk_error(error, Path(error.filename or final)) if isinstance(error, OSError) else error
        raise NibbleError(f"{cause}\n{_what_is_left(directory, step)}") from error
    _prune(directory, step, keep, report)
    return final


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    writer = TensorWriter(path, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    try:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _what_is_left(directory: Path, step: int) -> str:
    try:
        earlier = _folders(directory)
    except OSError:  # the folder itself may be what can't be read
        earlier = []
    kept = f"{earlier[0]} is as it was" if earlier else "there is no earlier one"
    return f"The checkpoint of step {step} was not written; {kept}."


def _folders(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, newest first."""
    found = [path for path in directory.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _recover(directory: Path) -> None:
    """Put back a checkpoint that was moved aside for a successor that never came."""
    for path in directory.glob(f"{_REPLACED}*"):
        final = directory / path.name.removeprefix(_REPLACED)
        if not final.exists():
            path.rename(final)


def _tidy(directory: Path) -> None:
    _recover(directory)
    for prefix in (_PARTIAL, _REPLACED, _DELETED):
        for path in directory.glob(f"{prefix}*"):
            shutil.rmtree(path)


def _prune(directory: Path, newest: int, keep: int, report: Callable[[str], None]) -> None:
    kept = 0
    for path in _folders(directory):
        # Of earlier ones only the complete count: the promise is to have `keep` to go back to.
        if _step_of(path) == newest or (
            _step_of(path) < newest and kept < keep and _problem(path, hashes=False) is None
        ):
            kept += 1
            continue
        try:
            # Under another name first, so that no half-deleted checkpoint looks like one.
            path.rename(directory / f"{_DELETED}{path.name}")
        except OSError as error:
            report(f"{path}: this old checkpoint can't be deleted ({error.strerror}).")
    for prefix in (_REPLACED, _DELETED):
        for path in directory.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)  # what stays is tried again at the next save


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state` is what `save_checkpoint` was given; tensors are read when they are asked for."""

    path: Path
    step: int
    state: dict[str, Any]
    optimizer_values: dict[str, Any]
    rng: dict[str, Any]

    def load_tensors(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the saved tensors into the trained ones of the same names, one at a time.

        Raises NibbleError, before anything is copied, when names, shapes or dtypes differ.
        """
        tensors = dict(named_tensors)
        saved = read_header(self.path / WEIGHTS)
        missing = [name for name in tensors if name not in saved]
        unexpected = [name for name in saved if name not in tensors]
        if missing or unexpected:
            lists = [("lacks", missing), ("has, and this run doesn't train,", unexpected)]
            raise NibbleError(
                f"{self.path} belongs to another set of trained tensors: it "
                + "; it ".join(f"{verb} {_listed(names)}" for verb, names in lists if names)
                + f".\nSet adapter and model as they were, or {_START_ANEW}."
            )
        for name, tensor in tensors.items():
            theirs = f"{list(saved[name].shape)} {saved[name].dtype}"
            ours = f"{list(tensor.shape)} {DTYPE_NAMES[tensor.dtype]}"
            if theirs != ours:
                raise NibbleError(
                    f"{self.path}: {name} is {theirs}, this run's is {ours}.\n"
                    f"Set adapter and model as they were, or {_START_ANEW}."
                )
        with torch.no_grad(), safe_open(self.path / WEIGHTS, framework="pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))

    def optimizer_state(self) -> OptimizerState:
        """For `train.optim.load_optimizer_state`. Tensors are on the host."""
        return OptimizerState(load_file(self.path / OPTIMIZER), self.optimizer_values)

    def restore_rng(self) -> None:
        """Set the random number generators to where they were (CUDA's where there are as many devices)."""
        restore_rng(self.rng)

    def require_same_config(self, fingerprint: dict[str, Any]) -> None:
        """Raises NibbleError naming the keys in which state["fingerprint"] differs from this run's `fingerprint`."""
        differences = resume_differences(self.state["fingerprint"], fingerprint)
        if differences:
            them = "it" if len(differences) == 1 else "them"
            raise NibbleError(
                f"{self.path} was written by another config: {'; '.join(differences)}.\n"
                f"Set {them} as in the checkpoint to continue it, or {_START_ANEW}."
            )


def latest_checkpoint(directory: Path, report: Callable[[str], None] = _to_stderr) -> Checkpoint | None:
    """The newest checkpoint in `directory` that is whole; None when there is none at all.

    Half-written ones are ignored. `report` is told of a damaged one that is passed over. Raises NibbleError when there
    are checkpoints and none can be used: starting anew should be the user's decision.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return None
    _recover(directory)
    unusable: list[str] = []
    for path in _folders(directory):
        try:
            checkpoint = read_checkpoint(path)
        except UnusableCheckpointError as error:
            unusable.append(str(error).partition("\n")[0])
            continue
        for problem in unusable:
            report(f"{problem} Continuing from {checkpoint.path.name} instead.")
        return checkpoint
    if unusable:
        more = f" The same goes for {len(unusable) - 1} before it." if len(unusable) > 1 else ""
        raise NibbleError(
            f"{unusable[0]}{more}\n"
            f"No checkpoint there can be continued. Delete {directory} to start anew, or name another output.dir."
        )
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`, after checking its files against their SHA-256.

    Raises NibbleError when it isn't a checkpoint, UnusableCheckpointError when it is damaged or of another format.
    """
    path = Path(path)
    if not path.is_dir() or not ((path / MANIFEST).exists() or _NAME.fullmatch(path.name)):
        inside = next((d for d in (path, path / "checkpoints") if d.is_dir() and _folders(d)), None)
        hint = f"Did you mean {_folders(inside)[0]}?" if inside else "Checkpoints are the step-… folders of a run."
        raise NibbleError(f"{path} is {'not a checkpoint' if path.exists() else 'not there'}. {hint}")
    problem = _problem(path, hashes=True)
    if problem:
        raise UnusableCheckpointError(f"{path} can't be used: {problem}.\nContinue from another one, or {_START_ANEW}.")
    text = json.loads((path / STATE).read_bytes())
    return Checkpoint(path, text["step"], text["run"], text["optimizer"], text["rng"])


def _problem(path: Path, hashes: bool) -> str | None:
    """What is wrong with a checkpoint's files; with `hashes` False only what is quickly seen."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']}, this version of nibble reads {FORMAT}"
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
        wanted = [files[name] for name in (WEIGHTS, OPTIMIZER, STATE)]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} can't be read"
    except OSError as error:
        return f"{MANIFEST} can't be read ({error.strerror})"
    for name, (size, digest) in zip((WEIGHTS, OPTIMIZER, STATE), wanted, strict=True):
        try:
            actual = (path / name).stat().st_size
            if actual != size:
                return f"{name} has {actual:,} bytes instead of {size:,}"
            if hashes and sha256_file(path / name) != digest:
                return f"{name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} can't be read ({error.strerror})"
    return None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# -------------------------------------------------------------------------------------------- random number generators


def rng_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators (CUDA's where it is in use), as JSON types."""
    version, words, gauss = random.getstate()
    kind, numbers, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(numbers).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _encoded(torch.get_rng_state()),
        "cuda": [_encoded(state) for state in cuda],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Set the generators to a state from `rng_state`; CUDA's only where there are as many devices as there were."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, numbers, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(numbers, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decoded(state["torch"]))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decoded(text) for text in state["cuda"]])


def _encoded(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
