"""The command that evaluates a model: python -m train.evaluate MODEL --adapter A --data FILE"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take their time
    from quant.common.interrupts import end_on_interrupt

    end_on_interrupt()

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.adapters.packing import add_layout_option
from quant.common.files import check_outputs
from quant.common.interrupts import raise_on_interrupt
from quant.common.terminal import exit_code, refuse_empty, run_command
from train.__main__ import describe, several_processes
from train.config.row_paths import row_files
from train.evaluate.request import request_of

if TYPE_CHECKING:
    from parallel.world import World

_DESCRIPTION = """\
Loss, perplexity and token accuracy of a model on rows of text, with an adapter and without it in one go.
Rows are read as a training reads them, and the same tokens carry loss.
A JSON lines file of {"question", "choices", "answer"} is multiple choice by log-likelihood instead."""

_EXAMPLE = """\
examples:
  python -m train.evaluate outputs/demo/base-nf4 --adapter outputs/demo/qlora/adapter \\
      --data outputs/demo/data/tuning_eval.jsonl --json scores.json --by-row rows.jsonl
  python -m train.evaluate --config outputs/demo/qlora/config.yaml
  torchrun --nproc-per-node 2 -m train.evaluate MODEL --data FILE"""


MOST_TOKENS = 2**30  # computed at a time


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("model", nargs="?", metavar="MODEL", help="a checkpoint folder, a converted one, or a hub id")
    add("--adapter", metavar="A", help="folder of a LoRA adapter; evaluated with it and without")
    add_layout_option(made)
    add("--data", metavar="FILE", help="the rows (.jsonl, .json, .csv, also .gz, or .parquet), or a glob")
    add("--config", metavar="FILE", help="config of a run: its model, adapter and held-out rows, unless given here")
    add(
        "--format",
        choices=("messages", "prompt_completion", "text", "choices"),
        help="what a row holds, as data.format; choices: multiple choice, known by its columns (default: messages)",
    )
    add("--storage", choices=("none", "nf4", "fp4", "int8"), help="of frozen matrices (default: nf4, or as converted)")
    add("--dtype", choices=("bfloat16", "float32"), help="of everything else (default: bfloat16, or as converted)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--batch-tokens", type=_tokens, default=8192, metavar="N", help="tokens computed at a time (default: 8192)")
    add("--json", metavar="FILE", help="write the figures to FILE, as one JSON object")
    add("--by-row", metavar="FILE", help="write a line of JSON for each row to FILE, the worst first")
    add(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
        help="a key of configs, e.g. --set data.sequence_length=4096 or --set 'data.fields={prompt: question}'",
    )  # fmt: skip
    return made


def _tokens(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"expected a number of tokens from 1 to {MOST_TOKENS:,}, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    if not several_processes():
        return exit_code(lambda: _evaluate(arguments))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as in train.__main__
    from parallel.world import launched_world
    from train.launched import run_launched

    world = launched_world()
    return run_launched(world, lambda: _evaluate(arguments, world), describe)


def _evaluate(arguments: argparse.Namespace, world: World | None = None) -> int:
    refuse_empty(arguments)
    request = request_of(arguments)
    files = [file.path for file in row_files(request.rows or request.config.data.train, request.key)]
    outputs = {"--json": arguments.json, "--by-row": arguments.by_row}
    check_outputs(outputs, [arguments.config, request.model.path, request.adapter, *files])
    # Only now: importing torch takes seconds.
    from parallel.world import ALONE
    from train.evaluate.run import evaluate

    raise_on_interrupt()
    return evaluate(request, arguments.batch_tokens, arguments.json, arguments.by_row, world or ALONE)


if __name__ == "__main__":
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as in train.__main__
    sys.exit(run_command(main))
