"""The demo's own commands: what `make demo` starts from, and what it shows at the end.

    python -m train.demo prepare outputs/demo    a small checkpoint with random weights, and generated rows
    python -m train.demo report outputs/demo     losses before and after, and a question answered before and after

Everything between the two is done by the ordinary commands, `python -m train` and `python -m models.convert`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take their time
    from quant.common.interrupts import end_on_interrupt

    end_on_interrupt()

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quant.common.errors import NibbleError
from quant.common.jsonfile import number, read_json
from quant.common.terminal import exit_code, run_command, say
from quant.common.words import table
from train.demo.checkpoint import write_checkpoint, write_if_changed, write_tokenizer
from train.demo.models import DEFAULT, MODELS, demo_model
from train.demo.text import distinct_problems, in_prose, in_yaml, record_problem

if TYPE_CHECKING:
    from models.decoder import CausalLM
    from train.data.tokenizer import Tokenizer

BASE_ROWS, TUNING_ROWS, HELD_OUT_ROWS = 6000, 1200, 100
LONGEST_ANSWER = 40  # tokens


def prepare(folder: Path, model_type: str = DEFAULT, seed: int = 0) -> None:
    """Write `folder`/start (checkpoint) and `folder`/data (rows). The same seed gives the same bytes.

    Raises NibbleError, before anything is written, for an architecture that the demo doesn't have.
    """
    demo_model(model_type)
    base = distinct_problems(BASE_ROWS + HELD_OUT_ROWS, seed)
    tuning = [in_yaml(p) for p in distinct_problems(TUNING_ROWS + HELD_OUT_ROWS, seed + 1, unlike=base)]
    # Three of five questions are answered in prose; the others give the parts of a record to be written as YAML.
    mixed = [in_prose(p) if i % 5 < 3 else in_yaml(record_problem(p)) for i, p in enumerate(base)]
    for name, rows in (("base", mixed), ("tuning", tuning)):
        for part, chosen in (("train", rows[HELD_OUT_ROWS:]), ("eval", rows[:HELD_OUT_ROWS])):
            lines = "".join(json.dumps(row) + "\n" for row in chosen)
            write_if_changed(folder / "data" / f"{name}_{part}.jsonl", lines.encode())
    write_tokenizer(folder / "start", [message["content"] for row in (*mixed, *tuning) for message in row["messages"]])
    write_checkpoint(folder / "start", model_type, seed)


def report(folder: Path) -> str:
    """What the demo's runs in `folder` came to. Raises NibbleError where one has not finished."""
    import torch

    from models import load_model
    from train.data.tokenizer import load_tokenizer

    losses = [("held-out loss", "before", "after")]
    for name, run in (("base: word problems in prose", "base"), ("QLoRA: word problems in YAML", "qlora")):
        finished = folder / run / "run.json"
        if not finished.is_file():
            model_type = folder.name.partition("-")[2]
            command = f"make demo ARCH={model_type}" if model_type in MODELS else "make demo"
            raise NibbleError(f"{folder / run}: this run has not finished. `{command}` goes on where it stopped.")
        figures = read_json(finished, dict)
        before, after = (number(figures, f"held_out_loss_{when}", 0, str(finished)) for when in ("before", "after"))
        losses.append((name, f"{before:.3f}", f"{after:.3f}"))

    converted, adapter = folder / "base-nf4", folder / "qlora" / "adapter"
    row = json.loads((folder / "data" / "tuning_eval.jsonl").read_text(encoding="utf-8").splitlines()[0])
    question, expected = (message["content"] for message in row["messages"])
    tokenizer = load_tokenizer(converted)
    lines = [table(losses, right=(1, 2)), "", f"  a held-out question  {question}"]
    for who, path in (("the 4-bit base", None), ("with the adapter", adapter)):
        model = load_model(converted, storage="nf4", dtype=torch.bfloat16, device="cpu", adapter=path)
        lines.append(f"  {who:19}  {answer(model, tokenizer, converted, question)}")
    lines += [f"  {'wanted':19}  {expected}", ""]
    files = ("adapter", "metrics.jsonl", "loss.png")
    lines += [f"  {what:19}  {folder / 'qlora' / what}" for what in files if (folder / "qlora" / what).exists()]
    return "\n".join(lines)


def answer(model: CausalLM, tokenizer: Tokenizer, folder: Path, question: str) -> str:
    """The model's most likely answer, token by token. Every token computes the whole text again: fine for one line."""
    import torch

    from train.data.template_files import load_chat_template, missing_template

    template = load_chat_template(folder, tokenizer.special_tokens)
    if template is None:
        raise missing_template(folder)
    ids = tokenizer.encode(template.render([{"role": "user", "content": question}], add_generation_prompt=True))
    start = len(ids)
    with torch.inference_mode():
        while len(ids) < start + LONGEST_ANSWER:
            following = int(model(torch.tensor([ids]))[0, -1].argmax())
            if following in tokenizer.eos_ids:
                break
            ids.append(following)
    return tokenizer.decode(ids[start:])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m train.demo",
        description="The first and the last command of `make demo`.",
        epilog="example:\n  python -m train.demo prepare outputs/demo-afmoe --arch afmoe",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="write a small checkpoint with random weights, and rows to train on")
    first.add_argument("folder", type=Path)
    known = f"the checkpoint's architecture: {', '.join(sorted(MODELS))} (default: {DEFAULT})"
    first.add_argument("--arch", default=DEFAULT, metavar="MODEL_TYPE", help=known)
    first.add_argument("--seed", type=int, default=0, help="of weights and rows (default: 0)")
    last = commands.add_parser("report", help="show losses and an answer, before and after the fine-tuning")
    last.add_argument("folder", type=Path)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)

    def body() -> int:
        if arguments.command == "prepare":
            prepare(arguments.folder, arguments.arch, arguments.seed)
            text = f"{arguments.folder / 'start'}: {arguments.arch} checkpoint with random weights\n"
            text += f"{arguments.folder / 'data'}: {BASE_ROWS:,} rows for the base, {TUNING_ROWS:,} for the fine-tuning"
        else:
            text = report(arguments.folder)
        say(text, sys.stdout)
        return 0

    return exit_code(body)


if __name__ == "__main__":
    sys.exit(run_command(main))
