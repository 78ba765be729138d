"""Whole runs at a tiny size: from a checkpoint and rows to an adapter, or a model."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from models import load_model
from tests.helpers import assert_close
from tests.processes import LIMIT
from tests.run_helpers import ROOT, World, curve, losses, make_world, settings
from train.__main__ import main
from train.config.load import load_config
from train.data.load import load_data
from train.output.metrics import read_metrics
from train.output.report import Report
from train.run import run


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


# --- the main job


def test_a_run_draws_from_no_global_generator(world: World, tmp_path: Path) -> None:
    """So that their states need no place in a checkpoint: what is random has generators of its own, with seeds."""

    def states() -> list[Any]:
        _, numbers, *rest = np.random.get_state()
        return [random.getstate(), np.asarray(numbers).tolist(), rest, torch.get_rng_state().tolist()]

    changes = {"train__save_every": 1, "train__schedule": "constant", "train__warmup_ratio": 0.0}
    # The first run imports: rich draws the first of its ids then.
    assert main(settings(world, tmp_path / "first", **changes, train__max_steps=1)) == 0
    before = states()
    for steps in (2, 3):
        assert main(settings(world, tmp_path / "run", **changes, train__max_steps=steps)) == 0
    assert states() == before


def test_qlora_from_checkpoint_to_adapter(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    arguments = settings(
        world,
        out,
        train__max_steps=30,
        train__eval_every=10,
        train__save_every=8,
        train__log_every=2,
        train__tensorboard=True,
    )
    assert main(arguments) == 0
    shown = capsys.readouterr()

    held_out = [(r["step"], r["loss"]) for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "eval"]
    assert [step for step, _ in held_out] == [0, 10, 20, 30]
    assert held_out[-1][1] < 0.75 * held_out[0][1]

    # What is on the screen.
    assert re.search(r"^model \(glm4_moe_lite\) from \S+/model · nf4 with double quantisation, float32 · ", shown.out)
    assert re.search(r"^  routed experts +49,152 +nf4 +\S+ KiB +5,120 +LoRA r4$", shown.out, re.M)
    parameters = sum(p.numel() for p in reference(world).parameters())
    assert re.search(rf"^  total +{parameters:,} ", shown.out, re.M)
    assert re.search(
        r"^  data +86 rows → \d+ packed sequences of at most 128 tokens .*; 10 rows held out", shown.out, re.M
    )
    assert re.search(r"^  plan +30 steps × about \d+ tokens", shown.out, re.M)
    assert f"loss      {held_out[0][1]:.4f} before → {held_out[-1][1]:.4f} after" in shown.out
    assert re.search(r"^step 30/30  loss \S+  grad \S+  lr \S+  \S+ tok/s  \S+ [GM]iB$", shown.err, re.M)
    assert re.search(r"^step  2/30  .* left$", shown.err, re.M)

    # What is in the folder.
    records = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(2, 31, 2))
    for record in records:
        assert set(record) == {
            *("kind", "step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "labelled_tokens"),
            *("tokens_per_second", "seconds", "peak_memory_bytes"),
        }
        assert 0 < record["labelled_tokens"] < record["tokens"]
    assert all(a["tokens"] < b["tokens"] for a, b in pairwise(records))
    # Three of the 30 steps warm up from 0; the fourth has the full rate.
    assert [r["learning_rate"] for r in records[:2]] == pytest.approx([1e-2 / 3, 1e-2])
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["max_steps"] == 30
    assert load_config(out / "config.yaml") == load_config(arguments[1])
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-000024", "step-000030"]
    log = (out / "run.log").read_text()
    assert all(line in log for line in (*shown.out.splitlines(), *shown.err.splitlines()))
    assert not (out / "skipped_rows.jsonl").exists()
    assert scalars(out / "tensorboard", "eval/loss") == pytest.approx(dict(held_out))
    assert scalars(out / "tensorboard", "train/loss") == pytest.approx({r["step"]: r["loss"] for r in records})

    # The adapter: PEFT's files, which give the loss that the run measured.
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == 4
    assert config["base_model_name_or_path"] == str(world.model)
    model = load_model(world.model, storage="nf4", dtype=torch.float32, adapter=out / "adapter")
    assert_close(torch.tensor(held_out_mean(model, arguments)), torch.tensor(held_out[-1][1]), what="loss with adapter")

    # The same command again finds everything done.
    before = {path: path.stat().st_mtime_ns for path in (out / "adapter").iterdir()}
    monkeypatch.setattr(
        "train.run.load_trainable_model", lambda *a, **k: pytest.fail("a finished run loaded the model")
    )
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert again.startswith("This run finished on ")
    assert f"{held_out[0][1]:.4f} before → {held_out[-1][1]:.4f} after" in again
    assert {path: path.stat().st_mtime_ns for path in (out / "adapter").iterdir()} == before


def reference(world: World) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32).eval()


def scalars(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def held_out_mean(model: Any, arguments: list[str]) -> float:
    """The loss on the held-out rows of a run, from the logits of each document alone."""
    config = load_config(arguments[1])
    folder = Path(config.output.dir)
    with Report(folder / "other.log") as report:
        data = load_data(
            config, Path(config.model.path), folder / "skipped.jsonl", report.note, now=datetime(2025, 1, 1)
        )
    assert data.held_out is not None
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data.held_out:
            ends = batch.documents.offsets.tolist()
            for start, end in pairwise(ends):
                output = model(batch.tokens[None, start:end])
                logits = getattr(output, "logits", output)[0].float()
                labels = batch.labels[start:end]
                total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
                count += int((labels != -100).sum())
    return total / count


def test_full_fine_tuning_exports_a_model_that_transformers_reads(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "full"
    arguments = settings(world, out, model__storage="none", adapter__kind="none", train__learning_rate=2e-3)
    assert main(arguments) == 0
    before, after = losses(out, "eval")
    assert after < before
    start = reference(world)
    tuned, info = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(torch.tensor(held_out_mean(start, arguments)), torch.tensor(before), what="loss before")
    assert_close(torch.tensor(held_out_mean(tuned.eval(), arguments)), torch.tensor(after), what="loss after")
    changed = {name for name, p in tuned.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    assert changed == {name for name, _ in tuned.named_parameters()}  # routers, norms and embedding too
    for name, buffer in tuned.named_buffers():
        assert torch.equal(buffer, start.get_buffer(name)), name  # the router's correction bias is not trained
    assert f"model     {out / 'model'}" in capsys.readouterr().out
    assert (out / "model" / "tokenizer.json").is_file()
    assert "fully fine-tuned\n" in (out / "model" / "README.md").read_text()


# --- the same result in other ways


def test_a_record_is_the_mean_over_the_steps_since_the_one_before(world: World, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model__storage": "none",
        "adapter__kind": "none",
        "train__max_steps": 7,
        "train__save_every": 4,
        "train__balance": "bias_update",
    }
    every, third = tmp_path / "every", tmp_path / "third"
    assert main(settings(world, every, **changes)) == 0
    steps = [record for record in read_metrics(every / "metrics.jsonl") if record["kind"] == "train"]
    ends = [record["labelled_tokens"] for record in steps]
    labelled = [end - start for start, end in pairwise((0, *ends))]
    assert len(set(labelled)) > 3, "or a plain mean would do"

    def check(covered: dict[int, range]) -> None:
        records = [record for record in read_metrics(third / "metrics.jsonl") if record["kind"] == "train"]
        assert [record["step"] for record in records] == list(covered)
        for record, places in zip(records, covered.values(), strict=True):
            total = sum(labelled[i] for i in places)
            loss = sum(steps[i]["loss"] * labelled[i] for i in places) / total
            means = [sum(steps[i][name] for i in places) / len(places) for name in ("grad_norm", "load_imbalance")]
            assert record["loss"] == pytest.approx(loss, rel=1e-6)
            assert [record["grad_norm"], record["load_imbalance"]] == pytest.approx(means, rel=1e-6)
            assert [record[name] for name in ("tokens", "learning_rate")] == [
                steps[places[-1]][name] for name in ("tokens", "learning_rate")
            ]

    arguments = settings(world, third, **changes, train__log_every=3)
    assert main(arguments) == 0
    check({3: range(3), 6: range(3, 6), 7: range(6, 7)})
    # Killed after step 4 and resumed: the fourth step was the other session's.
    (third / "run.json").unlink()
    shutil.rmtree(third / "checkpoints" / "step-000007")
    assert main(arguments) == 0
    check({3: range(3), 6: range(4, 6), 7: range(6, 7)})


def test_a_run_imports_slow_libraries_only_where_it_needs_them(world: World, tmp_path: Path) -> None:
    """Two runs in one process, the second of which needs what the first doesn't."""
    slow = ["bitsandbytes", "matplotlib", "peft", "pyarrow", "tensorboard", "torch._inductor.scheduler", "transformers"]
    code = (
        "import runpy, sys\n"
        "import train.loop\n"
        "step = train.loop.training_step\n"
        f"def show(when): print(when, [name for name in {slow} if name in sys.modules])\n"
        "def shown(*args, **options):\n"
        "    show('BEFORE')\n"
        "    return step(*args, **options)\n"
        "train.loop.training_step = shown\n"
        "for config in sys.argv[1:]:\n"
        "    sys.argv[1:] = ['--config', config]\n"
        "    try:\n"
        "        runpy.run_module('train', run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as end:\n"
        "        show(f'AFTER {end.code}')\n"
    )
    runs = [tmp_path / storage for storage in ("none", "nf4")]
    configs = [settings(world, run, model__storage=run.name, train__max_steps=1)[1] for run in runs]
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}  # a run sets it
    command = [sys.executable, "-c", code, *configs]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("BEFORE", "AFTER"))]
    first, second = ["matplotlib"], ["bitsandbytes", "matplotlib"]
    assert lines == ["BEFORE []", f"AFTER 0 {first}", f"BEFORE {second}", f"AFTER 0 {second}"], done.stderr
    assert all((run / "adapter" / "adapter_config.json").is_file() for run in runs)


