"""Writes the checkpoints of a run: at once, or in the background while the training goes on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.parts import Part
from parallel.world import ALONE, NO_LIMIT, World
from train.state.checkpoint import Snapshot, to_stderr, write_snapshot
from train.state.optimizer_state import OptimizerState

_ABORT_TIMEOUT = 10.0  # seconds to wait for a checkpoint in progress when the run ends with an error


class CheckpointSaver:
    """Saves into `directory`, keeping the newest `keep`; `report` gets a line for each old one that can't be deleted.

    asynchronous: `save` copies what this process holds to the host and returns; a thread writes it, and the checkpoint
    is in place when all processes have written. A run that dies before goes on from the one before. An error shows at
    the next `save` or `wait`, on all processes alike.

    To be used with `with`, which ends when everything is written; on several processes by all of them, inside
    `parallel.world.process_group`.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        report: Callable[[str], None] = to_stderr,
        *,
        world: World = ALONE,
        asynchronous: bool = False,
    ) -> None:
        self._directory, self._keep, self._report = directory, keep, report
        self._world, self._asynchronous = world, asynchronous
        self._thread: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._pending: Future[Path] | None = None

    def __enter__(self) -> CheckpointSaver:
        if self._asynchronous:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if dist.is_initialized():
            # Its messages must not mix with those of the training, nor its time be limited: disks differ.
            self._group = dist.new_group(backend="gloo", timeout=NO_LIMIT)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and self._group is not None:
            # The others may never write their part, or wait for this process in another collective.
            wait([self._pending] if self._pending else [], _ABORT_TIMEOUT)
            return
        try:
            # An error that ended the run already is the one to report.
            with contextlib.suppress(*([] if kind is None else [Exception])):
                self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        optimizer: OptimizerState,
        state: dict[str, Any],
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        """Write the checkpoint of `step`, after the one before is finished, and delete all but the newest.

        `tensors` are the trained ones by name, in any dtype and on any device. `state` is whatever the run needs to go
        on, as JSON types; "fingerprint" in it is what `Checkpoint.require_same_config` compares. Checkpoints of later
        steps, left by a run that was resumed from an earlier one, are deleted. Extra memory: that of
        `parallel.checkpoint.save_parts`.

        On several processes all call it, for a directory that all of them see. `tensors` are then what each holds: of
        those named in `parts` a part, of the others the whole. All else is saved as the first process has it.

        Raises NibbleError naming the path when the disk is full or not writable, on all processes when on one; earlier
        checkpoints are then as before.
        """
        self.wait()
        text = json.dumps({"step": step, "run": state, "optimizer": optimizer.values}, indent=1).encode()
        weights, moments = tensors, optimizer.tensors
        if self._thread is not None:
            weights, moments = _copies(weights), _copies(moments)
        snapshot = Snapshot(step, weights, parts or {}, moments, optimizer.cuts, text)
        arguments = (self._directory, snapshot, self._keep, self._report, self._world, self._group)
        if self._thread is None:
            write_snapshot(*arguments)
        else:
            self._pending = self._thread.submit(write_snapshot, *arguments)

    def wait(self) -> None:
        """Until the checkpoint that is being written, if any, is in place. Raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
