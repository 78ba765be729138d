"""The command that converts a hub checkpoint: python -m models.convert SRC DST --storage nf4"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take their time
    from quant.common.interrupts import end_on_interrupt

    end_on_interrupt()

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from models.convert import convert
from models.hub_push import add_push_options, check_push, push_and_say
from quant.common.errors import NibbleError
from quant.common.interrupts import INTERRUPTED, raise_on_interrupt
from quant.common.progress import Bar
from quant.common.terminal import exit_code, refuse_empty, run_command, say, write

if TYPE_CHECKING:
    from models.checkpoint.conversion import Summary

_DESCRIPTION = """\
Convert a checkpoint in the hub's format (config.json, safetensors) into nibble's own: quantised once, and loaded
in seconds afterwards. The source is read one matrix at a time, so memory holds a few matrices, never a layer.
An interrupted conversion goes on where it stopped when the same command is given again."""

_EXAMPLE = """\
example:
  hf download zai-org/GLM-4.7-Flash --local-dir checkpoints/GLM-4.7-Flash
  python -m models.convert checkpoints/GLM-4.7-Flash checkpoints/GLM-4.7-Flash-nf4 --storage nf4
  python -m models.convert --verify checkpoints/GLM-4.7-Flash-nf4"""


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m models.convert",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = arguments.add_argument
    add("source", nargs="?", metavar="SRC", help="a checkpoint folder, or a hub id (which is downloaded)")
    add("destination", nargs="?", metavar="DST", help="folder for the converted checkpoint")
    add("--storage", choices=("nf4", "fp4", "int8", "none"), default="nf4", help="of frozen matrices (default: nf4)")
    add(
        "--single-quant",
        action="store_true",
        help="4 bits without quantising the scales too (0.56 instead of 0.52 bytes a weight)",
    )
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of everything else (default: bfloat16)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to quantise; cuda is faster (default: cpu)")
    add("--force", action="store_true", help="replace another conversion that is in DST")
    add("--verify", metavar="DST", help="instead: compare a converted checkpoint with its checksums")
    add("--json", action="store_true", help="print the result as one JSON object")
    add_push_options(arguments, "the converted checkpoint")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    return exit_code(lambda: _body(arguments), "interrupted; the same command starts again")


def _body(arguments: argparse.Namespace) -> int:
    refuse_empty(arguments)
    return _verify(arguments) if arguments.verify else _convert(arguments)


def _convert(arguments: argparse.Namespace) -> int:
    if not arguments.source or not arguments.destination:
        raise NibbleError("SRC and DST are needed (see --help).")
    if arguments.single_quant and arguments.storage not in ("nf4", "fp4"):
        raise NibbleError(
            f"--single-quant is about 4-bit storage; --storage is {arguments.storage}.\n"
            "Drop --single-quant, or use --storage nf4 or fp4."
        )
    from models.checkpoint.conversion import Interrupted

    raise_on_interrupt()
    check_push(arguments.push, public=arguments.public)
    try:
        summary = convert(
            arguments.source,
            arguments.destination,
            arguments.storage,
            arguments.dtype,
            arguments.device,
            double_quant=not arguments.single_quant,
            force=arguments.force,
            progress=True,
        )
    except Interrupted as error:
        say(f"{error}", sys.stderr)
        return INTERRUPTED
    _print(_as_json(summary) if arguments.json else _as_text(summary), arguments)
    push_and_say(arguments.destination, arguments.push, public=arguments.public)
    return 0


def _print(text: str, arguments: argparse.Namespace) -> None:
    (write if arguments.json else say)(text, sys.stdout)


def _verify(arguments: argparse.Namespace) -> int:
    from models.checkpoint.content import verify
    from models.checkpoint.native import describe
    from quant.common.words import format_bytes

    raise_on_interrupt()
    folder = Path(arguments.verify)
    if arguments.push or arguments.public:
        raise NibbleError(
            f"--verify converts nothing, and pushes nothing: python -m models.hub_push {folder} USER/NAME"
        )
    done = 0

    with Bar("checking") as bar:

        def count(nbytes: int, total: int) -> None:
            nonlocal done
            done += nbytes
            bar.update(done, total, folder.name)

        manifest = verify(folder, count)
    size = sum(record.size for record in manifest.files.values())
    text = f"{folder}: {len(manifest.files)} files, {format_bytes(size)} ({describe(manifest.spec, manifest.dtype)})"
    found = {"destination": str(folder), "files": len(manifest.files), "bytes": size, "verified": True}
    _print(json.dumps(found) if arguments.json else f"{text}: all checksums match", arguments)
    return 0


def _as_text(summary: Summary) -> str:
    from models.checkpoint.stream import LEFT_OUT
    from quant.common.words import format_bytes

    sizes = f"{format_bytes(summary.source_bytes)} → {format_bytes(summary.bytes)} ({summary.stored})"
    if summary.kept == summary.files:
        first = f"{summary.destination}: all is done already, {summary.files} files, {sizes}"
    else:
        kept = f", {summary.kept} of them from before" if summary.kept else ""
        first = (
            f"{summary.destination}: {summary.parameters:,} parameters, {sizes} in {summary.files} files{kept}, "
            f"{summary.seconds:.1f} s"
        )
    return f"{first}\n{LEFT_OUT}: {summary.left_out}" if summary.carried else first


def _as_json(summary: Summary) -> str:
    return json.dumps(
        {
            "destination": str(summary.destination),
            "storage": summary.stored,
            "parameters": summary.parameters,
            "source_bytes": summary.source_bytes,
            "bytes": summary.bytes,
            "files": summary.files,
            "files_kept": summary.kept,
            "carried": len(summary.carried),
            "seconds": round(summary.seconds, 3),
        }
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
