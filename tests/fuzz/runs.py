"""What a run reads of an earlier one in its folder: run.json, and a checkpoint's state.json and manifest.json."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.checkpoint_helpers import save
from tests.fuzz.mutations import text_of
from train.config.sections import TrainConfig
from train.state.checkpoint import read_checkpoint
from train.state.checkpoint_folder import MANIFEST, STATE
from train.state.finished import finished_run, require_same_inputs, result_of, write_finished
from train.state.run_folder import RunFolder

Readable = Callable[[], AbstractContextManager[None]]

_MADE_OF = {
    "fingerprint": {"train.seed": 0, "adapter.rank": 4},
    "started": "2026-01-01T00:00:00",
    "base": {"name": "org/base", "fingerprint": "full:0"},
    "batches": {"epoch": 0, "position": 4, "seed": 0, "sequences": 9, "data": "0"},
    "held_out": None,
}
_FIGURES = {
    "steps": 2,
    "held_out_loss_before": None,
    "held_out_loss_after": 0.5,
    "tokens": 9,
    "labelled_tokens": 3,
    "seconds": 0.5,
    "peak_memory_bytes": 2**20,
    "memory_of": "GPU tensors",
}
_INPUTS: dict[str, str | None] = {"tokenizer and templates": "0", "adapter.init_from": None}


def _open_record(run: RunFolder, readable: Readable, data: bytes) -> None:
    run.finished.write_bytes(data)
    with readable():
        record = finished_run(run, has_checkpoint=False)
        assert record is not None
        record.require_same_config(_MADE_OF["fingerprint"])  # type: ignore[arg-type]
        require_same_inputs(record, _INPUTS)
        result_of(record, 2, 2, TrainConfig())


def _open_checkpoint(whole: Path, readable: Readable, drawn: tuple[str, bytes]) -> None:
    """A changed state.json has its checksum in the manifest, or it would not be looked at."""
    name, data = drawn
    path = whole.with_name("step-000003")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    (path / name).write_bytes(data)
    if name == STATE:
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["files"][STATE] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (path / MANIFEST).write_text(json.dumps(manifest))
    with readable():
        checkpoint = read_checkpoint(path)
        checkpoint.require_complete()
        checkpoint.require_same_config(_MADE_OF["fingerprint"])  # type: ignore[arg-type]
        checkpoint.optimizer_state()


def run_inputs(folder: Path, readable: Readable) -> Iterator[tuple[str, st.SearchStrategy[Any], Callable[[Any], None]]]:
    """Names, inputs, and what opens one, in `folder`."""
    run = RunFolder(folder / "run")
    run.adapter.mkdir(parents=True)
    (run.adapter / "adapter_config.json").write_text("{}")
    write_finished(run, _FIGURES, run.adapter, _MADE_OF, _INPUTS)
    record = json.loads(run.finished.read_text())
    yield "runs", text_of(record), functools.partial(_open_record, run, readable)
    whole = save(run.checkpoints, 2, **_MADE_OF)
    files = [st.tuples(st.just(name), text_of(json.loads((whole / name).read_text()))) for name in (STATE, MANIFEST)]
    yield "checkpoints", st.one_of(files), functools.partial(_open_checkpoint, whole, readable)
