"""One run, from a checked config to an adapter (or a model), metrics and a summary.

output.dir/
  config.yaml          the config with every key filled in; runs again as it is
  run.log              what was printed, and tracebacks
  run.json             written when the run has finished: its figures
  metrics.jsonl        a line per logged step and per evaluation; tensorboard/ shows the same
  loss.png             the same as a picture
  skipped_rows.jsonl   rows that could not be used, if there are any
  checkpoints/         what a run is resumed from
  adapter/ or model/   the result: an adapter in PEFT's format, or a checkpoint in the hub's
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from models.adapter import load_adapter, save_adapter
from models.decoder import CausalLM
from models.export import export_hub
from models.load import ModelFolder, load_model, open_folder
from models.lora import AdapterSpec, add_lora, trainable_parameters
from models.tensorfile import write_atomically
from parallel.device import choose_device
from quant.errors import NibbleError
from train.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint, save_checkpoint
from train.config import Config, dump_config
from train.data import Data, load_data
from train.fingerprint import fingerprint_hash, resume_fingerprint
from train.loop import Loop, Progress
from train.metrics import MetricsLog, read_metrics
from train.optim import build_optimizer, load_optimizer_state, optimizer_state
from train.overview import data_text, model_text, plan_text, summary_text
from train.plots import loss_curve
from train.report import Report
from train.signals import StopOnSignal

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class RunFolder:
    """The names of what lies in output.dir."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.log = path / "run.log"
        self.finished = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.plot = path / "loss.png"
        self.skipped_rows = path / "skipped_rows.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.model = path / "model"


def run(config: Config, config_path: Path | None = None) -> int:
    """Do what `config` says; returns the exit code, 0. Raises NibbleError for what the user can mend.

    `config_path` is the file that it was read from, for messages.
    """
    folder = RunFolder(Path(config.output.dir))
    with _sole_run_in(folder.path), Report(folder.log) as report, _explained_memory_errors():
        device = choose_device(config.train.device)
        checkpoint = find_checkpoint(config, folder, report)
        if (result := finished_result(config, folder, checkpoint)) is not None:
            report.result(f"This run finished on {result['finished']}; there is nothing left to do.")
            report.result(summary_text(result, config, folder.path))
            return 0
        folder.finished.unlink(missing_ok=True)
        write_atomically(folder.config, dump_config(config).encode())
        started = datetime.fromisoformat(checkpoint.state["started"]) if checkpoint else datetime.now()

        torch.manual_seed(config.train.seed)
        source = open_folder(config.model.path)
        data = load_data(config, source.path, folder.skipped_rows, report, now=started)
        model = load_trainable_model(config, source, device)
        parameters = trainable_parameters(model)
        total_steps = config.train.max_steps or config.train.epochs * data.train.steps_per_epoch

        report.result(model_text(model, source.name, source.path, device))
        report.result(data_text(data, config, folder.skipped_rows))
        report.result(plan_text(model, data, config, total_steps))

        train = config.train
        optimizer = build_optimizer(
            train.optimizer, parameters, train.learning_rate, train.betas, train.eps, train.weight_decay
        )
        progress = restore(checkpoint, config, folder, model, optimizer, data, total_steps, report)

        def save() -> None:
            state = {
                "fingerprint": resume_fingerprint(config),
                "started": started.isoformat(),
                "progress": asdict(progress),
                "batches": data.train.state(),
            }
            tensors = dict(trainable_parameters(model))
            kept, saved = train.keep_checkpoints, optimizer_state(optimizer)
            save_checkpoint(folder.checkpoints, progress.step, tensors, saved, state, kept, report.note)

        def draw() -> None:
            loss_curve(read_metrics(folder.metrics), folder.plot, folder.path.name)

        tensorboard = folder.tensorboard if train.tensorboard else None
        resume_step = checkpoint.step if checkpoint else None
        with StopOnSignal() as stop, MetricsLog(folder.metrics, tensorboard, resume_step) as metrics:
            loop = Loop(
                settings=train,
                model=model,
                parameters=parameters,
                optimizer=optimizer,
                batches=data.train,
                held_out=data.held_out,
                total_steps=total_steps,
                device=device,
                metrics=metrics,
                report=report,
                stop=stop,
                save=save,
                last_checkpoint=lambda: _last_checkpoint(folder),
                progress=progress,
            )
            try:
                complete = loop.run()
            except NibbleError:
                draw()  # where a loss went wrong is a thing to see
                raise
            draw()
            if not complete:
                report.result(stopped_text(stop.name, progress, total_steps, config, folder))
                return 0
            saved = save_result(config, model, source, folder)
            result = write_result(config, folder, progress, saved, device)
            report.result(summary_text(result, config, folder.path))
        return 0


# --- what is there already


def find_checkpoint(config: Config, folder: RunFolder, report: Report) -> Checkpoint | None:
    """The checkpoint that `train.resume` says to go on from. Raises NibbleError rather than overwrite another run's."""
    wanted, here = config.train.resume, sorted(folder.checkpoints.glob("step-*"))
    if wanted == "auto":
        checkpoint = latest_checkpoint(folder.checkpoints, report.note)
    else:
        checkpoint = None if wanted == "never" else read_checkpoint(Path(wanted))
        foreign = checkpoint is None or checkpoint.path.resolve().parent != folder.checkpoints.resolve()
        if here and foreign:
            raise NibbleError(
                f"train.resume: {wanted}, but {folder.checkpoints} holds checkpoints (the newest: {here[-1].name}).\n"
                f"Name another output.dir, or delete them first (rm -r {folder.checkpoints}); "
                "train.resume: auto goes on from them."
            )
    if checkpoint is not None:
        checkpoint.require_same_config(resume_fingerprint(config))
    return checkpoint


