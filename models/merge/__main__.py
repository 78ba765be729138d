"""The command that merges an adapter into its base: python -m models.merge MODEL ADAPTER OUT"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take their time
    from quant.common.interrupts import end_on_interrupt

    end_on_interrupt()

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from models.adapters.packing import add_layout_option
from models.hub_push import add_push_options, check_push, push_and_say
from models.merge import merge_adapter
from quant.common.errors import NibbleError
from quant.common.interrupts import INTERRUPTED, raise_on_interrupt
from quant.common.terminal import exit_code, refuse_empty, run_command, say, write

if TYPE_CHECKING:
    from models.merge.merging import Summary

_DESCRIPTION = """\
Merge a LoRA adapter into its base checkpoint. The result is the base's folder with other weights: the same shards, keys
and dtypes, everything that isn't adapted byte for byte, ready for transformers and servers. With --storage it is a
converted checkpoint of the same. Adapters of PEFT are read, in the layouts of all its versions, and others' with an
ordinary LoRA per expert. An interrupted merge goes on where it stopped when the same command is given again."""

_EXAMPLE = """\
example:
  python -m models.merge checkpoints/GLM-4.7-Flash outputs/glm47-qlora/adapter checkpoints/GLM-4.7-Flash-tuned

docs/merge.md says when to merge into the dequantised base, and what it changes."""


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m models.merge",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = arguments.add_argument
    add("model", metavar="MODEL", help="the base: a folder in the hub's format, or a hub id (which is downloaded)")
    add("adapter", metavar="ADAPTER", help="folder with adapter_config.json and adapter_model.safetensors")
    add("out", metavar="OUT", help="folder for the merged checkpoint")
    add("--storage", choices=("none", "nf4", "fp4", "int8"), default="none",
        help="of a converted result (default: none, the hub's format)")  # fmt: skip
    add("--single-quant", action="store_true", help="with --storage nf4 or fp4: without quantising the scales too")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
        help="of what a converted result doesn't quantise (default: bfloat16)")  # fmt: skip
    add("--device", default="cpu", help="where to quantise: cpu or cuda, which is faster (default: cpu)")
    add("--onto", choices=("base", "dequantised"), default="base",
        help="merge into the weights as they are, or as a 4-bit run saw them (default: base)")  # fmt: skip
    add("--trained-with", choices=("none", "nf4", "nf4-single", "fp4", "fp4-single", "int8"),
        help="how the base was stored in training (default: what the run's config.yaml says, else nf4)")  # fmt: skip
    add_layout_option(arguments)
    add("--force", action="store_true", help="replace another unfinished merge, or another conversion in OUT")
    add("--json", action="store_true", help="print the result as one JSON object, with the norms of every layer")
    add_push_options(arguments, "the merged model")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    return exit_code(lambda: _merge(arguments), "interrupted; the same command starts again")


def _merge(arguments: argparse.Namespace) -> int:
    refuse_empty(arguments)
    if arguments.single_quant and arguments.storage not in ("nf4", "fp4"):
        raise NibbleError("--single-quant is about 4-bit results: add --storage nf4 or fp4, or drop it.")
    from models.checkpoint.conversion import Interrupted

    raise_on_interrupt()
    check_push(arguments.push, public=arguments.public)
    try:
        summary = merge_adapter(
            arguments.model,
            arguments.adapter,
            arguments.out,
            arguments.storage,
            arguments.dtype,
            arguments.device,
            double_quant=not arguments.single_quant,
            onto=arguments.onto,
            trained_with=arguments.trained_with,
            layout=arguments.layout,
            force=arguments.force,
            progress=True,
        )
    except Interrupted as error:
        say(f"{error}", sys.stderr)
        return INTERRUPTED
    if arguments.json:
        write(_as_json(summary), sys.stdout)
    else:
        say(_as_text(summary), sys.stdout)
    push_and_say(arguments.out, arguments.push, public=arguments.public)
    return 0


def _as_text(summary: Summary) -> str:
    from quant.common.words import format_bytes

    size = f"{format_bytes(summary.bytes)} ({summary.stored})"
    first = f"{summary.destination}: {summary.matrices:,} tensors merged, {size}, {summary.seconds:.1f} s"
    return "\n".join([first, *summary.report])


def _as_json(summary: Summary) -> str:
    fields = dataclasses.asdict(summary)
    return json.dumps(fields | {"destination": str(summary.destination), "seconds": round(summary.seconds, 3)})


if __name__ == "__main__":
    sys.exit(run_command(main))
