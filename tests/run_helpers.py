"""Runs at a tiny size: a checkpoint with tokenizer and rows, a config for it, and what a run left behind."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import save_tiny_glm
from tests.processes import LIMIT, run_commands
from train.__main__ import main
from train.output.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = """[gMASK]<sop>
{%- for message in messages %}{{ '<|' + message.role + '|>' + message.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"]


# No process of a busy machine is to be taken for lost.
PATIENT = ["--set", "parallel.lost_after=600"]
SIZES = {"vocab_size": 320, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}


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


def make_world(folder: Path) -> World:
    pairs = questions(96, seed=0)
    (folder / "model").mkdir()
    size = write_tokenizer(folder / "model", [q + a for q, a in pairs])
    assert size == SIZES["vocab_size"]
    save_tiny_glm(folder / "model", **SIZES)
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
        values.setdefault(section, {})[key] = value
    path = out.with_name(out.name + ".yaml")
    path.write_text(yaml.safe_dump(values))
    return ["--config", str(path)]


def curve(out: Path) -> list[tuple[str, int, float, float | None]]:
    """What must not depend on how often a run was interrupted."""
    records = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] in ("train", "eval")]
    return [(r["kind"], r["step"], r["loss"], r.get("grad_norm")) for r in records]


def losses(out: Path, kind: str) -> list[float]:
    return [r["loss"] for r in read_metrics(out / "metrics.jsonl") if r["kind"] == kind]


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown[shown.index("error: ") :]


def torchrun(arguments: list[str], processes: int, *options: str, module: str = "train") -> list[str]:
    """The command that runs `python -m train ARGUMENTS`, or another module, in so many processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    return [*launcher, *(options or ("--standalone",)), "-m", module, *PATIENT, *arguments]


def in_processes(arguments: list[str], processes: int) -> subprocess.CompletedProcess[str]:
    """`torchrun` to its end, a thread for each process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        torchrun(arguments, processes), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )


def forked(arguments: list[str], processes: int, grace: float = 0.0) -> list[subprocess.CompletedProcess[str]]:
    """What each process of `torchrun` does, without torchrun and without waiting for imports (grace: run_commands)."""
    return run_commands(processes, "train.__main__:main", [*PATIENT, *arguments], grace=grace)
