"""The command of a finished run again: what the run was made of decides, not the names of files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint.conversion import convert
from models.load import load_model
from parallel.world import ALONE as WORLD
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.helpers import save_tiny_glm
from tests.run_helpers import SIZES, World, curve, error_of, losses, make_world, settings
from train.__main__ import main
from train.config.load import load_config
from train.state.finished import finished_run
from train.state.run_folder import RunFolder, move_aside

WAYS = "start a new run in another output.dir, or with --restart, which moves this one aside.\n"
DONE = "; there is nothing left to do."
STEPS = {"train__max_steps": 2, "model__storage": "none"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    folder = tmp_path_factory.mktemp("finished")
    world = make_world(folder)
    assert main(settings(world, folder / "run", **STEPS)) == 0
    return world, folder


@pytest.fixture
def again(finished: tuple[World, Path], tmp_path: Path) -> tuple[World, Path, list[str]]:
    """A copy of everything, under other names: model, rows, and the folder of the finished run."""
    world, folder = finished
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copyfile(folder / "rows.jsonl", tmp_path / "rows.jsonl")
    shutil.copytree(folder / "run", tmp_path / "run")
    copied = World(tmp_path / "model", tmp_path / "rows.jsonl", world.prompts)
    return copied, tmp_path / "run", settings(copied, tmp_path / "run", **STEPS)


@pytest.fixture
def nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.run.load_trainable_model", lambda *a, **k: pytest.fail("the model was loaded"))


@pytest.mark.usefixtures("nothing_is_trained")
def test_the_same_content_under_other_names_is_the_same_run(
    finished: tuple[World, Path], again: tuple[World, Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, arguments = again
    capsys.readouterr()
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert DONE in shown.out
    # A copied folder speaks of itself, not of the one that it was copied from.
    assert f"adapter   {out / 'adapter'}\n" in shown.out
    assert str(finished[1]) not in shown.out + shown.err
    record = json.loads((out / "run.json").read_text())
    assert record["saved"] == "adapter"
    assert not any(name.startswith("/") for name in record["files"])


def drop_a_row(world: World, out: Path) -> None:
    world.rows.write_text("".join(world.rows.read_text().splitlines(keepends=True)[1:]))


def other_weights(world: World, out: Path) -> None:
    save_tiny_glm(world.model, seed=1, **SIZES)


def other_template(world: World, out: Path) -> None:
    path = world.model / "tokenizer_config.json"
    described = json.loads(path.read_text())
    described["chat_template"] += "{# renders the same, so the rows are the same #}"
    path.write_text(json.dumps(described))


def other_generation(world: World, out: Path) -> None:
    (world.model / "chat_template.json").write_text("{}")


@pytest.mark.usefixtures("nothing_is_trained")
@pytest.mark.parametrize("checkpoints", [True, False], ids=["", "without checkpoints"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop_a_row, "the training rows are not those that the run began with ("),
        (other_weights, "is not the model that {out}/run.json was trained on ("),
        (other_template, "the run that has finished in {out} was made of other files: tokenizer and templates changed"),
        (other_generation, "the run that has finished in {out} was made of other files: tokenizer and templates"),
    ],
)
def test_what_changed_is_named_with_the_ways_to_train_again(
    again: tuple[World, Path, list[str]],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[World, Path], None],
    named: str,
    checkpoints: bool,
) -> None:
    world, out, arguments = again
    change(world, out)
    if not checkpoints:
        shutil.rmtree(out / "checkpoints")
    message = error_of(arguments, capsys)
    assert named.replace("{out}", str(out)) in message
    assert "another output.dir, or with --restart" in message
    assert len(message.splitlines()) <= 4


@pytest.mark.usefixtures("nothing_is_trained")
def test_another_config_is_named_without_a_checkpoint_too(
    again: tuple[World, Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    world, out, _ = again
    shutil.rmtree(out / "checkpoints")
    message = error_of(settings(world, out, **STEPS, train__seed=5), capsys)
    assert message == (
        f"error: {out}/run.json was written by another config: train.seed is 5 now, 0 there.\n"
        f"       Set it as before to continue it, or {WAYS}"
    )


def test_a_converted_base_is_compared_by_content(
    finished: tuple[World, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its fingerprint is that of its source, so the files themselves are compared."""
    converted, out = tmp_path / "nf4", tmp_path / "run"
    convert(finished[0].model, converted, StorageSpec("nf4"), torch.float32)
    arguments = settings(World(converted, finished[0].rows, finished[0].prompts), out, train__max_steps=2)
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(arguments) == 0
    assert DONE in capsys.readouterr().out
    layer = converted / "layer-00001.safetensors"
    weights = layer.read_bytes()
    layer.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert f"{converted}: 1 file missing or changed since it was written: {layer.name}.\n" in error_of(
        arguments, capsys
    )
    layer.write_bytes(weights)
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps({**config, "routed_scaling_factor": 3.5}))
    assert "config.json: 'routed_scaling_factor' is 3.5; the folder was converted with" in error_of(arguments, capsys)


