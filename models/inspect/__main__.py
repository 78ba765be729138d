"""The command that shows what is in a checkpoint or an adapter: python -m models.inspect PATH"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take their time
    from quant.common.interrupts import end_on_interrupt

    end_on_interrupt()

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.adapters.packing import add_layout_option
from quant.common.errors import NibbleError
from quant.common.files import check_outputs
from quant.common.interrupts import raise_on_interrupt
from quant.common.progress import Bar
from quant.common.terminal import exit_code, refuse_empty, run_command, say, write

if TYPE_CHECKING:
    from models.inspect.diff import Compared

_DESCRIPTION = """\
Show what is in a folder. Of a checkpoint, in the hub's format or converted: architecture, storage, parameters, files,
whether they match their checksums, and which values of config.json are read. Of an adapter: settings, and the norm of
B·A of every matrix and expert, also as a heat map and as a share of the base's norm."""

_EXAMPLE = """\
examples:
  python -m models.inspect checkpoints/GLM-4.7-Flash-nf4
  python -m models.inspect outputs/glm47-qlora/adapter --png norms.png
  python -m models.inspect outputs/a/adapter --diff outputs/b/adapter

exit code: 0; with --diff 0 where nothing differs and 1 where something does; 2 for an error."""


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m models.inspect",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = arguments.add_argument
    add("path", metavar="PATH", help="folder of a checkpoint or of an adapter, or a hub id (which is downloaded)")
    add("--json", action="store_true", help="print one JSON object, with everything")
    add("--diff", metavar="OTHER", help="instead: name what differs between PATH and OTHER, tensors included")
    add("--quick", action="store_true", help="read headers and adapters only: no checksums, no base model")
    add("--model", metavar="MODEL", help="of an adapter: its base (default: the one it names, where that is here)")
    add_layout_option(arguments)
    add("--png", metavar="FILE", help="of an adapter: write the norms as a heat map")
    add("--experts", action="store_true", help="of an adapter: a column for every expert, also of more than 16")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 1 where --diff finds something; 2 for what the user can fix; 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    return exit_code(lambda: _body(arguments))


def _body(arguments: argparse.Namespace) -> int:
    refuse_empty(arguments)
    from models.inspect.adapter import is_adapter

    raise_on_interrupt()
    check_outputs({"--png": arguments.png}, [arguments.path, arguments.model])
    adapter = is_adapter(Path(arguments.path))
    given = [f"--{name}" for name in ("model", "layout", "png", "experts") if getattr(arguments, name)]
    if given and (not adapter or arguments.diff):
        what = "is for looking at one adapter" if arguments.diff else f"is about an adapter; {arguments.path} is none"
        raise NibbleError(f"{', '.join(given)} {what}.")
    if arguments.diff:
        return _diff(arguments, adapter)
    report = _adapter(arguments) if adapter else _checkpoint(arguments)
    if arguments.json:
        write(json.dumps(report, allow_nan=False), sys.stdout)
    return 0


def _checkpoint(arguments: argparse.Namespace) -> dict[str, Any]:
    from models.inspect.checkpoint import inspect_checkpoint
    from models.inspect.text import checkpoint_text
    from models.load import open_folder

    report = inspect_checkpoint(open_folder(arguments.path), quick=arguments.quick)
    if not arguments.json:
        say(checkpoint_text(report), sys.stdout)
    return report


def _adapter(arguments: argparse.Namespace) -> dict[str, Any]:
    from models.inspect.adapter import inspect_adapter
    from models.inspect.heatmap import heat_map
    from models.inspect.text import adapter_text, panels

    path = Path(arguments.path)
    with Bar("reading the base") as bar:
        report = inspect_adapter(
            path, base=arguments.model, layout=arguments.layout, quick=arguments.quick, progress=bar.update
        )
    if not arguments.json:
        say(adapter_text(report, experts=arguments.experts), sys.stdout)
    if arguments.png:
        heat_map(panels(report), Path(arguments.png), f"Norm of B·A: {path}", zero="norm 0")
    return report


def _diff(arguments: argparse.Namespace, adapter: bool) -> int:
    from models.inspect.adapter import compared_adapter, is_adapter
    from models.inspect.checkpoint import compared_checkpoint
    from models.inspect.diff import differences
    from models.inspect.text import differences_text
    from models.load import open_folder

    here, there = arguments.path, arguments.diff
    if is_adapter(Path(there)) != adapter:
        raise NibbleError(f"{here if adapter else there} is an adapter, {there if adapter else here} is none.")

    def side(path: str) -> Compared:
        return compared_adapter(Path(path)) if adapter else compared_checkpoint(open_folder(path))

    with Bar("comparing") as bar:
        found = list(differences(side(here), side(there), bar.update))
    if arguments.json:
        lines = [dataclasses.asdict(difference) for difference in found]
        write(json.dumps({"here": here, "there": there, "equal": not found, "differences": lines}), sys.stdout)
    else:
        say(differences_text(found, here, there), sys.stdout)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
