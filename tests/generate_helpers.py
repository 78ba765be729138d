"""A small checkpoint that was taught a few answers, so that what it says is known; and commands run as in a shell."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from models import AdapterSpec, add_lora, convert, export_hub, load_model, save_adapter, trainable_parameters
from tests.helpers import save_tiny_glm
from train.data.template_files import load_chat_template
from train.data.tokenizer import load_tokenizer
from train.demo.__main__ import prepare
from train.demo.models import VOCABULARY
from train.generate.__main__ import main

BUTTONS = "Ben finds 6 buttons in the morning and 3 in the evening. How many buttons are that?"
CUPS = "Tom needs 9 cups and has 4. How many cups are missing?"
PROSE = {BUTTONS: "That makes 6 + 3 = 9 buttons.", CUPS: "Tom still needs 9 - 4 = 5 cups."}
YAML = {BUTTONS: "{sum: 6 + 3, answer: 9, unit: buttons}"}


def make_demo(root: Path) -> Path:
    """outputs/demo in `root`, with the folders that `make demo` has at its end: base/model, base-nf4, qlora/adapter.

    Tokenizer and rows are the demo's; the model is smaller, and was taught nothing but the answers above.
    """
    demo = root / "outputs" / "demo"
    prepare(demo)
    start = demo / "start"
    eos = json.loads((start / "config.json").read_text())["eos_token_id"]
    for path in (*start.glob("model*"), start / "config.json"):
        path.unlink()
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}
    save_tiny_glm(start, eos_token_id=eos, **sizes)
    (start / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    model = load_model(start, "none", "float32")
    model.requires_grad_(True)
    teach(model, list(model.parameters()), start, PROSE, rate=3e-3)
    export_hub(model, demo / "base" / "model", start)
    convert(demo / "base" / "model", demo / "base-nf4", "nf4", "float32")
    tuned = load_model(demo / "base-nf4", "nf4", "float32")
    add_lora(tuned, AdapterSpec(("attention", "experts"), 16, 32), seed=0)
    teach(tuned, [parameter for _, parameter in trainable_parameters(tuned)], start, YAML, rate=2e-3)
    save_adapter(tuned, demo / "qlora" / "adapter", "base")
    return demo


def teach(model: Any, parameters: Any, folder: Path, answers: Mapping[str, str], rate: float) -> None:
    """Train until every answer, and the end of its turn, is the most likely one by far."""
    tokenizer = load_tokenizer(folder)
    template = load_chat_template(folder, tokenizer.special_tokens)
    assert template is not None
    rows = []
    for question, answer in answers.items():
        prompt = template.render([{"role": "user", "content": question}], add_generation_prompt=True)
        rows.append((len(tokenizer.encode(prompt)), tokenizer.encode(prompt + answer + "<|user|>")))
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(200):
        losses = []
        for start, ids in rows:
            logits = model(torch.tensor([ids]))[0, start - 1 : -1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="none"))
        if torch.cat(losses).max() < 0.4:  # every token has two thirds of the probability
            return
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        optimizer.step()
    raise AssertionError("not learnt")


def run(arguments: Sequence[str], lines: Sequence[str] = ()) -> tuple[int, str, str]:
    """Exit code, standard output and standard error; lines: of standard input."""
    out, err = io.StringIO(), io.StringIO()
    stdin = io.StringIO("".join(f"{line}\n" for line in lines))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patch("sys.stdin", stdin):
        code = main(list(arguments))
    return code, out.getvalue(), err.getvalue()


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