def test_accumulation_equals_larger_micro_batches(world: World, tmp_path: Path) -> None:
    for name, size, accumulation in (("small", 1, 4), ("large", 4, 1)):
        changes = {"train__micro_batch_size": size, "train__gradient_accumulation": accumulation}
        assert main(settings(world, tmp_path / name, train__max_steps=4, **changes)) == 0
    for field in ("loss", "grad_norm"):
        small, large = (
            torch.tensor([r[field] for r in read_metrics(tmp_path / name / "metrics.jsonl") if r["kind"] == "train"])
            for name in ("small", "large")
        )
        assert_close(small, large, what=field)


def test_activation_checkpointing_changes_nothing(world: World, tmp_path: Path) -> None:
    for name, recompute in (("kept", False), ("recomputed", True)):
        assert main(settings(world, tmp_path / name, train__activation_checkpointing=recompute)) == 0
    assert curve(tmp_path / "kept") == curve(tmp_path / "recomputed")


def test_without_held_out_rows_there_is_nothing_to_evaluate(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(settings(world, out, data__eval_fraction=None, train__max_steps=2)) == 0
    assert losses(out, "eval") == []
    shown = capsys.readouterr().out
    assert re.search(r"^  data +96 rows → .*; no rows held out$", shown, re.M)
    assert "before →" not in shown
    assert "warning" not in shown


def test_a_run_that_will_learn_nothing_says_so(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(world.rows.read_text().splitlines(keepends=True)[:3]))
    changes = {"data__train": str(rows), "data__eval": str(rows), "model__storage": "none"}
    changes |= {"data__sequence_length": 512, "train__max_steps": None}
    assert main(settings(world, tmp_path / "run", **changes)) == 0
    shown = capsys.readouterr().out
    assert " from " in shown.splitlines()[0]
    assert " · float32 · " in shown.splitlines()[0]
    assert re.search(
        r"^  data +3 rows → 1 packed sequence of at most 512 tokens \(\S+% filled\); 3 rows held out$", shown, re.M
    )
    assert re.search(r"^  plan +1 step × about [\d,]+ tokens \(1 epoch\)$", shown, re.M)
    assert (
        "  warning   nothing will be learnt: the first step of a warm-up has learning rate 0, and this run has no "
        "other.\n            Set train.warmup_ratio: 0 (it is 0.1), or train for more steps.\n" in shown
    )
    before, after = losses(tmp_path / "run", "eval")
    assert before == after


def test_what_became_of_long_rows_is_shown(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "1 and 2 and 3 " * 40}) + '\n{"text": "4"}\n')
    changes = {"data__train": str(rows), "data__format": "text", "data__eval_fraction": None, "train__max_steps": 2}
    assert main(settings(world, tmp_path / "run", data__sequence_length=16, **changes)) == 0
    shown = capsys.readouterr()
    assert "; 1 row split into documents of at most 16 tokens" in shown.out
    assert re.search(
        r"rows\.jsonl:1: \d+ tokens, split into \d+ documents of at most data\.sequence_length 16", shown.err
    )


