"""The demo's own commands: what `make demo` starts from, and what its runs came to.

    python -m train.demo prepare outputs/demo    a small checkpoint with random weights, and generated rows
    python -m train.demo report outputs/demo     losses before and after, and where the results are

All else is done by the ordinary commands: `python -m train`, `python -m models.convert` and `python -m train.generate`.
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

from quant.common.errors import NibbleError
from quant.common.jsonfile import number, read_json
from quant.common.terminal import exit_code, run_command, say
from quant.common.words import table
from train.demo.checkpoint import write_checkpoint, write_if_changed, write_tokenizer
from train.demo.models import DEFAULT, MODELS, demo_model
from train.demo.text import distinct_problems, in_prose, in_yaml, record_problem

BASE_ROWS, TUNING_ROWS, HELD_OUT_ROWS = 6000, 1200, 100


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

    lines = [table(losses, right=(1, 2)), ""]
    files = ("adapter", "metrics.jsonl", "loss.png")
    lines += [f"  {what:19}  {folder / 'qlora' / what}" for what in files if (folder / "qlora" / what).exists()]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m train.demo",
        description="What `make demo` starts from, and what its runs came to.",
        epilog="example:\n  python -m train.demo prepare outputs/demo-afmoe --arch afmoe",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = made.add_subparsers(dest="command", required=True)
    first = commands.add_parser(
        "prepare", help="write a small checkpoint with random weights, and rows to train on", allow_abbrev=False
    )
    first.add_argument("folder", type=Path)
    known = f"the checkpoint's architecture: {', '.join(sorted(MODELS))} (default: {DEFAULT})"
    first.add_argument("--arch", default=DEFAULT, metavar="MODEL_TYPE", help=known)
    first.add_argument("--seed", type=int, default=0, help="of weights and rows (default: 0)")
    last = commands.add_parser(
        "report", help="show losses before and after the fine-tuning, and where its results are", allow_abbrev=False
    )
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
