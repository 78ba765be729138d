"""The result with the lowest held-out loss: adapter-best/ or model-best/ in the run's folder. And patience: when enough
evaluations in a row were no better.

The folder holds beside the result evaluation.json, which says after which step it was and what the loss was. It is
written whole under another name and then takes the place of the one before, so that the three files always belong
together. An evaluation's result is in place before its line is in metrics.jsonl: a run that is killed in between
evaluates, and writes, once more.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.texts import gather_texts
from parallel.world import ALONE, World
from quant.common.errors import NibbleError
from quant.common.files import disk_errors, sync_folder, write_atomically
from quant.common.jsonfile import integer, read_json
from quant.common.words import shown

RECORD = "evaluation.json"
_UNFINISHED, _REPLACED = ".partial-", ".replaced-"


@dataclass(frozen=True)
class Evaluation:
    """loss: in nats per labelled token of the held-out rows, after `step`."""

    step: int
    loss: float


def evaluations_without_improvement(losses: Iterable[float], delta: float) -> int:
    """How many of the last held-out losses were not lower than the lowest before by more than `delta`."""
    lowest, count = math.inf, 0
    for loss in losses:
        count = count + 1 if loss >= lowest - delta else 0
        lowest = loss if count == 0 else lowest
    return count


class BestResult:
    """Keeps in `folder` the result of the evaluation with the lowest loss. All processes of `world` call its methods.

    write: writes the result, of this evaluation, to a folder that doesn't exist yet; called on all processes.
    """

    def __init__(self, folder: Path, write: Callable[[Path, Evaluation], object], world: World = ALONE) -> None:
        self.folder, self._write, self._world = folder, write, world
        self.evaluation: Evaluation | None = None

    def resume(self, step: int, run: Path, report: Callable[[str], None]) -> None:
        """Go on with what is in the folder, of a run that goes on after `step` from a checkpoint of the folder `run`.

        `report` gets a line where that isn't the best of the evaluations that the run remembers.
        """
        text = ""
        if self._world.first:
            self._recover()
            theirs = run / self.folder.name
            if theirs.resolve() != self.folder.resolve():
                found = read_evaluation(theirs)
                if found is not None and found.step <= step:
                    self._replace_by(lambda partial: shutil.copytree(theirs, partial))
            found = read_evaluation(self.folder)
            if found is None:
                report(f"{self.folder.name} isn't there: it will hold the best of the evaluations from here on")
            elif found.step > step:
                report(
                    f"{self.folder.name} is of step {found.step}, after this checkpoint (held-out loss "
                    f"{found.loss:.4f}); it stays until an evaluation is lower"
                )
            text = json.dumps(asdict(found)) if found is not None else ""
        text = gather_texts(text)[0]
        self.evaluation = Evaluation(**json.loads(text)) if text else None

    def offer(self, evaluation: Evaluation) -> bool:
        """Write the result as it is now, if the evaluation's loss is lower than the lowest; whether it was."""
        if self.evaluation is not None and evaluation.loss >= self.evaluation.loss:
            return False

        def write(partial: Path) -> None:
            self._write(partial, evaluation)
            if self._world.first:
                write_atomically(partial / RECORD, (json.dumps(asdict(evaluation)) + "\n").encode())

        self._replace_by(write)
        self.evaluation = evaluation
        return True

    def _replace_by(self, write: Callable[[Path], object]) -> None:
        partial, replaced = (self.folder.with_name(f"{mark}{self.folder.name}") for mark in (_UNFINISHED, _REPLACED))
        if not self._world.first:
            write(partial)
            return
        with disk_errors(self.folder):
            for path in (*self.folder.parent.glob(f"{partial.name}*"), replaced):
                shutil.rmtree(path, ignore_errors=True)
            write(partial)
            for path in self.folder.rglob("*"):  # what somebody has put there stays
                kept = partial / path.relative_to(self.folder)
                if path.is_file() and not kept.exists():
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, kept)
            if self.folder.exists():
                self.folder.rename(replaced)
            partial.rename(self.folder)
            sync_folder(self.folder.parent)
            shutil.rmtree(replaced, ignore_errors=True)

    def _recover(self) -> None:
        """Put back what was moved aside for a successor that never came."""
        replaced = self.folder.with_name(f"{_REPLACED}{self.folder.name}")
        if replaced.exists() and not self.folder.exists():
            replaced.rename(self.folder)


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation whose result is in `folder`; None where there is none. Raises NibbleError for a damaged record."""
    path = folder / RECORD
    if not path.is_file() or not any(folder.glob("*.safetensors")):
        return None
    advice = f"Move {folder} elsewhere; the run then keeps the best of the evaluations from here on."
    found = read_json(path, dict, advice)
    loss = found.get("loss")
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not math.isfinite(loss):
        raise NibbleError(f"{path}: loss must be a number, got {shown(loss)}.\n{advice}")
    return Evaluation(integer(found, "step", -1, str(path), least=0, most=2**48), float(loss))
