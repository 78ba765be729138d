"""The command that asks a model: python -m train.generate MODEL --prompt TEXT"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take their time
    from quant.common.interrupts import end_on_interrupt

    end_on_interrupt()

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from models.adapters.packing import add_layout_option
from quant.common.errors import NibbleError
from quant.common.interrupts import raise_on_interrupt
from quant.common.jsonfile import JsonError, parse_json
from quant.common.terminal import exit_code, refuse_empty, run_command, say, show_text
from train.__main__ import several_processes

if TYPE_CHECKING:
    from train.generate.answers import Answerer

_DESCRIPTION = """\
Ask a model: one prompt, a file of prompts, or, with neither, a chat (/help lists its commands). Prompts are the user's
message in the checkpoint's chat template; a checkpoint without one continues them as text. Sampling that isn't given is
as the checkpoint's generation_config.json says, otherwise greedy; a line on standard error names it."""

_EXAMPLE = """\
examples:
  python -m train.generate outputs/demo/base-nf4 --adapter outputs/demo/qlora/adapter
  python -m train.generate --config configs/glm47_qlora.yaml --prompt "What is a monad?" --temperature 0.7
  python -m train.generate zai-org/GLM-4.7-Flash --prompts questions.jsonl --out answers.jsonl --batch-size 16"""


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m train.generate",
        usage="python -m train.generate (MODEL | --config FILE) [--prompt TEXT | --prompts FILE --out FILE] [OPTIONS]",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = arguments.add_argument
    add("model", nargs="?", metavar="MODEL", help="a hub folder, a hub id, or a converted folder")
    add("--adapter", metavar="A", help="folder of an adapter in PEFT's format")
    add_layout_option(arguments)
    add("--config", metavar="FILE", help="instead of MODEL: model, storage and adapter of the run that FILE describes")
    add("--prompt", metavar="TEXT", help="answer this")
    add("--prompts", metavar="FILE", help='answer each row: {"prompt": …} or {"messages": […]}, .jsonl, .json or .csv')
    add(
        "--out",
        metavar="FILE",
        help="for --prompts: the rows with text, tokens and finish (stop or length), JSON lines",
    )
    add("--plain", action="store_true", help="give prompts to the model as they are, without the chat template")
    add(
        "--template-variable", metavar="NAME=VALUE", action="append", default=[], dest="variables",
        help="a variable of the chat template, e.g. enable_thinking=false; VALUE is JSON or text; may be repeated",
    )  # fmt: skip
    loading = arguments.add_argument_group("loading")
    add = loading.add_argument
    add(
        "--storage",
        choices=("none", "nf4", "fp4", "int8"),
        help="of frozen matrices (default: a converted folder's, else nf4)",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of everything else (default: a converted folder's, else bfloat16)",
    )
    add("--device", metavar="DEVICE", help="cpu, cuda or cuda:NUMBER (default: cuda where there is one)")
    tokens = arguments.add_argument_group(
        "tokens (0 switches --top-k and --min-p off, 1 --top-p and --repetition-penalty)"
    )
    add = tokens.add_argument
    add("--max-new-tokens", type=int, metavar="N", help="of an answer (default: generation_config.json's, else 512)")
    add("--temperature", type=float, metavar="T", help="0: the most likely token, always")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens only")
    add("--top-p", type=float, metavar="P", help="… from the most likely tokens that have this probability together")
    add("--min-p", type=float, metavar="P", help="… from tokens at least P times as likely as the most likely one")
    add(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="above 1: tokens that were there before become less likely",
    )
    add("--seed", type=int, metavar="N", help="the same seed draws the same (default: another one every time)")
    add("--stop", metavar="TEXT", action="append", default=[], help="end an answer before this text; may be repeated")
    add("--batch-size", type=int, metavar="N", default=8, help="for --prompts: rows computed together (default: 8)")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    kept = "; the same command goes on after the batches that are done" if arguments.prompts is not None else ""
    return exit_code(lambda: _carry_out(arguments), f"interrupted{kept}")


def _carry_out(arguments: argparse.Namespace) -> int:
    refuse_empty(arguments, "prompt")  # which has a message of its own
    _check_together(arguments)
    if arguments.prompts is not None:
        from train.generate.prompts import answer_file, check_names

        check_names(arguments.prompts, arguments.out, [arguments.model, arguments.adapter, arguments.config])
    answerer = _load(arguments)
    if arguments.prompt is not None:
        prompt = answerer.tokens_of_prompt(arguments.prompt)
        (answer,) = answerer.answer([prompt], show=lambda text: show_text(text, sys.stdout))
        show_text("\n", sys.stdout)
        if answer.finish == "length":
            say(answerer.cut_off, sys.stderr)
    elif arguments.prompts is not None:
        answer_file(answerer, arguments.prompts, arguments.out, arguments.batch_size)
    else:
        from train.generate.chat import Chat

        Chat(answerer).run()
    return 0


def _check_together(arguments: argparse.Namespace) -> None:
    if several_processes():
        raise NibbleError(
            "generating is the work of one process; this one is one of several (WORLD_SIZE).\n"
            "Give the command without torchrun. A model that is too large for one GPU: --storage nf4, or merge it and "
            "serve it (docs/serving.md)."
        )
    if (arguments.model is None) == (arguments.config is None):
        raise NibbleError("either MODEL or --config FILE is needed (see --help).")
    if arguments.prompt is not None and arguments.prompts is not None:
        raise NibbleError("--prompt and --prompts can't be given together.")
    if (arguments.prompts is None) != (arguments.out is None):
        raise NibbleError("--prompts FILE and --out FILE go together.")
    if not 1 <= arguments.batch_size <= 2**16:
        raise NibbleError(f"--batch-size must be from 1 to {2**16}, got {arguments.batch_size}.")
    if arguments.plain and arguments.variables:
        raise NibbleError("--template-variable is for the chat template, which --plain leaves out.")


def _load(arguments: argparse.Namespace) -> Answerer:
    """The model is read when it is asked: all that is wrong before that shows at once."""
    from train.generate.source import load_source, source_of

    source = source_of(arguments.model, arguments.adapter, arguments.config, arguments.layout)
    raise_on_interrupt()
    from train.generate.settings import SAMPLING

    names = (*SAMPLING, "max_new_tokens")
    return load_source(
        source,
        storage=arguments.storage,
        dtype=arguments.dtype,
        device=arguments.device,
        given={name: getattr(arguments, name) for name in names},
        stop_texts=arguments.stop,
        seed=arguments.seed,
        plain=arguments.plain,
        variables=dict(map(_variable, arguments.variables)),
        note=lambda text: say(text, sys.stderr),
    )


def _variable(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise NibbleError(f"--template-variable {text}: expected NAME=VALUE, as in enable_thinking=false.")
    try:
        return name, parse_json(value)
    except JsonError:
        return name, value


if __name__ == "__main__":
    # As for `python -m train`: bitsandbytes then loads in half the time.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    sys.exit(run_command(main))
