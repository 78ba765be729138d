"""Every key of the config reaches what it is for: runs beside the same work done with the parts themselves."""

from __future__ import annotations

import json
import shutil
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from models import load_model
from models.adapters.files import save_adapter
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec
from models.decoder import CausalLM
from models.load import open_folder
from parallel import fsdp
from parallel.mesh import Meshes, MeshSizes
from parallel.shards import Shards
from quant.common.errors import NibbleError
from tests.helpers import save_tiny_glm
from tests.text_helpers import save_checkpoint_texts, say, write_lines
from train.config.load import Config, parse_config
from train.data.load import Data, load_data
from train.loop import training_step
from train.model import load_trainable_model
from train.output.metrics import read_metrics
from train.output.report import Report
from train.run import run
from train.state.checkpoint import write_snapshot

pytestmark = pytest.mark.usefixtures("nothing_drawn")
CPU = torch.device("cpu")
# None is the default of its key, nor a number that a forgotten one could stand in for.
ADAPTER = (
    "adapter.targets=[attention, experts]",
    "adapter.rank={attention: 4, experts: 2}",
    "adapter.alpha={attention: 3, experts: 2.5}",
    "adapter.rslora=true",
    "adapter.layers=[1]",
    "adapter.dtype=bfloat16",
)
SPEC = AdapterSpec(
    ("attention", "experts"),
    {"attention": 4, "experts": 2},
    {"attention": 3, "experts": 2.5},
    rslora=True,
    layers=(1,),
    dtype=torch.bfloat16,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with tokenizer and template, and two files of rows."""
    made = tmp_path_factory.mktemp("settings")
    save_tiny_glm(made / "model", vocab_size=400, num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2)
    save_checkpoint_texts(made / "model", "glm")
    for name, count in (("rows", 40), ("other", 3)):
        write_lines(
            made / f"{name}.jsonl", *({"messages": say(f"{name} {i}", str(i) * (i % 7 + 1))} for i in range(count))
        )
    return made


def configured(folder: Path, out: Path, *overrides: str) -> Config:
    text = f"""
        model: {{path: {folder / "model"}, dtype: float32}}
        data: {{train: {folder / "rows.jsonl"}, sequence_length: 64}}
        train: {{device: cpu, optimizer: adamw, learning_rate: 0.01, max_steps: 5, micro_batch_size: 1,
                 gradient_accumulation: 2, tensorboard: false}}
        output: {{dir: {out}}}
    """
    return parse_config(text, overrides)


def data_of(config: Config, out: Path) -> Data:
    out.mkdir(exist_ok=True)
    with Report(out / "log") as report:
        return load_data(config, Path(config.model.path), out / "skipped.jsonl", report.note, datetime(2025, 1, 1))


@pytest.mark.parametrize("double_quant", [True, False])
def test_model_and_adapter(folder: Path, tmp_path: Path, double_quant: bool) -> None:
    overrides = ("model.storage=fp4", f"model.double_quant={str(double_quant).lower()}", "train.seed=3", *ADAPTER)
    ours = load_trainable_model(configured(folder, tmp_path, *overrides), open_folder(folder / "model"), CPU).model
    theirs = load_model(folder / "model", storage="fp4", dtype=torch.float32, double_quant=double_quant)
    add_lora(theirs, SPEC, seed=3)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    for name, model in (("ours", ours), ("theirs", theirs)):  # the scale is in no tensor
        save_adapter(model, tmp_path / name, "base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_init_from_is_held_against_the_other_keys(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder / "model", storage="nf4", dtype=torch.float32)
    add_lora(model, SPEC)
    save_adapter(model, tmp_path / "adapter", "base")
    source, start = open_folder(folder / "model"), f"adapter.init_from={tmp_path / 'adapter'}"
    load_trainable_model(configured(folder, tmp_path, *ADAPTER, start), source, CPU)
    with pytest.raises(NibbleError, match=r"has rank 4, adapter\.rank says 8"):
        load_trainable_model(configured(folder, tmp_path, *ADAPTER, start, "adapter.rank=8"), source, CPU)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_optimisation(folder: Path, tmp_path: Path, schedule: str) -> None:
    """A run equals a plain loop with torch's AdamW and transformers' schedule."""
    overrides = [f"train.schedule={schedule}", "train.warmup_ratio=0.4", "train.betas=[0.7, 0.8]", "train.eps=1e-3"]
    config = configured(folder, tmp_path / "run", *overrides, "train.weight_decay=0.3", "train.max_grad_norm=0.05")
    assert run(config) == 0

    shards, batches = (
        load_trainable_model(config, open_folder(folder / "model"), CPU),
        data_of(config, tmp_path / "a").train,
    )
    optimizer = torch.optim.AdamW(
        [p for _, p in trainable_parameters(shards.model)],
        lr=0.01,
        betas=(0.7, 0.8),
        eps=1e-3,
        weight_decay=0.3,
        fused=True,
    )
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=5)
    expected = []
    for step in range(1, 6):
        rate = scheduler.get_last_lr()[0]
        result = training_step(shards, optimizer, next(batches), step=step, max_grad_norm=0.05, device=CPU)
        scheduler.step()
        expected.append((result.loss, result.grad_norm, rate))
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    for record, values in zip(records, expected, strict=True):
        assert (record["loss"], record["grad_norm"], record["learning_rate"]) == pytest.approx(values, rel=1e-6)
    assert min(norm for _, norm, _ in expected) > 0.05, "nothing was clipped"


@pytest.mark.parametrize("wanted", [True, False])
def test_activation_checkpointing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    seen = []

    def step(shards: Shards, *args: object, **kwargs: object) -> object:
        seen.append(shards.model.activation_checkpointing)
        return training_step(shards, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("train.loop.training_step", step)
    assert run(configured(folder, tmp_path / "run", f"train.activation_checkpointing={str(wanted).lower()}")) == 0
    assert seen == [wanted] * 5


def test_checkpoints(folder: Path, tmp_path: Path) -> None:
    assert run(configured(folder, tmp_path, "train.save_every=1", "train.keep_checkpoints=3")) == 0
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-000003", "step-000004", "step-000005"]


def test_checkpoints_in_the_background(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def write(*args: Any) -> Path:
        threads.append(threading.current_thread().name)
        return write_snapshot(*args)

    monkeypatch.setattr("train.state.saver.write_snapshot", write)
    for name, wanted in (("plain", "false"), ("background", "true")):
        overrides = ("train.save_every=2", "train.keep_checkpoints=3", f"train.save_async={wanted}")
        assert run(configured(folder, tmp_path / name, *overrides)) == 0
    assert threads == ["MainThread"] * 3 + ["checkpoint_0"] * 3
    plain, background = (
        {
            path.relative_to(tmp_path / name): load_file(path)
            for path in (tmp_path / name).rglob("step-*/*/*.safetensors")
        }
        for name in ("plain", "background")
    )
    assert {path.parts[1] for path in plain} == {"step-000002", "step-000004", "step-000005"}
    assert plain.keys() == background.keys()
    for path, tensors in plain.items():
        assert tensors.keys() == background[path].keys()
        assert all(torch.equal(tensor, background[path][name]) for name, tensor in tensors.items()), path


# --- parallel, as far as one process has use for it


@pytest.mark.parametrize("reshard", [True, False])
def test_offloaded_to_host_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reshard: bool) -> None:
    seen, cut = [], fsdp.shard

    def shard(model: CausalLM, meshes: Meshes, *, reshard_after_forward: bool, cpu_offload: bool) -> Shards:
        seen.append((meshes.sizes, reshard_after_forward, cpu_offload))
        return cut(model, meshes, reshard_after_forward=reshard_after_forward, cpu_offload=cpu_offload)

    monkeypatch.setattr("parallel.fsdp.shard", shard)
    wanted = f"parallel.reshard_after_forward={str(reshard).lower()}"
    assert run(configured(folder, tmp_path / "whole", wanted)) == 0
    assert seen == [], "one process alone cuts nothing"
    assert run(configured(folder, tmp_path / "host", wanted, "parallel.cpu_offload=true")) == 0
    assert seen == [(MeshSizes(1, 1, 1), reshard, True)]
    whole, host = ([r["loss"] for r in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("whole", "host"))
    assert len(whole) > 5
    assert host == pytest.approx(whole, rel=1e-6)


def test_more_processes_than_were_started(folder: Path, tmp_path: Path) -> None:
    expected = r"parallel\.shard 2 × parallel\.expert 1 × parallel\.replicate 1 is 2, but 1 process was started"
    with pytest.raises(NibbleError, match=expected):
        run(configured(folder, tmp_path, "parallel.shard=2"))


def test_rows(folder: Path, tmp_path: Path) -> None:
    def rows(*overrides: str) -> tuple[int, int, list[int]]:
        data = data_of(configured(folder, tmp_path, *overrides), tmp_path)
        return len(data.packing), data.held_out_rows, sorted(set(data.examples.rows.tolist()))

    packed, held_out, trained = rows()
    assert (held_out, len(trained)) == (4, 36)
    assert packed < 36
    assert rows("data.packing=false") == (36, 4, trained)
    assert rows("train.seed=1")[2] != trained
    assert rows("data.eval_fraction=0.5")[1] == 20
    assert rows("data.eval_fraction=null")[1:] == (0, list(range(40)))
    assert rows(f"data.eval={folder / 'other.jsonl'}")[1:] == (3, list(range(40)))

    bad = tmp_path / "bad.jsonl"
    bad.write_text((folder / "rows.jsonl").read_text() + json.dumps({"messages": None}) + "\n")
    assert rows(f"data.train={bad}")[1] == 4
    with pytest.raises(NibbleError, match=r"bad\.jsonl:41: messages is null, .* \(data\.on_bad_row: error\)"):
        rows(f"data.train={bad}", "data.on_bad_row=error")


def test_a_resumed_run_keeps_the_date_that_its_template_wrote(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Later:
            return cls(2100, 1, 1)

    shutil.copytree(folder / "model", tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%d') }}" + template.read_text())
    model = f"model.path={tmp_path / 'model'}"
    constant = (model, "train.schedule=constant", "train.warmup_ratio=0")
    assert run(configured(folder, tmp_path / "run", *constant, "train.max_steps=1")) == 0
    monkeypatch.setattr("train.run.datetime", Later)
    # With another date the rows would be others, which a checkpoint refuses.
    assert run(configured(folder, tmp_path / "run", *constant, "train.max_steps=2")) == 0
