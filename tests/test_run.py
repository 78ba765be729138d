"""Whole runs at a tiny size: from a checkpoint and rows to an adapter, resumed, stopped, refused."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models import load_model
from tests.helpers import assert_close, save_tiny_glm
from train.__main__ import main
from train.config import load_config
from train.data import load_data
from train.metrics import read_metrics
from train.report import Report
from train.run import run

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = """[gMASK]<sop>
{%- for message in messages %}{{ '<|' + message.role + '|>' + message.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]


@dataclass(frozen=True)
class World:
    """A checkpoint that transformers saved, with tokenizer and template, and rows for it."""

    model: Path
    rows: Path
    prompts: Path


def questions(count: int, seed: int) -> list[tuple[str, str]]:
    """Sums in words of very different lengths, so that the labelled tokens of micro-batches are uneven."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        numbers = [draw.randint(1, 9) for _ in range(draw.randint(2, 12))]
        made.append(
            ("add " + " and ".join(map(str, numbers)), " ".join(str(n) for n in numbers) + f" = {sum(numbers)}")
        )
    return made


def messages(pairs: list[tuple[str, str]]) -> str:
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    return "".join(json.dumps({"messages": row}) + "\n" for row in rows)


def write_tokenizer(folder: Path, texts: list[str]) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The matrices are tiny: more threads only wait for each other, long where other work shares the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    pairs = questions(96, seed=0)
    (folder / "model").mkdir()
    size = write_tokenizer(folder / "model", [q + a for q, a in pairs])
    save_tiny_glm(folder / "model", vocab_size=size, num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2)
    (folder / "rows.jsonl").write_text(messages(pairs))
    prompts = "".join(json.dumps({"question": q, "reply": a}) + "\n" for q, a in pairs)
    (folder / "prompts.jsonl").write_text(prompts)
    return World(folder / "model", folder / "rows.jsonl", folder / "prompts.jsonl")


def settings(world: World, out: Path, **changes: Any) -> list[str]:
    """`--config FILE --set …` of a small float32 run; changes are `section__key=value`."""
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(world.model), "storage": "nf4", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(world.rows), "sequence_length": 128},
        "train": {
            "micro_batch_size": 2,
            "gradient_accumulation": 1,
            "max_steps": 6,
            "optimizer": "adamw",
            "learning_rate": 1e-2,
            "device": "cpu",
            "tensorboard": False,
        },
        "output": {"dir": str(out)},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    path = out.with_name(out.name + ".yaml")
    path.write_text(yaml.safe_dump(values))
    return ["--config", str(path)]


def curve(out: Path) -> list[tuple[str, int, float, float | None]]:
    """What must not depend on how often a run was interrupted."""
    return [(r["kind"], r["step"], r["loss"], r.get("grad_norm")) for r in read_metrics(out / "metrics.jsonl")]


def losses(out: Path, kind: str) -> list[float]:
    return [r["loss"] for r in read_metrics(out / "metrics.jsonl") if r["kind"] == kind]


def in_a_process(arguments: list[str], meddle: str) -> subprocess.CompletedProcess[str]:
    """`python -m train` in a process of its own, with `meddle` run before: it may wrap functions to cause trouble."""
    code = f"import os, signal, sys\nimport train.loop, train.checkpoint\n{meddle}\n"
    code += f"from train.__main__ import main\nsys.exit(main({arguments!r}))\n"
    # As many threads as here: sums are split among them, so their number shows in the last bits.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


# --- the main job


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
        r"^  data +96 rows → \d+ packed sequences of at most 128 tokens .*; 10 rows held out", shown.out, re.M
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
    monkeypatch.setattr("train.run.load_model", lambda *a, **k: pytest.fail("a finished run loaded the model"))
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
        data = load_data(config, Path(config.model.path), folder / "skipped.jsonl", report, now=datetime(2025, 1, 1))
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


# --- the same result in other ways


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
    assert main(settings(world, out, data__eval_fraction=None, train__max_steps=1)) == 0
    assert losses(out, "eval") == []
    shown = capsys.readouterr().out
    assert "no rows held out" in shown
    assert "before →" not in shown


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


# --- stopping and resuming


RESUMED = {"train__max_steps": 10, "train__save_every": 4, "train__eval_every": 5, "train__gradient_accumulation": 2}


@pytest.fixture(scope="module")
def uninterrupted(world: World, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    changes = {**RESUMED, "train__optimizer": request.param}
    assert main(settings(world, out, **changes)) == 0
    return changes, curve(out), (out / "adapter" / "adapter_model.safetensors").read_bytes()


WRAP_STEP = """
original = train.loop.clip_gradients
def meddled(parameters, max_norm, step):
    if step == {step}:
        {action}
    return original(parameters, max_norm, step)
train.loop.clip_gradients = meddled
"""


@pytest.mark.parametrize("uninterrupted", ["adamw_8bit"], indirect=True)
def test_sigterm_saves_and_the_resumed_run_is_the_same_bit_for_bit(
    world: World, tmp_path: Path, uninterrupted: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, expected, adapter = uninterrupted
    out = tmp_path / "run"
    arguments = settings(world, out, **changes)
    stopped = in_a_process(arguments, WRAP_STEP.format(step=7, action="os.kill(os.getpid(), signal.SIGTERM)"))
    assert stopped.returncode == 0, stopped.stderr
    assert "SIGTERM: finishing this step, then saving." in stopped.stderr
    assert f"stopped   by SIGTERM after step 7 of 10; saved in {out / 'checkpoints'}" in stopped.stdout
    assert f"resume    python -m train --config {out / 'config.yaml'}\n" in stopped.stdout
    assert curve(out) == [entry for entry in expected if entry[1] <= 7]
    assert (out / "loss.png").is_file()
    assert not (out / "adapter").exists()

    assert main(["--config", str(out / "config.yaml")]) == 0
    assert "step-000007, after step 7 of 10" in capsys.readouterr().err
    assert curve(out) == expected
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize("uninterrupted", ["adamw"], indirect=True)
def test_kill_in_the_middle_of_a_save(world: World, tmp_path: Path, uninterrupted: Any) -> None:
    changes, expected, adapter = uninterrupted
    out = tmp_path / "run"
    arguments = settings(world, out, **changes)
    # The second checkpoint, of step 8: the weights are written, the state is not.
    kill = """
original = train.checkpoint.write_atomically
def meddled(path, data):
    if "step-000008" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path, data)
