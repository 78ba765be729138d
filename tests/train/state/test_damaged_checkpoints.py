"""Checkpoints that are not what was written: found when they are read, with a message."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from quant.common.errors import NibbleError
from tests.checkpoint_helpers import SHARD, save, weights_of
from train.state.checkpoint import (
    UnusableCheckpointError,
    latest_checkpoint,
    read_checkpoint,
)
from train.state.fingerprint import START_OVER, Record


def damage(path: Path, how: str) -> None:
    weights = weights_of(path)
    if how == "flipped bit":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif how == "cut short":
        os.truncate(weights, 100)
    elif how == "missing file":
        shutil.rmtree(path / "optimizer")
    elif how == "missing manifest":
        (path / "manifest.json").unlink()
    elif how == "broken manifest":
        (path / "manifest.json").write_text("{")
    elif how == "other manifest":
        (path / "manifest.json").write_text('{"format": 1, "files": {}}')
    else:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "format": 4}))


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("flipped bit", f"weights/{SHARD} is not what was written (its SHA-256 differs)"),
        ("cut short", f"weights/{SHARD} has 100 bytes instead of {{size}}"),
        ("missing file", f"optimizer/{SHARD} can't be read (No such file or directory)"),
        ("missing manifest", "manifest.json is missing"),
        (
            "broken manifest",
            "manifest.json is not valid JSON: Expecting property name enclosed in double quotes at line 1 column 2",
        ),
        ("other manifest", "manifest.json lacks state.json"),
        ("other format", "it has format 4, this version of nibble reads 1 to 3"),
    ],
)
def test_damaged_checkpoint(tmp_path: Path, how: str, problem: str) -> None:
    save(tmp_path, 2)
    path = save(tmp_path, 4)
    problem = problem.format(size=weights_of(path).stat().st_size)
    damage(path, how)

    messages: list[str] = []
    checkpoint = latest_checkpoint(tmp_path, messages.append)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert messages == [f"{path} can't be used: {problem}. Continuing from step-000002 instead."]

    with pytest.raises(UnusableCheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value) == f"{path} can't be used: {problem}.\nContinue from another one, or {START_OVER}."


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ([], "manifest.json holds a list, expected an object"),
        ({"format": "3"}, "manifest.json: format must be an integer of at least 0, got '3'"),
        ({"files": 7}, "manifest.json: files must be an object, got 7"),
        ({"files": {"state.json": 7}}, "manifest.json: state.json must be an object, got 7"),
        ({"files": {"state.json": {"size": "x"}}}, "manifest.json: state.json: size must be an integer of at least 0"),
        ({"files": {"state.json": {"size": 10**40}}}, "manifest.json: state.json: size is 1000"),
        ({"files": {"state.json": {"size": 3, "sha256": None}}}, "manifest.json: state.json: sha256 must be text"),
        ({"files": {"../x": {}, "state.json": {}}}, "manifest.json: '../x' can't be a file in the checkpoint"),
        ({"files": {"/etc/passwd": {}, "state.json": {}}}, "manifest.json: '/etc/passwd' can't be a file in the ch"),
    ],
)
def test_a_manifest_of_other_types(tmp_path: Path, changes: Any, problem: str) -> None:
    path = save(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes} if changes else changes))
    with pytest.raises(UnusableCheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path} can't be used: {problem}")
    assert str(caught.value).endswith(START_OVER + ".")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("run", None, "state.json lacks run: it is damaged, or of another version of nibble."),
        ("step", "two", "state.json: step must be an integer of at least 0, got 'two'."),
        ("optimizer", [], "state.json: optimizer must be an object, got []."),
        ("optimizer", {"steps": {}}, "state.json: optimizer lacks kind: it is damaged, or of another version of nib"),
        ("optimizer", {"kind": "x", "steps": None}, "state.json: steps must be an object, got None."),
        ("optimizer", {"kind": "x", "steps": {}, "blocks": None}, "state.json: blocks must be an object, got None."),
        ("optimizer", {"kind": "x", "steps": {}, "blocks": {"a": [1]}}, "state.json: blocks: a must be a list of"),
        ("optimizer", {"kind": 3, "steps": {}}, "state.json: kind must be text, got 3."),
        ("optimizer", {"kind": "x", "steps": {"a": -1}}, "state.json: steps: a must be an integer of at least 0"),
        (
            "optimizer",
            {"kind": "x", "steps": {}, "blocks": {"a": ["b"]}},
            "state.json: blocks: a must be a list of integers",
        ),
    ],
)
def test_a_state_of_other_types(tmp_path: Path, key: str, value: Any, problem: str) -> None:
    path = save(tmp_path, 2)
    state = json.loads((path / "state.json").read_text())
    text = json.dumps(
        {name: old for name, old in state.items() if name != key} | ({} if value is None else {key: value})
    )
    (path / "state.json").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UnusableCheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}/{problem}")


STATE = {
    "fingerprint": {},
    "started": "2026-01-02T03:04:05",
    "base": {"name": "n", "fingerprint": "f"},
    "batches": {"epoch": 0, "position": 0, "seed": 0, "sequences": 1, "data": "d"},
    "held_out": None,
}


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("fingerprint", [], "x: fingerprint must be an object, got []."),
        ("fingerprint", None, "x: fingerprint must be an object, got None."),
        ("started", "yesterday", "x: started is no date: 'yesterday'."),
        ("started", 3, "x: started must be text, got 3."),
        ("base", {"name": "n"}, "x: base lacks fingerprint: it is damaged, or of another version of nibble."),
        ("base", {"name": "n", "fingerprint": 3}, "x: base: fingerprint must be text, got 3."),
        ("batches", {**STATE["batches"], "epoch": 0.5}, "x: batches: epoch must be an integer of at least 0, got 0.5."),
        ("batches", {**STATE["batches"], "data": []}, "x: batches: data must be text, got []."),
        ("held_out", 3, "x: held_out must be text, got 3."),
    ],
)
def test_what_a_run_was_made_of_has_types(key: str, value: Any, problem: str) -> None:
    Record(Path("x"), 2, STATE).require_complete()
    with pytest.raises(NibbleError) as caught:
        Record(Path("x"), 2, {**STATE, key: value}).require_complete()
    assert str(caught.value) == problem


def test_all_damaged(tmp_path: Path) -> None:
    for path in [save(tmp_path, step) for step in (2, 4)]:
        damage(path, "missing manifest")
    with pytest.raises(NibbleError) as caught:
        latest_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/step-000004 can't be used: manifest.json is missing. The same goes for 1 before it.\n"
        f"No checkpoint there can be continued; {START_OVER}."
    )


def test_fallback_is_reported_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 2)
    damage(save(tmp_path, 4), "missing manifest")
    latest_checkpoint(tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(
        "step-000004 can't be used: manifest.json is missing. Continuing from step-000002 instead.\n"
    )


def test_not_a_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "run" / "checkpoints", 2)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        with pytest.raises(NibbleError) as caught:
            read_checkpoint(folder)
        assert str(caught.value) == f"{folder} is not a checkpoint. Did you mean {path}?"
    with pytest.raises(NibbleError) as caught:
        read_checkpoint(tmp_path / "else")
    assert str(caught.value) == f"{tmp_path}/else is not there. Checkpoints are the step-… folders of a run."
