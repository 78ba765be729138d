"""output.dir that disappears during a run, or isn't what is needed from the start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train.loop
from tests.run_helpers import World, error_of, make_world, settings
from train.__main__ import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


PLAIN = {"model__storage": "none", "train__max_steps": 3}


def move(out: Path) -> None:
    out.rename(out.with_name("moved"))


def delete(out: Path) -> None:
    shutil.rmtree(out)


def replace(out: Path) -> None:
    """As `mv out moved; cp -r moved out`."""
    move(out)
    shutil.copytree(out.with_name("moved"), out)


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    original = train.loop.clip_gradients

    def meddled(parameters: Any, max_norm: Any, at: int, **more: Any) -> Any:
        if at == step:
            action()
        return original(parameters, max_norm, at, **more)

    monkeypatch.setattr("train.loop.clip_gradients", meddled)


@pytest.mark.parametrize("noticed_by", ["metrics", "checkpoint", "adapter"])
@pytest.mark.parametrize("change", [move, delete, replace])
def test_a_folder_that_disappears_stops_the_run_at_the_next_write(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    noticed_by: str,
) -> None:
    out = tmp_path / "run"
    arguments = settings(world, out, **PLAIN, train__log_every=1 if noticed_by == "metrics" else 1000)
    before: list[Path] = []

    def change_it() -> None:
        change(out)
        before.extend(sorted(out.rglob("*")))

    if noticed_by == "metrics":
        before_step(monkeypatch, 2, change_it)
    elif noticed_by == "checkpoint":
        monkeypatch.setattr("train.output.metrics.MetricsLog.sync", lambda self: change_it())
    else:
        original = train.loop.Loop.run
        monkeypatch.setattr("train.loop.Loop.run", lambda self: (original(self), change_it())[0])
    message = error_of(arguments, capsys)
    named = out / "metrics.jsonl" if change is replace and noticed_by == "metrics" else out
    assert message == (
        f"error: {named} was moved, deleted or replaced while this run was writing to it. The run stops here.\n"
        "       Put it back, and the same command goes on from the last checkpoint in it.\n"
    )
    # Nothing was made in a new folder.
    assert sorted(out.rglob("*")) == before
    assert out.exists() == (change is replace)


def test_a_folder_that_is_put_back_goes_on(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    arguments = settings(world, out, **PLAIN, train__save_every=1)
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda: move(out))
        error_of(arguments, capsys)
    (tmp_path / "moved").rename(out)
    assert main(arguments) == 0
    assert "step-000001, after step 1 of 3" in capsys.readouterr().err


def test_metrics_that_are_deleted_alone(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    before_step(monkeypatch, 2, (out / "metrics.jsonl").unlink)
    message = error_of(settings(world, out, **PLAIN), capsys)
    assert message.startswith(f"error: {out / 'metrics.jsonl'} was moved, deleted or replaced while this run was")
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        *((name, "file") for name in ("checkpoints", "adapter", "tensorboard")),
        *((name, "folder") for name in ("metrics.jsonl", "run.json", "config.yaml", "loss.png", "skipped_rows.jsonl")),
        ("run.log", "folder"),
        ("checkpoints", "dangling link"),
    ],
)
def test_what_stands_in_the_way_is_found_at_the_start(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    what: str,
) -> None:
    monkeypatch.setattr("train.run.open_folder", lambda *a: pytest.fail("the model was opened"))
    out = tmp_path / "run"
    out.mkdir()
    if what == "folder":
        (out / name).mkdir()
    elif what == "file":
        (out / name).touch()
    else:
        (out / name).symlink_to(tmp_path / "nowhere")
    message = error_of(settings(world, out, **PLAIN, train__tensorboard=True), capsys)
    wanted = "a folder, where the run writes a file" if what == "folder" else "a file, where the run needs a folder"
    assert message == f"error: output.dir: {out / name} is {wanted}. Move it elsewhere.\n"


@pytest.mark.parametrize("name", ["", "checkpoints", "adapter"])
def test_a_folder_that_may_not_be_written_to(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / "run" / name
    folder.mkdir(parents=True)
    # (A superuser may write everywhere, so that chmod would show nothing.)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder)
    message = error_of(settings(world, tmp_path / "run", **PLAIN), capsys)
    assert message == f"error: output.dir: {folder} can't be written to: you may not write there.\n"