train.checkpoint.write_atomically = meddled
"""
    assert in_a_process(arguments, kill).returncode == -signal.SIGKILL
    assert any(path.name != "step-000004" for path in (out / "checkpoints").iterdir())  # something half-written
    assert max(entry[1] for entry in curve(out)) == 8
    assert main(arguments) == 0
    assert curve(out) == expected
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_a_second_interrupt_stops_at_once(world: World, tmp_path: Path) -> None:
    out = tmp_path / "run"
    interrupts = "signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)"
    stopped = in_a_process(settings(world, out), WRAP_STEP.format(step=2, action=interrupts))
    assert stopped.returncode == 130, stopped.stderr
    assert "Ctrl-C again stops at once" in stopped.stderr
    assert stopped.stderr.endswith("interrupted\n")
    assert "Traceback" not in stopped.stderr
    assert not (out / "checkpoints").exists()


def test_a_signal_during_the_first_evaluation_loses_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert main(settings(world, whole, train__max_steps=2)) == 0
    import train.evaluate

    original = train.evaluate.batch_loss

    def stopping(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr("train.evaluate.batch_loss", stopping)
    arguments = settings(world, out, train__max_steps=2, train__micro_batch_size=1, train__gradient_accumulation=2)
    assert main(arguments) == 0
    assert read_metrics(out / "metrics.jsonl") == []
    monkeypatch.undo()
    assert main(arguments) == 0
    assert [entry[:2] for entry in curve(out)] == [entry[:2] for entry in curve(whole)]


def test_a_kill_between_the_last_checkpoint_and_the_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    arguments = settings(world, out, train__max_steps=3)
    monkeypatch.setattr("train.loop.Loop._evaluate", lambda self: None if self.progress.step == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(arguments)
    assert "ZeroDivisionError" in (out / "run.log").read_text()
    monkeypatch.undo()
    assert main(arguments) == 0
    assert [entry[:2] for entry in curve(out)] == [("train", 1), ("train", 2), ("train", 3), ("eval", 3)]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_resume_from_a_named_checkpoint_of_another_folder(world: World, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(settings(world, first, train__save_every=4)) == 0
    resume = str(first / "checkpoints" / "step-000004")
    assert main(settings(world, second, train__save_every=4, train__resume=resume)) == 0
    assert curve(second) == curve(first)


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown[shown.index("error: ") :]


def test_resume_never_does_not_overwrite(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(settings(world, out, train__max_steps=2, train__resume="never")) == 0
    arguments = settings(world, out, train__max_steps=2, train__resume="never")
    message = error_of(arguments, capsys)
    assert f"train.resume: never, but {out / 'checkpoints'} holds checkpoints (the newest: step-000002)" in message
    assert f"rm -r {out / 'checkpoints'}" in message
    shutil.rmtree(out / "checkpoints")
    assert main(arguments) == 0
    assert [entry[:2] for entry in curve(out)] == [("eval", 0), ("train", 1), ("train", 2), ("eval", 2)]


def test_another_config_in_the_same_folder_is_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(settings(world, out, train__max_steps=1)) == 0
    message = error_of(settings(world, out, train__max_steps=1, train__seed=5), capsys)
    assert "train.seed is 5, the checkpoint has 0" in message


def test_a_constant_rate_run_can_be_made_longer_but_not_shorter(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, constant = tmp_path / "run", {"train__schedule": "constant", "train__warmup_ratio": 0.0}
    assert main(settings(world, out, train__max_steps=2, **constant)) == 0
    assert main(settings(world, out, train__max_steps=4, **constant)) == 0
    assert len(losses(out, "train")) == 4
    message = error_of(settings(world, out, train__max_steps=3, **constant), capsys)
    assert "is at step 4, beyond this run's last step, 3" in message


def test_two_runs_in_one_folder_are_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert f"another run is writing to {out}" in error_of(settings(world, out), capsys)


# --- what is wrong with a run


def test_a_loss_that_is_not_finite_ends_the_run(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    changes = {"train__learning_rate": 1e15, "train__warmup_ratio": 0.5, "train__save_every": 1}
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
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    changes = {"train__learning_rate": 1e38, "train__warmup_ratio": 0.0, "train__save_every": 1}
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
    assert message.startswith("error: device 'cuda' is not here")


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


# --- the configs that come with the project


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_run_at_a_tiny_size(path: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
