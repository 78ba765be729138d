"""One run, from a checked config to an adapter (or a model), metrics and a summary.

The files of its folder: train/state/run_folder.py. Resuming from a checkpoint: train/state/resume.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from models.adapters.files import save_adapter
from models.checkpoint.content import check_content
from models.checkpoint.export import export_hub
from models.load import ModelFolder, open_folder
from parallel.device import choose_device, choose_kernels
from parallel.mesh import Meshes, MeshSizes, make_meshes, mesh_sizes
from parallel.shards import Shards
from parallel.world import ALONE, World, collectives_within, process_group
from quant.common.errors import NibbleError
from quant.common.files import write_atomically
from train.config.load import Config, dump_config
from train.data.load import load_data
from train.graph import graph_for
from train.loop import Loop, Progress
from train.model import check_model, content_fingerprint, load_trainable_model, trained_tensors
from train.optim import build_optimizer
from train.output.metrics import MetricsLog, read_metrics
from train.output.model_card import Trained, model_card, unserved_of, write_card
from train.output.overview import data_text, model_text, plan_text, summary_text
from train.output.plots import loss_curve
from train.output.report import Report, log_path
from train.output.usage import usage_map
from train.signals import StopOnSignal
from train.state.best import BestResult, Evaluation
from train.state.extension import extension_of
from train.state.fingerprint import resume_fingerprint
from train.state.finished import EARLY, finished_run, inputs_of, require_same_inputs, result_of, write_finished
from train.state.optimizer_state import optimizer_state
from train.state.resume import (
    find_checkpoint,
    require_same_base,
    require_same_config,
    require_same_model,
    restore,
    restore_data,
)
from train.state.run_folder import RunFolder, explained_errors, last_checkpoint, move_aside, require_shared, sole_run_in
from train.state.saver import CheckpointSaver


def run(
    config: Config,
    config_path: Path | None = None,
    world: World = ALONE,
    *,
    restart: bool = False,
    extend_to: int | None = None,
) -> int:
    """Carry out the run of `config`; returns the exit code, 0. Raises NibbleError for what the user can fix.

    `config_path` is the file that it was read from, for messages. restart: move what is in output.dir aside first.
    extend_to: so many steps in all for the run that has finished there. All processes of `world` call this with the
    same arguments.
    """
    folder = RunFolder(Path(config.output.dir))
    with contextlib.ExitStack() as stack:
        stack.enter_context(sole_run_in(folder.path) if world.first else contextlib.nullcontext())
        moved = move_aside(folder, config, world) if restart and world.first else None
        if world.first:
            folder.require_usable(config)
        report = stack.enter_context(Report(log_path(folder.path, world.rank), quiet=not world.first))
        stack.enter_context(explained_errors(folder.path))
        folder.hold()
        if moved is not None:
            report.note(f"--restart: the earlier run was moved to {moved}")
        device = choose_device(config.train.device, world.local_rank if world.size > 1 else None)
        parallel, sizes, meshes = config.parallel, None, None
        wanted = mesh_sizes(world, parallel.shard, parallel.expert, parallel.replicate)
        # A single process needs no process group, unless the model is kept in host memory (by FSDP).
        if world.size > 1 or parallel.cpu_offload:
            stack.enter_context(process_group(world, device))
            require_same_config(config, device, extend_to)
            require_shared(folder.path, world)
            sizes, meshes = wanted, make_meshes(wanted, device)
        choose_kernels(device, config.train.kernels, world, report.note)
        return _run(config, folder, report, device, world, sizes, meshes, extend_to)


def _run(
    config: Config,
    folder: RunFolder,
    report: Report,
    device: torch.device,
    world: World,
    sizes: MeshSizes | None,
    meshes: Meshes | None,
    extend_to: int | None,
) -> int:
    checkpoint = find_checkpoint(config, folder, report, world)
    finished = finished_run(folder, checkpoint is not None) if config.train.resume == "auto" else None
    earlier = [record for record in (finished, checkpoint) if record is not None]
    if finished is not None:
        finished.require_same_config(resume_fingerprint(config))
    # Cheap checks first: config.json, then the rows, then the weights.
    if world.local_rank == 0:
        open_folder(config.model.path)  # a hub id is fetched here, once on each machine
    world.wait(report.note, f"fetch {config.model.path}")
    source = open_folder(config.model.path)
    for warning in check_model(config, source, device, sizes):
        report.note(f"warning: {warning}")
    # The first process of a machine reads all weights for this, unless they were hashed before.
    fingerprint = content_fingerprint(source) if world.local_rank == 0 else ""
    world.wait(report.note, "hash the checkpoint")
    base = {"name": source.name, "fingerprint": require_same_model(fingerprint, config)}
    for record in earlier:
        require_same_base(record, base, config, source)
    inputs = inputs_of(config, source.path)
    if finished is not None:
        require_same_inputs(finished, inputs)

    started = datetime.fromisoformat(earlier[0].state["started"]) if earlier else datetime.now()
    data = load_data(config, source.path, folder.skipped_rows, report.note, now=started, world=world)
    total_steps = config.train.max_steps or config.train.epochs * data.train.steps_per_epoch
    extension = extension_of(earlier, total_steps, extend_to, folder.path)
    total_steps = extension.end if extension is not None else total_steps
    for record in earlier:
        restore_data(record, data, total_steps)
    done = False
    if finished is not None and world.first:
        done, text = result_of(finished, checkpoint.step if checkpoint else None, total_steps, config.train)
        if done and source.manifest is not None:  # its fingerprint is the source's; a run that goes on loads the files
            check_content(source.path, source.manifest)
        if done:
            report.result(f"This run finished on {finished.result['finished']}; there is nothing left to do.")
        if text:
            report.note(text)
        if done:
            report.result(summary_text(finished.result, config, folder.path))
    if world.max(torch.tensor([int(done)])).item():
        return 0
    if world.first:
        folder.finished.unlink(missing_ok=True)
        write_atomically(folder.config, dump_config(config).encode())
    shards = load_trainable_model(config, source, device, meshes, progress=world.first)
    model = shards.model
    if model.balance is not None:
        model.balance.reduce = world.sum

    if world.first:
        report.result(model_text(model, source.name, source.path, device, sizes, world.machines))
        report.result(data_text(data, config, folder.skipped_rows))
        report.result(plan_text(model, data, config, total_steps, sizes, extension.start if extension else 0))
    if extension is not None:
        report.note(extension.text(config.train))

    train = config.train
    optimizer = build_optimizer(
        train.optimizer,
        shards.parameters,
        train.learning_rate,
        train.betas,
        train.eps,
        train.weight_decay,
        sizes={name: math.prod(part.shape) for name, part in shards.parts.items()} if meshes is not None else None,
    )
    progress = Progress(**restore(checkpoint, folder, shards, optimizer, total_steps, report, world))

    def draw() -> None:
        folder.require_in_place()
        if world.first:
            records = read_metrics(folder.metrics)
            loss_curve(records, folder.plot, folder.path.name)
            usage_map(records, folder.usage_plot, folder.path.name)

    tensorboard = folder.tensorboard if train.tensorboard else None
    resume_step = checkpoint.step if checkpoint else None

    def card(step: int, losses: Sequence[tuple[str, float]]) -> str:
        vision_language = model.hub.vision_language
        unserved = unserved_of(model) if config.adapter.kind == "lora" else []
        extended = extension.text(train) if extension is not None else None
        made = Trained(source.name, step, total_steps, losses, vision_language, unserved, extended)
        return model_card(config, made)

    def save_best(target: Path, evaluation: Evaluation) -> None:
        save_result(config, shards, source, target, folder, world)
        if world.first:
            text = card(evaluation.step, [("of this result", evaluation.loss)])
            write_card(target, text, report.note, before=folder.result(config, best=True))

    best = BestResult(folder.result(config, best=True), save_best, world) if train.keep_best else None
    if best is not None and checkpoint is not None:
        best.resume(checkpoint.step, checkpoint.path.parent.parent, report.note)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopOnSignal(quiet=not world.first, launched=world.size > 1))
        metrics = None
        folder.require_in_place()
        if world.first:
            metrics = stack.enter_context(MetricsLog(folder.metrics, tensorboard, resume_step))
        saver = stack.enter_context(
            CheckpointSaver(
                folder.checkpoints, train.keep_checkpoints, report.note, world=world, asynchronous=train.save_async
            )
        )

        def state() -> dict[str, Any]:
            return {
                "fingerprint": resume_fingerprint(config),
                "started": started.isoformat(),
                "progress": asdict(progress),
                "base": base,
                "batches": data.train.state(),
                "held_out": data.held_out.fingerprint() if data.held_out is not None else None,
                **({"extended": asdict(extension)} if extension is not None else {}),
            }

        def save() -> None:
            folder.require_in_place()
            saved = optimizer_state(optimizer, shards.parts)
            saver.save(progress.step, trained_tensors(shards), saved, state(), shards.parts)

        loop = Loop(
            settings=train,
            shards=shards,
            optimizer=optimizer,
            batches=data.train,
            held_out=data.held_out,
            total_steps=total_steps,
            device=device,
            metrics=metrics,
            report=report,
            stop=stop,
            save=save,
            last_checkpoint=lambda: last_checkpoint(folder),
            progress=progress,
            world=world,
            extended_from=extension.start if extension is not None else 0,
            best=best,
            usage_every=config.output.expert_usage,
            graph=graph_for(config, shards, device, report.note),
        )
        world.wait(report.note, "load the model")
        try:
            with collectives_within(config.parallel.lost_after, meshes.groups) if meshes else contextlib.nullcontext():
                complete = loop.run()
            saver.wait()
        except NibbleError:
            with contextlib.suppress(NibbleError):  # of a full disk, which is then what is being raised
                draw()  # the curve shows when the loss went wrong
            raise
        draw()
        if not complete:
            report.result(stopped_text(stop.name, progress, total_steps, config, folder, world, extend_to))
            return 0
        saved = save_result(config, shards, source, folder.result(config), folder, world)
        if world.first:
            folder.require_in_place()
            found = figures(folder, progress, device)
            if loop.stopped_early:
                found["stopped_early"] = {key: getattr(train, key) for key in EARLY}
            write_card(saved, card(progress.step, losses_of(found)), report.note)
            written = write_finished(folder, found, saved, state(), inputs, best)
            report.result(summary_text(written.result, config, folder.path))
    return 0


def save_result(
    config: Config, shards: Shards, source: ModelFolder, target: Path, folder: RunFolder, world: World
) -> Path:
    """Write the adapter in PEFT's format, or the whole model in the hub's, to `target`, which it returns."""
    folder.require_in_place()
    shards.reshard()
    model, gather, writes = shards.model, shards.whole, world.first
    if config.adapter.kind == "none":
        export_hub(model, target, source.path, overwrite=True, gather=gather, writes=writes)
    else:
        save_adapter(model, target, source.name, gather=gather, writes=writes)
    world.wait()
    return target


def figures(folder: RunFolder, progress: Progress, device: torch.device) -> dict[str, Any]:
    """The figures of the finished run, as run.json has them."""
    held_out = {record["step"]: record["loss"] for record in read_metrics(folder.metrics) if record["kind"] == "eval"}
    return {
        "steps": progress.step,
        "held_out_loss_before": held_out.get(0),
        "held_out_loss_after": held_out.get(progress.step),
        "tokens": progress.tokens,
        "labelled_tokens": progress.labelled_tokens,
        "seconds": round(progress.seconds, 3),
        "peak_memory_bytes": progress.peak_memory_bytes,
        "memory_of": "GPU tensors" if device.type == "cuda" else "resident memory of the process",
    }


def losses_of(figures: dict[str, Any]) -> list[tuple[str, float]]:
    """The held-out losses among the figures of a run, and when they were measured."""
    losses = (("before the first step", "held_out_loss_before"), ("of this result", "held_out_loss_after"))
    return [(when, figures[key]) for when, key in losses if figures[key] is not None]


def stopped_text(
    signal_name: str,
    progress: Progress,
    total_steps: int,
    config: Config,
    folder: RunFolder,
    world: World,
    extend_to: int | None,
) -> str:
    resume = "" if config.train.resume == "auto" else " --set train.resume=auto"
    by = f"by {signal_name}" if signal_name else "by a signal to another process"
    command = "python -m train" if world.size == 1 else "torchrun … -m train"
    return (
        f"\nstopped   {by} after step {progress.step} of {total_steps}; saved in {folder.checkpoints}\n"
        f"resume    {command} --config {folder.config}{resume}{f' --extend-to {extend_to}' if extend_to else ''}"
    )
