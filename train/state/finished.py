"""run.json, the record of a finished run: its figures, what the run was made of, and the files that came out of it.

When the command of a finished run is given again, what the run was made of is compared with what is there now. Names
don't count, content does: rows, weights, tokenizer and template, the adapter to start from, the config.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from models.checkpoint.side_files import CONFIG, side_names
from models.hub_contents import README
from quant.common.errors import NibbleError
from quant.common.files import is_file_name, sha256_file, write_atomically
from quant.common.jsonfile import integer, mapping, read_json, text
from quant.common.words import shown, some
from train.config.load import Config
from train.config.sections import TrainConfig
from train.model import start_adapter
from train.state.best import BestResult
from train.state.fingerprint import START_OVER, Record, require_keys
from train.state.run_folder import RunFolder

# Of run.json. 1, without this number, compared names alone.
FORMAT = 2
EARLY = ("patience", "patience_delta")  # the keys of `train` that end a run before its last step
_FIGURES = ("held_out_loss_before", "held_out_loss_after", "tokens", "labelled_tokens", "seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class FinishedRun(Record):
    """result: the figures, as `train.output.overview.summary_text` takes them. sizes: bytes of the files of the result,
    by their path in output.dir; best_sizes: of train.keep_best's.
    """

    result: dict[str, Any]
    sizes: dict[str, int]
    best_sizes: dict[str, int]

    def missing_files(self, best: bool = False) -> list[str]:
        """The files of the result that are gone, or have another size than when they were written."""
        folder = self.path.parent
        return [
            name
            for name, size in (self.best_sizes if best else self.sizes).items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != size
        ]


def inputs_of(config: Config, model: Path) -> dict[str, str | None]:
    """SHA-256 of the files that a run reads beside rows and weights: tokenizer and templates in `model`, and
    adapter.init_from's.
    """
    names = [name for name in side_names(model) if name != CONFIG]
    start = start_adapter(config)
    return {
        "tokenizer and templates": _hash(model, names),
        "adapter.init_from": None
        if start is None
        else _hash(start, ["adapter_config.json", "adapter_model.safetensors"]),
    }


def _hash(folder: Path, names: list[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        if (folder / name).is_file():
            digest.update(f"{name} {sha256_file(folder / name)}\n".encode())
    return digest.hexdigest()


def write_finished(
    folder: RunFolder,
    figures: dict[str, Any],
    saved: Path,
    state: dict[str, Any],
    inputs: dict[str, str | None],
    best: BestResult | None = None,
) -> FinishedRun:
    """Write run.json. figures: "steps", _FIGURES and "memory_of", and "stopped_early" (the keys EARLY) of a run that
    train.patience ended. state: as of the last checkpoint.
    """
    result = {
        "format": FORMAT,
        "finished": datetime.now().isoformat(sep=" ", timespec="seconds"),
        **figures,
        "saved": str(saved.relative_to(folder.path)),
        "files": _sizes(folder, saved),
        "made_of": {**state, "inputs": inputs},
    }
    if best is not None and best.evaluation is not None:
        result["best"] = {
            **asdict(best.evaluation),
            "saved": str(best.folder.relative_to(folder.path)),
            "files": _sizes(folder, best.folder),
        }
    write_atomically(folder.finished, (json.dumps(result, indent=2) + "\n").encode())
    return _read(folder, result)


def _sizes(folder: RunFolder, saved: Path) -> dict[str, int]:
    """Bytes of the files of a result, but for its README.md, which is the user's to change."""
    files = sorted(path for path in saved.rglob("*") if path.is_file() and path.name != README)
    return {str(path.relative_to(folder.path)): path.stat().st_size for path in files}


def finished_run(folder: RunFolder, has_checkpoint: bool) -> FinishedRun | None:
    """The record of the run that has finished in `folder`; None where none has.

    Raises NibbleError where it is damaged, and, without a checkpoint that would tell the same, where an earlier version
    of nibble wrote it: it isn't said then what the run was made of.
    """
    if not folder.finished.exists():
        return None
    advice = f"It says what the run that has finished here was made of. Restore it, or {START_OVER}."
    result = read_json(folder.finished, dict, advice)
    if "format" not in result and "identity" in result:
        if has_checkpoint:
            return None  # of which everything is compared, and at whose step nothing is left to train
        raise NibbleError(
            f"{folder.finished} was written by an earlier version of nibble and doesn't say what the run was made of,\n"
            f"and there is no checkpoint that would. Its result is still there; or {START_OVER}."
        )
    try:
        return _read(folder, result)
    except NibbleError as error:
        raise NibbleError(f"{error}\n{advice}") from error