def test_the_adapter_that_a_run_started_from_counts(
    finished: tuple[World, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, folder = finished
    start, out = tmp_path / "start", tmp_path / "run"
    shutil.copytree(folder / "run" / "adapter", start)
    arguments = settings(world, out, **STEPS, adapter__init_from=str(start))
    assert main(arguments) == 0
    weights = bytearray((start / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (start / "adapter_model.safetensors").write_bytes(weights)
    assert "was made of other files: adapter.init_from changed since.\n" in error_of(arguments, capsys)


def test_what_is_deleted_is_noticed(again: tuple[World, Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    _, out, arguments = again
    weights = out / "adapter" / "adapter_model.safetensors"
    trained = weights.read_bytes()

    # The adapter: written again from the checkpoint.
    shutil.rmtree(out / "adapter")
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert (
        "adapter/adapter_config.json, adapter/adapter_model.safetensors is gone or damaged: written again" in shown.err
    )
    assert DONE not in shown.out
    assert weights.read_bytes() == trained
    weights.write_bytes(trained[:-1])
    assert main(arguments) == 0
    assert weights.read_bytes() == trained

    # The checkpoints: the run is still the same, but can't go on.
    shutil.rmtree(out / "checkpoints")
    capsys.readouterr()
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert DONE in shown.out
    assert f"Its checkpoints are gone, so that it can't be continued. To train again, {WAYS}" in shown.err

    # Both.
    shutil.rmtree(out / "adapter")
    message = error_of(arguments, capsys)
    assert message.startswith(
        f"error: a run has finished in {out}, but its checkpoints are gone: adapter/adapter_config.json, "
        "adapter/adapter_model.safetensors of its result can't be written again.\n"
    )
    assert message.endswith(WAYS)


def test_a_longer_run_needs_the_checkpoints(
    finished: tuple[World, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world, out = finished[0], tmp_path / "run"
    constant = {**STEPS, "train__schedule": "constant", "train__warmup_ratio": 0.0}
    assert main(settings(world, out, **constant)) == 0
    shutil.copytree(out / "checkpoints", tmp_path / "kept")
    shutil.rmtree(out / "checkpoints")
    arguments = settings(world, out, **{**constant, "train__max_steps": 3})
    assert "its checkpoints are gone: it can't go on from step 2 to 3.\n" in error_of(arguments, capsys)
    shutil.copytree(tmp_path / "kept", out / "checkpoints")
    assert main(arguments) == 0
    assert len(losses(out, "train")) == 3


def test_restart_moves_the_earlier_run_aside(
    again: tuple[World, Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    world, out, arguments = again
    first = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    before = curve(out)
    drop_a_row(world, out)
    for number in (1, 2):
        capsys.readouterr()
        assert main([*arguments, "--restart"]) == 0
        assert f"--restart: the earlier run was moved to {out}.{number}\n" in capsys.readouterr().err
    moved = out.with_name("run.1")
    kept = {path.relative_to(moved): path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    assert kept == {name: data for name, data in first.items() if name != Path(".lock")}
    assert curve(out) == curve(out.with_name("run.2")) != before
    # Without an earlier run there is nothing to move.
    shutil.rmtree(out)
    assert main([*arguments, "--restart"]) == 0
    assert not out.with_name("run.3").exists()


def test_restart_moves_nothing_else(
    again: tuple[World, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, arguments = again
    config = load_config(arguments[1], [f"adapter.init_from={out / 'adapter'}"])
    with pytest.raises(NibbleError, match=r"^--restart would move adapter\.init_from \(.*\nMove it out of "):
        move_aside(RunFolder(out), config, WORLD)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").touch()
    with pytest.raises(NibbleError, match=r"photos holds no run of nibble \(cat\.png\), and is left as it is"):
        move_aside(RunFolder(photos), load_config(arguments[1]), WORLD)
    # torchrun, which starts the command again after a failure, wants the run to go on.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert move_aside(RunFolder(out), load_config(arguments[1]), WORLD) is None


@pytest.mark.usefixtures("nothing_is_trained")
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (None, None, "run.json is not valid JSON: Expecting value at line 1 column 1"),
        ("made_of", ..., "run.json lacks made_of: it is damaged, or of another version of nibble."),
        ("steps", "two", "run.json: steps must be a positive integer, got 'two'."),
        ("format", 3, "run.json has format 3, this version of nibble reads 2."),
        ("tokens", None, "run.json: tokens must be a number, got None."),
        ("saved", "../other", "run.json: '../other' can't be a file in the run's folder."),
        ("files", {"/etc/passwd": 3}, "run.json: '/etc/passwd' can't be a file in the run's folder."),
        ("saved", "a\0", "run.json: 'a\\x00' can't be a file in the run's folder."),
        ("files", {"a" * 300: 3}, "aaa' can't be a file in the run's folder."),
        ("files", [], "run.json: files must be an object, got []."),
        ("made_of", {}, "run.json lacks fingerprint, started, base, batches, held_out"),
    ],
)
def test_a_damaged_record_is_named(
    again: tuple[World, Path, list[str]], capsys: pytest.CaptureFixture[str], key: str | None, value: Any, said: str
) -> None:
    _, out, arguments = again
    record = json.loads((out / "run.json").read_text())
    if value is ...:
        del record[key]
    elif key is not None:
        record[key] = value
    (out / "run.json").write_text("" if key is None else json.dumps(record))
    message = error_of(arguments, capsys)
    assert said in message
    assert message.endswith(WAYS)


def test_the_record_of_an_earlier_version(
    again: tuple[World, Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """It had the names' hash and an absolute path. The checkpoint knows what the run was made of."""
    world, out, arguments = again
    record = json.loads((out / "run.json").read_text())
    for key in ("format", "files", "made_of"):
        del record[key]
    (out / "run.json").write_text(json.dumps({"identity": "0" * 64, **record, "saved": "/elsewhere/adapter"}))
    shutil.copytree(out, out.with_name("other"))
    before = curve(out)
    assert main(arguments) == 0
    assert curve(out) == before
    assert json.loads((out / "run.json").read_text())["saved"] == "adapter"

    shutil.rmtree(out.with_name("other") / "checkpoints")
    message = error_of(settings(world, out.with_name("other"), **STEPS), capsys)
    assert "was written by an earlier version of nibble and doesn't say what the run was made of" in message
    assert message.endswith(WAYS)


def test_the_files_of_a_full_fine_tuning(finished: tuple[World, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(settings(finished[0], out, **STEPS, adapter__kind="none")) == 0
    record = finished_run(RunFolder(out), has_checkpoint=False)
    assert record is not None and record.missing_files() == []
    assert {"model/config.json", "model/tokenizer.json"} < record.sizes.keys()
    load_model(record.result["saved"], storage="none", dtype="float32")
