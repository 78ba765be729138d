"""output.dir: the names of its files, the lock on it, and messages for a full disk or memory.

output.dir/
  config.yaml          the config with every key filled in; runs again as it is
  run.log              what was printed, and tracebacks (of other processes: ranks/rank-1.log …)
  run.json             written when the run has finished: its figures, and what it was made of
  metrics.jsonl        a line per logged step and per evaluation; tensorboard/ shows the same
  loss.png             the same as a picture
  expert_usage.png     how often each expert was chosen, with output.expert_usage
  skipped_rows.jsonl   rows that could not be used, if there are any
  .rows.npz            their tokens for the other processes, while a run of several starts
  checkpoints/         what a run is resumed from
  adapter/ or model/   the result: an adapter in PEFT's format, or a checkpoint in the hub's
  adapter-best/ or model-best/  that of the lowest held-out loss, with train.keep_best
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from parallel.texts import gather_texts
from parallel.world import ProcessLostError, World, lost_contact
from quant.common.errors import NibbleError
from quant.common.files import disk_error, disk_errors, identity, moved_error, write_atomically
from quant.common.words import some
from train.config.load import Config
from train.config.result import ADAPTER, BEST, MODEL
from train.state.checkpoint_folder import folders
from train.state.fingerprint import flat_config

LOCK = ".lock"
# Keys that name what a run reads.
_READ = ("model.path", "data.train", "data.eval", "adapter.init_from", "train.resume")


class RunFolder:
    """The paths of what is in output.dir, and whether that is still the folder in which the run began."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self.config = path / "config.yaml"
        self.log = path / "run.log"
        self.finished = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.plot = path / "loss.png"
        self.usage_plot = path / "expert_usage.png"
        self.skipped_rows = path / "skipped_rows.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / ADAPTER
        self.model = path / MODEL
        self.best_adapter = path / f"{ADAPTER}{BEST}"
        self.best_model = path / f"{MODEL}{BEST}"

    def result(self, config: Config, best: bool = False) -> Path:
        """The folder of the run's result, or of its best one."""
        if config.adapter.kind == "lora":
            return self.best_adapter if best else self.adapter
        return self.best_model if best else self.model

    def require_usable(self, config: Config) -> None:
        """Raises NibbleError where something stands in the way of a file or folder that the run will write."""
        results = [self.result(config), *([self.result(config, best=True)] if config.train.keep_best else [])]
        folders = [self.checkpoints, *results, *([self.tensorboard] if config.train.tensorboard else [])]
        for path in (self.config, self.log, self.finished, self.metrics, self.plot, self.usage_plot, self.skipped_rows):
            if path.is_dir():
                raise NibbleError(f"output.dir: {path} is a folder, where the run writes a file. Move it elsewhere.")
        for path in folders:
            if os.path.lexists(path) and not path.is_dir():
                raise NibbleError(f"output.dir: {path} is a file, where the run needs a folder. Move it elsewhere.")
        for path in (self.path, *folders):
            if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
                raise NibbleError(f"output.dir: {path} can't be written to: you may not write there.")

    def hold(self) -> None:
        """From now on this very folder is meant, whatever else comes to have its name."""
        self._identity = identity(self.path.stat())

    def require_in_place(self) -> None:
        """To be called before anything is written: in a folder that takes its place nothing of the run would be whole.

        Raises NibbleError where the folder that was held has been moved, deleted or replaced.
        """
        try:
            same = identity(self.path.stat()) == self._identity
        except OSError:
            same = False
        if not same:
            raise moved_error(self.path)