def _read(folder: RunFolder, result: dict[str, Any]) -> FinishedRun:
    where = str(folder.finished)
    require_keys(result, ("format", "finished", "steps", *_FIGURES, "memory_of", "saved", "files", "made_of"), where)
    if integer(result, "format", 0, where) != FORMAT:
        raise NibbleError(f"{where} has format {result['format']}, this version of nibble reads {FORMAT}.")
    for key in ("finished", "memory_of", "saved"):
        text(result, key, "x", where)
    for key in _FIGURES:
        value = result[key]
        if not _is_figure(value) and not (value is None and key.startswith("held_out")):
            raise NibbleError(f"{where}: {key} must be a number, got {shown(value)}.")
    sizes, best = _read_saved(folder, result, where), mapping(result, "best", where)
    shown_result = {**result, "saved": str(folder.path / result["saved"])}
    best_sizes = {}
    if best:
        of = f"{where}: best"
        require_keys(best, ("step", "loss", "saved", "files"), of)
        integer(best, "step", 0, of, least=0, most=2**48)
        text(best, "saved", "x", of)
        if not _is_figure(best["loss"]):
            raise NibbleError(f"{of}: loss must be a number, got {shown(best['loss'])}.")
        best_sizes = _read_saved(folder, best, of)
        shown_result["best"] = {**best, "saved": str(folder.path / best["saved"])}
    mapping(result, "stopped_early", where)
    steps = integer(result, "steps", 0, where, most=2**48)
    record = FinishedRun(folder.finished, steps, mapping(result, "made_of", where), shown_result, sizes, best_sizes)
    record.require_complete()
    mapping(record.state, "inputs", f"{where}: made_of")
    return record


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18


def _read_saved(folder: RunFolder, result: dict[str, Any], where: str) -> dict[str, int]:
    """The sizes of a result's files, after a look at their names."""
    sizes = mapping(result, "files", where)
    for name in sizes:
        integer(sizes, name, 0, f"{where}: files", least=0, most=2**62)
    for name in (result["saved"], *sizes):
        if not is_file_name(name):
            raise NibbleError(f"{where}: {shown(name)} can't be a file in the run's folder.")
    return sizes


def require_same_inputs(finished: FinishedRun, inputs: dict[str, str | None]) -> None:
    """Raises NibbleError naming which of the files are others now than when the run was made."""
    was = mapping(finished.state, "inputs", str(finished.path))
    different = [name for name in inputs if was.get(name) != inputs[name]]
    if different:
        raise NibbleError(
            f"the run that has finished in {finished.path.parent} was made of other files: {' and '.join(different)} "
            f"changed since.\nRestore them, or {START_OVER}."
        )


def result_of(
    finished: FinishedRun, last_checkpoint: int | None, total_steps: int, train: TrainConfig
) -> tuple[bool, str]:
    """Whether nothing is left to do, now that all that was compared is the same; and what to say about it, if anything.

    A run that train.patience ended is through while patience is the same. last_checkpoint: step of the newest one, None
    where there is none. Raises NibbleError where it is needed and gone.
    """
    folder, missing = finished.path.parent, finished.missing_files()
    early = finished.result.get("stopped_early") == {key: getattr(train, key) for key in EARLY}
    if (finished.step == total_steps or (early and finished.step < total_steps)) and not missing:
        return True, "\n".join(_remarks(finished, last_checkpoint, train))
    if not missing:
        what = f"it can't go on from step {finished.step} to {total_steps}"
    else:
        what = f"{some(missing, 2)} of its result can't be written again"
    if last_checkpoint is None:
        raise NibbleError(
            f"a run has finished in {folder}, but its checkpoints are gone: {what}.\nRestore {folder / 'checkpoints'}, "
            f"or {START_OVER}."
        )
    return False, f"{some(missing, 2)} is gone or damaged: written again from the checkpoint" if missing else ""


def _remarks(finished: FinishedRun, last_checkpoint: int | None, train: TrainConfig) -> Iterator[str]:
    """What is no longer there of a run that is through, or never was."""
    if last_checkpoint is None:
        yield f"Its checkpoints are gone, so that it can't be continued. To train again, {START_OVER}."
    missing, best = finished.missing_files(best=True), mapping(finished.result, "best", str(finished.path))
    if missing:
        yield (
            f"{some(missing, 2)} is gone or damaged, and can't be written again: nothing else has the weights of step "
            f"{best['step']}."
        )
    if train.keep_best and not best:
        yield "train.keep_best wasn't set when it was trained: only the last result is there."
