"""What is wrong with a run, said in a message: before anything large is read, where that can be."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import load_model
from models.adapters.files import save_adapter
from models.adapters.lora import add_lora
from models.adapters.targets import AdapterSpec
from models.checkpoint.conversion import convert
from models.load import open_folder
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.processes import LIMIT
from tests.run_helpers import ROOT, World, error_of, losses, make_world, settings
from train.__main__ import main
from train.config.load import load_config
from train.model import check_model
from train.schedule import rate_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


# --- before anything large is read


def test_what_the_command_says_of_an_unknown_target(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("not a row\n")  # which would be an error of its own
    arguments = settings(world, tmp_path / "run", data__train=str(rows), adapter__targets=["attention", "q_proj"])
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "error: adapter.targets: 'q_proj' matches nothing in glm4_moe_lite (multi-head latent attention).\n"
        "       Its attention projections are q_a_proj, q_b_proj, "
    )
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_data", "load_trainable_model"):
        monkeypatch.setattr(f"train.run.{name}", lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter__layers": [0, 7]}, "adapter.layers: 7 out of range; glm4_moe_lite has layers 0 to 1 here."),
        (
            {"adapter__targets": ["o_proj"], "adapter__rank": {"experts": 4}},
            "adapter.rank.experts: 'experts' names nothing that adapter.targets adapts. Adapted here: attention.",
        ),
        (
            {"data__sequence_length": 513},
            "data.sequence_length: 513 is more than the model is made for: max_position_embeddings is 512 in "
            "{model}/config.json.\n       Set data.sequence_length to 512 or less.",
        ),
        pytest.param(
            {"train__optimizer": "paged_adamw", "train__device": None},
            "train.optimizer: paged_adamw needs CUDA (it pages its state between GPU and host); this run is on cpu.\n"
            "       Use adamw, or train.device: cuda.",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without CUDA"),
        ),
    ],
)
def test_what_config_json_can_tell(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str
) -> None:
    message = error_of(settings(world, tmp_path / "run", **changes), capsys)
    assert message == f"error: {expected.replace('{model}', str(world.model))}\n"


def test_a_longer_sequence_with_yarn_that_was_switched_on_by_hand(world: World, tmp_path: Path) -> None:
    config = load_config(settings(world, tmp_path / "run", data__sequence_length=1024)[1])
    source = open_folder(world.model)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    check_model(config, replace(source, config={**source.config, "rope_parameters": yarn}), torch.device("cpu"))
    yarn["factor"] = 3.0
    with pytest.raises(NibbleError, match=r"^data\.sequence_length: 1024 is more"):
        check_model(config, replace(source, config={**source.config, "rope_parameters": yarn}), torch.device("cpu"))


@pytest.mark.usefixtures("nothing_is_read")
def test_an_adapter_to_start_from_that_does_not_fit(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(world.model, storage="nf4", dtype=torch.float32)
    add_lora(model, AdapterSpec(("attention", "experts"), 8, 8))
    save_adapter(model, tmp_path / "adapter", "base")
    message = error_of(settings(world, tmp_path / "run", adapter__init_from=str(tmp_path / "adapter")), capsys)
    assert re.match(rf"error: {tmp_path / 'adapter'}: \S+ has rank 8, adapter\.rank says 4\.\n", message)


@pytest.mark.usefixtures("nothing_is_read")
def test_a_converted_folder_of_another_storage(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = tmp_path / "converted"
    convert(world.model, converted, StorageSpec("fp4"), torch.bfloat16)
    message = error_of(settings(world, tmp_path / "run", model__path=str(converted)), capsys)
    assert message == (
        f"error: model.path: {converted} is converted to fp4 with double quantisation, bfloat16; the config asks for "
        "nf4 with double quantisation, float32.\n"
        "       Set model.storage: fp4, model.double_quant: true, model.dtype: bfloat16, or model.path to what it was "
        f"converted from ({world.model}).\n"
    )


@pytest.mark.usefixtures("nothing_is_read")
def test_a_missing_shard(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    shutil.copyfile(world.model / "config.json", tmp_path / "model" / "config.json")
    message = error_of(settings(world, tmp_path / "run", model__path=str(tmp_path / "model")), capsys)
    assert message.startswith(f"error: {tmp_path / 'model'}: there are no weights (model.safetensors")


def test_rows_that_may_not_be_read(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == world.rows:  # (a superuser may read everything, so that chmod would show nothing)
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *args, **kwargs)

    arguments = settings(world, tmp_path / "run")
    monkeypatch.setattr(Path, "open", refuse)
    assert error_of(arguments, capsys) == f"error: data.train: {world.rows} can't be read: Permission denied.\n"


# --- in the middle of it


def test_a_full_disk(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = settings(world, tmp_path / "run", train__max_steps=20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3072, limits[1]))  # writing past it fails as on a full disk
    try:
        assert main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert "\nerror: the disk is full: " in said
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_a_full_disk_or_memory_in_any_part(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        if kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.run.load_trainable_model", fail)
    message = error_of(settings(world, tmp_path / "run"), capsys)
    if kind == "memory":
        assert message == (
            "error: the GPU's memory is full: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
            "       Lower train.micro_batch_size, data.sequence_length or adapter.rank, take model.storage nf4,\n"
            "       or switch train.activation_checkpointing on.\n"
        )
    else:
        assert message == (
            f"error: the disk is full: {tmp_path / 'run'} can't be written (No space left on device).\n"
            "       Make room and run again.\n"
        )
    assert "Traceback" in (tmp_path / "run" / "run.log").read_text()


def scale_rate(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """A learning rate beyond what a config may have, so that the weights overflow at once."""
    monkeypatch.setattr("train.loop.rate_of", lambda *given: factor * rate_of(*given))


def test_a_loss_that_is_not_finite_ends_the_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    changes = {"train__warmup_ratio": 0.5, "train__save_every": 1}
    scale_rate(monkeypatch, 1e17)
    message = error_of(settings(world, out, **changes), capsys)
    done = len(losses(out, "train"))
    assert 1 <= done < 6, message
    what = rf"step {done + 1}: the (loss|gradient of \S+) is not finite \(\S+\)\. No weight was changed in this step\."
    assert re.match(f"error: {what}", message)
    assert "Lower train.learning_rate" in message
    assert f"The last checkpoint is {out / 'checkpoints' / f'step-{done:06d}'}." in message
    assert len(message.splitlines()) == 3
    assert not (out / "adapter").exists()
    assert (out / "loss.png").is_file()
    log = (out / "run.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert re.search(what, log)


def test_weights_that_are_not_finite_are_not_saved(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    changes = {"train__warmup_ratio": 0.0, "train__save_every": 1}
    scale_rate(monkeypatch, 1e40)
    message = error_of(settings(world, out, **changes), capsys)
    assert re.match(r"error: after step 1 \S+ is not finite, so that no checkpoint is written\.", message)
    assert "No checkpoint was written yet" in message
    assert not (out / "checkpoints").exists()


def test_a_missing_checkpoint_is_named(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nothing" / "here"
    message = error_of(settings(world, tmp_path / "run", model__path=str(missing)), capsys)
    assert str(missing) in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without CUDA")
def test_a_missing_device_is_named(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(settings(world, tmp_path / "run", train__device="cuda"), capsys)
    assert message.startswith("error: device 'cuda' is not available")


def test_an_output_folder_that_cannot_be_made(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = settings(world, tmp_path / "run")
    (tmp_path / "file").write_text("")
    message = error_of([*arguments, "--set", f"output.dir={tmp_path / 'file' / 'run'}"], capsys)
    assert message.startswith(f"error: output.dir: {tmp_path / 'file' / 'run'} can't be written to")


def test_bad_rows_are_counted_and_listed(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    rows.write_text(world.rows.read_text() + '{"messages": null}\nnot json\n')
    assert main(settings(world, out, data__train=str(rows), train__max_steps=1)) == 0
    shown = capsys.readouterr()
    assert f"{rows}:97: " in shown.err
    assert f"2 skipped (see {out / 'skipped_rows.jsonl'})" in shown.out
    skipped = [json.loads(line) for line in (out / "skipped_rows.jsonl").read_text().splitlines()]
    assert [row["line"] for row in skipped] == [97, 98]


def test_a_terminal_that_is_not_utf8_and_rows_that_would_write_to_it(world: World, tmp_path: Path) -> None:
    rows = tmp_path / "röws…$x_$.jsonl"  # $ begins a formula in matplotlib
    out = rows.with_suffix("")
    rows.write_text(world.rows.read_text() + json.dumps({"mess\x1b[31mages\x07": []}) + "\n")
    arguments = settings(world, out, data__train=str(rows), model__storage="none", train__max_steps=1)
    done = subprocess.run(
        [sys.executable, "-m", "train", *arguments], cwd=ROOT, capture_output=True, timeout=LIMIT, check=False,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"r\xc3\xb6ws" not in done.stdout and "röws\\u2026$x_$".encode("latin-1") in done.stdout
    assert rb"mess\x1b[31mages\x07" in done.stderr
    log = (out / "run.log").read_bytes()
    assert "röws…$x_$".encode() in log
    for text in (done.stdout, done.stderr, log):
        assert not any(byte < 0x20 and byte != 0x0A for byte in text)
    assert (out / "loss.png").is_file()