def test_epochs_count_steps(world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = settings(world, out, train__max_steps=None, train__epochs=2, data__packing=False)
    assert main([*arguments, "--set", "train.micro_batch_size=32"]) == 0
    records = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["epoch"] for r in records] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=1e-6)


def test_adapter_init_from_goes_on_where_the_first_ended(world: World, tmp_path: Path) -> None:
    assert main(settings(world, tmp_path / "first")) == 0
    assert main(settings(world, tmp_path / "second", adapter__init_from=str(tmp_path / "first" / "adapter"))) == 0
    assert losses(tmp_path / "second", "eval")[0] == losses(tmp_path / "first", "eval")[-1]


# --- the configs that come with the project


# This world's model is GLM-4.7-Flash's; the configs of the others are run by tests/train/config/test_configs.py and
# tests/train/demo/test_demo.py.
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("glm47_*.yaml")), ids=lambda path: path.stem)
def test_configs_run_at_a_tiny_size(
    path: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    values = yaml.safe_load(path.read_text())
    changes = {
        "model.path": world.model,
        "data.train": world.rows if values["data"].get("format", "messages") == "messages" else world.prompts,
        "data.sequence_length": 128,
        "train.max_steps": 2,
        "train.log_every": 1,
        "train.micro_batch_size": 1,
        "train.gradient_accumulation": 1,
        "train.device": "cpu",
        "train.tensorboard": "false",
        "output.dir": out,
    }
    if values["data"].get("eval") is not None:
        changes["data.eval"] = changes["data.train"]
    overrides = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    assert main(["--config", str(path), *overrides]) == 0
    assert len(losses(out, "train")) == 2
    model = {"storage": "nf4", "dtype": "bfloat16", **values["model"]}
    stored = model["dtype"] if model["storage"] == "none" else model["storage"]
    table = capsys.readouterr().out
    for group in ("routed experts", "attention"):
        assert re.search(rf"^  {group} +[\d,]+ +{stored} ", table, re.M), group
    assert (out / ("model" if values["adapter"]["kind"] == "none" else "adapter")).is_dir()


def test_run_can_be_called_from_python(world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {
        "data__train": str(world.prompts),
        "data__format": "prompt_completion",
        "data__fields": {"prompt": "question", "completion": "reply"},
        "train__max_steps": 1,
    }
    assert run(load_config(settings(world, out, **changes)[1])) == 0
    assert (out / "adapter" / "adapter_config.json").is_file()
