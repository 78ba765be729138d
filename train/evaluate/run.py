"""The command's work: the rows, the model, its scores with the adapter and without, what is printed and written."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from models.adapters.files import load_adapter, read_adapter_weights
from models.adapters.lora import without_adapter
from models.checkpoint.native import describe
from models.checkpoint.side_files import CONFIG
from models.decoder import CausalLM
from models.load import ModelFolder, load_model, open_folder, prepare_model
from parallel.device import choose_device, choose_kernels
from parallel.load import fill_parts
from parallel.mesh import make_meshes, mesh_sizes
from parallel.shards import Shards
from parallel.world import World, collectives_within, process_group
from quant.choices import named_dtype
from quant.common.files import write_atomically
from quant.common.progress import Bar
from quant.common.terminal import say
from quant.common.words import table
from quant.storage import StorageSpec
from train.config.model_length import check_length, longest_context
from train.data.load import Texts
from train.data.template_files import load_chat_template
from train.data.tokenizer import load_tokenizer
from train.evaluate.choices import Questions
from train.evaluate.request import Request
from train.evaluate.rows import HeldOutRows
from train.evaluate.scores import Documents, Scores, score

Figures = dict[str, Any]


class Task(Protocol):
    """What is measured. documents: those to be scored. about: what became of the rows, for the JSON file. unused: the
    same in words, "" where every row is used whole.
    """

    @property
    def documents(self) -> Documents: ...
    @property
    def about(self) -> Figures: ...
    @property
    def unused(self) -> str: ...

    def figures(self, scores: Scores) -> Figures: ...
    def by_row(self, scores: Scores, base: Scores | None) -> list[Figures]: ...
    def shown(self, figures: Figures) -> dict[str, str]: ...


def evaluate(request: Request, batch_tokens: int, json_path: str | None, by_row: str | None, world: World) -> int:
    """Carry out `request` on all processes of `world`; returns the exit code, 0. Raises NibbleError."""
    device = choose_device(request.device, world.local_rank if world.size > 1 else None)
    with contextlib.ExitStack() as stack:
        if world.size > 1 or request.config.parallel.cpu_offload:
            stack.enter_context(process_group(world, device))
        note: Callable[[str], None] = (lambda text: say(text, sys.stderr)) if world.first else (lambda text: None)
        if world.local_rank == 0:
            open_folder(request.model.path)  # a hub id is fetched here, once on each machine
        choose_kernels(device, request.config.train.kernels, world, note)
        world.wait(note, f"fetch {request.model.path}")
        source = open_folder(request.model.path)
        request = _completed(request, source)
        task = _task(request, source, note, world)
        shards = _load(request, source, device, world)
        found = _scores(request, shards.model, task.documents, device, batch_tokens, world)
    if not world.first:
        return 0
    with_adapter, base = (found[0], found[1]) if len(found) > 1 else (found[0], None)
    figures = task.figures(with_adapter)
    base_figures = None if base is None else task.figures(base)
    say(_text(request, source, task, figures, base_figures), sys.stdout)
    if by_row is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in task.by_row(with_adapter, base))
        write_atomically(Path(by_row), lines.encode("utf-8", "backslashreplace"))
    if json_path is not None:
        values = {**_about(request), **figures, "base": base_figures, **task.about}
        write_atomically(Path(json_path), (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
    return 0


def _completed(request: Request, source: ModelFolder) -> Request:
    """With what only the checkpoint tells: how a converted one is stored, and how long its rows may be."""
    model, given = request.model, request.model.model_fields_set
    kind, double, dtype = source.stored(
        model.storage if "storage" in given else None, request.double_quant, model.dtype if "dtype" in given else None
    )
    settings = request.config.data
    where = str(source.path / CONFIG)
    limit = longest_context(source.config, where)
    if request.length_given:
        check_length(settings.sequence_length, source.config, where)
    elif limit is not None and limit < settings.sequence_length:
        settings = settings.model_copy(update={"sequence_length": limit})
    config = request.config.model_copy(update={"data": settings})
    stored = model.model_copy(update={"storage": kind, "double_quant": double, "dtype": dtype})
    return replace(request, model=stored, config=config)


def _task(request: Request, source: ModelFolder, note: Callable[[str], None], world: World) -> Task:
    """Every process reads the rows."""
    settings = request.config.data
    # A template may write the date, which is to be the same on all processes.
    now = datetime.fromtimestamp(world.max(torch.tensor(datetime.now().timestamp(), dtype=torch.float64)).item())
    tokenizer = load_tokenizer(source.path)
    template = load_chat_template(source.path, tokenizer.special_tokens, now=now, variables=settings.template_variables)
    texts = Texts(settings, tokenizer, template, request.config.train.seed)
    if request.task == "choices":
        return Questions.read(texts, request, note)
    return HeldOutRows.read(texts, request, note)


def _load(request: Request, source: ModelFolder, device: torch.device, world: World) -> Shards:
    """The model with its adapter: whole, or cut over all processes."""
    wanted, adapter, offload = request.model, request.adapter, request.config.parallel.cpu_offload
    stored = (source.path, wanted.storage, wanted.dtype, device)
    if world.size == 1 and not offload:
        return Shards(
            load_model(*stored, adapter, double_quant=wanted.double_quant, layout=request.layout, progress=True)
        )
    from parallel.fsdp import materialise, shard

    model, reader = prepare_model(*stored, double_quant=wanted.double_quant, verify=world.local_rank == 0)
    model.requires_grad_(False)
    if adapter is not None:
        load_adapter(model, adapter, layout=request.layout)
    shards = shard(model, make_meshes(mesh_sizes(world), device), cpu_offload=offload)
    materialise(shards, device, cpu_offload=offload)
    with Bar("loading", show=world.first) as bar:
        fill_parts(shards, reader, bar.update)
    if adapter is not None:
        read_adapter_weights(model, adapter, shards.put, layout=request.layout)
    return shards


def _scores(
    request: Request, model: CausalLM, documents: Documents, device: torch.device, batch_tokens: int, world: World
) -> list[Scores]:
    """Of the model, and where it has an adapter of its base."""
    found = []
    parallel = request.config.parallel
    limit = collectives_within(parallel.lost_after) if world.size > 1 else contextlib.nullcontext()
    with limit:
        for name, context in _variants(request, model):
            with context, Bar(name, show=world.first) as bar:
                found.append(
                    score(model, documents, device, batch_tokens=batch_tokens, world=world, progress=bar.update)
                )
    return found


def _variants(request: Request, model: CausalLM) -> Iterator[tuple[str, contextlib.AbstractContextManager[None]]]:
    if request.adapter is None:
        yield "the model", contextlib.nullcontext()
        return
    yield "with the adapter", contextlib.nullcontext()
    yield "the base", without_adapter(model)


def _about(request: Request) -> Figures:
    model = request.model
    return {
        "model": model.path,
        "adapter": None if request.adapter is None else str(request.adapter),
        "storage": model.storage,
        "dtype": model.dtype,
    }


def _text(request: Request, source: ModelFolder, task: Task, figures: Figures, base: Figures | None) -> str:
    model = request.model
    stored = describe(StorageSpec(model.storage, model.double_quant), named_dtype(model.dtype))
    columns = [("the base", base), ("with the adapter", figures)] if base is not None else [("the model", figures)]
    rows = [["", *(name for name, _ in columns)]]
    shown = [task.shown(values) for _, values in columns if values is not None]
    rows += [[name, *(one[name] for one in shown)] for name in shown[0]]
    adapter = "" if request.adapter is None else f"\nadapter  {request.adapter}"
    unused = f"\n\n{task.unused}" if task.unused else ""
    return f"model    {source.path} ({stored}){adapter}\n\n{table(rows, right=range(1, len(rows[0])))}{unused}"