def finished_result(config: Config, folder: RunFolder, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """The figures of the run in `folder` when it has finished under this very config and its result is still there."""
    if config.train.resume != "auto" or not folder.finished.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(folder.finished.read_text(encoding="utf-8"))
        same = result["identity"] == _identity(config) and Path(result["saved"]).is_dir()
    except (ValueError, KeyError, TypeError):
        same = False  # a damaged file; the checkpoint knows how far the run is
    older = checkpoint is not None and same and checkpoint.step < result["steps"]
    return result if same and not older else None


def _identity(config: Config) -> str:
    """Two configs with the same identity describe the same run of the same length."""
    length = {"train.epochs": config.train.epochs, "train.max_steps": config.train.max_steps}
    return fingerprint_hash({**resume_fingerprint(config), **length})


@contextlib.contextmanager
def _sole_run_in(folder: Path) -> Iterator[None]:
    """Two runs that write to one folder would damage each other's files; the system lifts the lock with the process."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise NibbleError(f"output.dir: {folder} can't be written to: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise NibbleError(
                f"output.dir: another run is writing to {folder}. Wait for it, or name another folder."
            ) from error
        yield


# --- the model


def load_trainable_model(config: Config, source: ModelFolder, device: torch.device) -> CausalLM:
    """The model with what the config trains ready to be trained, and all else frozen."""
    settings, adapter = config.model, config.adapter
    model = load_model(
        source.path,
        storage=settings.storage,
        dtype=_DTYPES[settings.dtype],
        device=device,
        double_quant=settings.double_quant,
        progress=True,
    )
    if adapter.kind == "none":
        model.requires_grad_(True)  # parameters only: the router's correction bias, a buffer, is never trained
        return model
    spec = AdapterSpec(
        targets=adapter.targets,
        rank=adapter.rank,
        alpha=adapter.alpha,
        rslora=adapter.rslora,
        layers=adapter.layers,
        dtype=_DTYPES[adapter.dtype],
    )
    if adapter.init_from is not None:
        load_adapter(model, adapter.init_from, dtype=spec.dtype, expected=spec)
    else:
        add_lora(model, spec, config.train.seed)
    return model


def restore(
    checkpoint: Checkpoint | None,
    config: Config,
    folder: RunFolder,
    model: CausalLM,
    optimizer: Optimizer,
    data: Data,
    total_steps: int,
    report: Report,
) -> Progress:
    """Put everything back to where the checkpoint was taken, so that the run goes on as if it had not stopped."""
    if checkpoint is None:
        return Progress()
    if checkpoint.step > total_steps:
        raise NibbleError(
            f"{checkpoint.path} is at step {checkpoint.step}, beyond this run's last step, {total_steps}.\n"
            "Raise train.max_steps or train.epochs, or name an earlier checkpoint in train.resume."
        )
    checkpoint.load_tensors(trainable_parameters(model))
    load_optimizer_state(optimizer, checkpoint.optimizer_state())
    data.train.restore(checkpoint.state["batches"])
    checkpoint.restore_rng()
    elsewhere = checkpoint.path.parent.parent / folder.metrics.name
    if not folder.metrics.exists() and elsewhere.exists():
        shutil.copyfile(elsewhere, folder.metrics)  # the checkpoint of another folder brings its history with it
    report.note(f"resuming from {checkpoint.path}, after step {checkpoint.step} of {total_steps}")
    return Progress(**checkpoint.state["progress"])


# --- the end


def save_result(config: Config, model: CausalLM, source: ModelFolder, folder: RunFolder) -> Path:
    """Write the adapter in PEFT's format, or the whole model in the hub's; returns its folder."""
    if config.adapter.kind == "none":
        return export_hub(model, folder.model, source.path, overwrite=True)
    save_adapter(model, folder.adapter, source.name)
    return folder.adapter


def write_result(
    config: Config, folder: RunFolder, progress: Progress, saved: Path, device: torch.device
) -> dict[str, Any]:
    """The figures of the finished run, also written to run.json."""
    held_out = {record["step"]: record["loss"] for record in read_metrics(folder.metrics) if record["kind"] == "eval"}
    result = {
        "identity": _identity(config),
        "finished": datetime.now().isoformat(sep=" ", timespec="seconds"),
        "steps": progress.step,
        "held_out_loss_before": held_out.get(0),
        "held_out_loss_after": held_out.get(progress.step),
        "tokens": progress.tokens,
        "labelled_tokens": progress.labelled_tokens,
        "seconds": round(progress.seconds, 3),
        "peak_memory_bytes": progress.peak_memory_bytes,
        "memory_of": "GPU tensors" if device.type == "cuda" else "resident memory of the process",
        "saved": str(saved),
    }
    write_atomically(folder.finished, (json.dumps(result, indent=2) + "\n").encode())
    return result


def stopped_text(signal_name: str, progress: Progress, total_steps: int, config: Config, folder: RunFolder) -> str:
    resume = "" if config.train.resume == "auto" else " --set train.resume=auto"
    return (
        f"\nstopped   by {signal_name} after step {progress.step} of {total_steps}; saved in {folder.checkpoints}\n"
        f"resume    python -m train --config {folder.config}{resume}"
    )


def _last_checkpoint(folder: RunFolder) -> str:
    found = sorted(folder.checkpoints.glob("step-*"))
    if not found:
        return "No checkpoint was written yet (train.save_every)."
    return f"The last checkpoint is {found[-1]}."


@contextlib.contextmanager
def _explained_memory_errors() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NibbleError(
            f"the GPU's memory is full: {str(error).splitlines()[0]}\n"
            "Lower train.micro_batch_size, data.sequence_length or adapter.rank, take model.storage nf4,\n"
            "or switch train.activation_checkpointing on."
        ) from error
