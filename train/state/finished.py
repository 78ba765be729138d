"""run.json, the record of a finished run: its figures, what the run was made of, and the files that came out of it.

When the command of a finished run is given again, what the run was made of is compared with what is there now. Names
don't count, content does: rows, weights, tokenizer and template, the adapter to start from, the config.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from models.checkpoint.side_files import CONFIG, side_names
from quant.common.errors import NibbleError
from quant.common.files import is_file_name, sha256_file, write_atomically
from quant.common.jsonfile import integer, mapping, read_json, text
from quant.common.words import shown, some
from train.config.load import Config
from train.state.fingerprint import START_OVER, Record, require_keys
from train.state.run_folder import RunFolder

# Of run.json. 1, without this number, compared names alone.
FORMAT = 2
_FIGURES = ("held_out_loss_before", "held_out_loss_after", "tokens", "labelled_tokens", "seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class FinishedRun(Record):
    """result: the figures, as `train.output.overview.summary_text` takes them. sizes: bytes of the files of the result,
    by their path in output.dir.
    """

    result: dict[str, Any]
    sizes: dict[str, int]

    def missing_files(self) -> list[str]:
        """The files of the result that are gone, or have another size than when they were written."""
        folder = self.path.parent
        return [
            name
            for name, size in self.sizes.items()
            if not (folder / name).is_file() or (folder / name).stat().st_size != size
        ]


def inputs_of(config: Config, model: Path) -> dict[str, str | None]:
    """SHA-256 of the files that a run reads beside rows and weights: tokenizer and templates in `model`, and
    adapter.init_from's.
    """
    names = [name for name in side_names(model) if name != CONFIG]
    start = config.adapter.init_from if config.adapter.kind == "lora" else None
    return {
        "tokenizer and templates": _hash(model, names),
        "adapter.init_from": None
        if start is None
        else _hash(Path(start), ["adapter_config.json", "adapter_model.safetensors"]),
    }


def _hash(folder: Path, names: list[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        if (folder / name).is_file():
            digest.update(f"{name} {sha256_file(folder / name)}\n".encode())
    return digest.hexdigest()


def write_finished(
    folder: RunFolder, figures: dict[str, Any], saved: Path, state: dict[str, Any], inputs: dict[str, str | None]
) -> FinishedRun:
    """Write run.json. figures: "steps", _FIGURES and "memory_of". state: as of the last checkpoint."""
    files = sorted(path for path in saved.rglob("*") if path.is_file())
    result = {
        "format": FORMAT,
        "finished": datetime.now().isoformat(sep=" ", timespec="seconds"),
        **figures,
        "saved": str(saved.relative_to(folder.path)),
        "files": {str(path.relative_to(folder.path)): path.stat().st_size for path in files},
        "made_of": {**state, "inputs": inputs},
    }
    write_atomically(folder.finished, (json.dumps(result, indent=2) + "\n").encode())
    return _read(folder, result)


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
        usable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
        if not usable and not (value is None and key.startswith("held_out")):
            raise NibbleError(f"{where}: {key} must be a number, got {shown(value)}.")
    sizes = mapping(result, "files", where)
    for name in sizes:
        integer(sizes, name, 0, f"{where}: files", least=0, most=2**62)
    for name in (result["saved"], *sizes):
        if not is_file_name(name):
            raise NibbleError(f"{where}: {shown(name)} can't be a file in the run's folder.")
    shown_result = {**result, "saved": str(folder.path / result["saved"])}
    steps = integer(result, "steps", 0, where, most=2**48)
    record = FinishedRun(folder.finished, steps, mapping(result, "made_of", where), shown_result, sizes)
    record.require_complete()
    mapping(record.state, "inputs", f"{where}: made_of")
    return record


def require_same_inputs(finished: FinishedRun, inputs: dict[str, str | None]) -> None:
    """Raises NibbleError naming which of the files are others now than when the run was made."""
    was = mapping(finished.state, "inputs", str(finished.path))
    different = [name for name in inputs if was.get(name) != inputs[name]]
    if different:
        raise NibbleError(
            f"the run that has finished in {finished.path.parent} was made of other files: {' and '.join(different)} "
            f"changed since.\nRestore them, or {START_OVER}."
        )


def result_of(finished: FinishedRun, last_checkpoint: int | None, total_steps: int) -> tuple[bool, str]:
    """Whether nothing is left to do, now that all that was compared is the same; and a line to say about it, if any.

    last_checkpoint: step of the newest one, None where there is none. Raises NibbleError where it is needed and gone.
    """
    folder, missing = finished.path.parent, finished.missing_files()
    if finished.step == total_steps and not missing:
        gone = f"Its checkpoints are gone, so that it can't be continued. To train again, {START_OVER}."
        return True, "" if last_checkpoint is not None else gone
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