@contextlib.contextmanager
def sole_run_in(folder: Path) -> Iterator[None]:
    """Two runs that write to one folder would damage each other's files; the system lifts the lock with the process."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise NibbleError(f"output.dir: {folder} can't be written to: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NibbleError(
                f"output.dir: another run is writing to {folder}. Wait for it, or name another folder."
            ) from error
        except OSError as error:
            raise NibbleError(
                f"output.dir: {folder} can't be locked ({error.strerror}). Name a folder on a file system with locks."
            ) from error
        yield


def move_aside(folder: RunFolder, config: Config, world: World) -> Path | None:
    """Move what is in output.dir to a new folder beside it (.1, .2 …), and return that; None where there is nothing.

    To be called by the first process, under the lock: the folder, the lock and the logs that the other processes have
    opened already stay. Raises NibbleError where this would move what the new run reads.
    """
    path = folder.path.resolve()
    stay = {LOCK, *(("ranks",) if world.size > 1 else ())}
    # torchrun starts the same command again after a failure: the run is then to go on.
    found = sorted(entry for entry in path.iterdir() if entry.name not in stay)
    if not found or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return None
    known = {part.name for part in vars(folder).values() if isinstance(part, Path) and part != folder.path}
    if not known & {entry.name for entry in found}:
        raise NibbleError(
            f"--restart: {folder.path} holds no run of nibble ({some([entry.name for entry in found], 3)}), and is "
            "left as it is.\nName another output.dir."
        )
    for key, value in flat_config(config).items():
        for entry in value if isinstance(value, list) else [value]:
            name = entry["path"] if isinstance(entry, dict) and "path" in entry else entry
            inside = isinstance(name, str) and key in _READ and os.path.lexists(name) and Path(name).resolve()
            if inside and inside.is_relative_to(path):
                raise NibbleError(
                    f"--restart would move {key} ({name}) aside with the earlier run.\n"
                    f"Move it out of {folder.path}, or name another output.dir."
                )
    target = next(
        aside for number in itertools.count(1) if not os.path.lexists(aside := path.with_name(f"{path.name}.{number}"))
    )
    with disk_errors(target):
        target.mkdir()
        # run.json first: where this is cut short, what stays is not taken for a finished run.
        for entry in sorted(found, key=lambda entry: entry != path / folder.finished.name):
            entry.rename(target / entry.name)
    return target


def require_shared(folder: Path, world: World) -> None:
    """Raises NibbleError, on all processes, where one of them has another folder under the name of output.dir.

    Each writes its part of a checkpoint there: in different folders no checkpoint would be whole.
    """
    token, path = gather_texts(os.urandom(8).hex())[0], folder / f".seen-by-all-{world.size}"
    if world.first:
        write_atomically(path, token.encode())
    world.wait()
    try:
        seen = path.read_text(encoding="utf-8")
    except OSError:
        seen = ""
    others = [str(rank) for rank, text in enumerate(gather_texts(seen)) if text != token]
    if world.first:
        path.unlink(missing_ok=True)
    if others:
        raise NibbleError(
            f"output.dir: {folder} is another folder for rank {', '.join(others)} than for rank 0. Every process "
            "writes its part of a checkpoint there.\nName a folder on a file system that all machines share."
        )


def last_checkpoint(folder: RunFolder) -> str:
    found = folders(folder.checkpoints)
    if not found:
        return "No checkpoint was written yet (train.save_minutes, train.save_every)."
    return f"The last checkpoint is {found[0]}."


@contextlib.contextmanager
def explained_errors(folder: Path) -> Iterator[None]:
    """Memory and disk can be full, or another process lost, in any step of a run that writes to `folder`: no step has
    to see to it by itself.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise disk_error(error, Path(error.filename or folder)) from error
    except torch.OutOfMemoryError as error:
        raise NibbleError(
            f"the GPU's memory is full: {str(error).splitlines()[0]}\n"
            "Lower train.micro_batch_size, data.sequence_length or adapter.rank, take model.storage nf4,\n"
            "or switch train.activation_checkpointing on."
        ) from error
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        reason = str(error).partition("\n")[0].partition("] ")[2].partition(". ")[0] or str(error)
        raise ProcessLostError(
            f"lost contact with another process: {reason}\n"
            "It has exited, failed with an error of its own, hangs, or takes longer than parallel.lost_after.\n"
            f"{last_checkpoint(RunFolder(folder))}"
        ) from error
