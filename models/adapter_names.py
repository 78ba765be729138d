"""The command that renames an adapter's tensors: python -m models.adapter_names ADAPTER OUT --to text"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take their time
    from quant.common.interrupts import end_on_interrupt

    end_on_interrupt()

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.common.errors import NibbleError
from quant.common.interrupts import raise_on_interrupt
from quant.common.terminal import exit_code, refuse_empty, run_command, say

if TYPE_CHECKING:
    from models.checkpoint.layout import Spelling

_DESCRIPTION = """\
Rename what an adapter's files name, for the other of the two classes that have the same text model:
  text             model.layers.…                 AutoModelForCausalLM, or a checkpoint of the text model alone
  vision-language  model.language_model.layers.…  AutoModelForImageTextToText, or a vision-language checkpoint
PEFT applies an adapter only where the names are those of the class; elsewhere it warns of missing keys, and computes
without the adapter. nibble reads both. The tensors' values stay as they are."""

_EXAMPLE = """\
example:
  python -m models.adapter_names outputs/qwen35-qlora/adapter outputs/qwen35-qlora/adapter-text --to text"""

_NAME_LISTS = ("target_modules", "target_parameters", "exclude_modules")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m models.adapter_names",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = arguments.add_argument
    add("adapter", metavar="ADAPTER", help="folder with adapter_config.json and adapter_model.safetensors")
    add("out", metavar="OUT", help="folder for the renamed adapter: empty, or not there yet")
    add("--to", choices=("text", "vision-language"), required=True, help="whose names to give it")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)

    def body() -> int:
        refuse_empty(arguments)
        count = rename_adapter(Path(arguments.adapter), Path(arguments.out), arguments.to)
        say(f"{arguments.out}: {count} tensors with the names of the {arguments.to} model", sys.stdout)
        return 0

    return exit_code(body, "interrupted; the same command starts again")


def rename_adapter(source: Path, destination: Path, to: Spelling) -> int:
    """Write the adapter in `source` to `destination` with its names in the spelling `to`; returns the tensors' number.

    Raises NibbleError, before anything is written, where `destination` isn't free, and for names that aren't all
    in the other spelling.
    """
    from safetensors import safe_open

    from models.adapters.files import check_free, write_new_adapter
    from models.adapters.peft_config import CONFIG, WEIGHTS, read_config
    from models.checkpoint.layout import respell
    from models.checkpoint.tensorfile import DTYPES, read_header

    raise_on_interrupt()
    config = read_config(source)
    check_free(destination)
    header = read_header(source / WEIGHTS)
    _check_names(source, list(header), to)
    strange = sorted({info.dtype for info in header.values()} - DTYPES.keys())
    if strange:
        raise NibbleError(f"{source / WEIGHTS} holds {', '.join(strange)}, which can't be copied.")
    renamed = _renamed_config(config, to, str(source / CONFIG))
    tensors = {respell(name, to): (info.shape, DTYPES[info.dtype]) for name, info in header.items()}
    with safe_open(source / WEIGHTS, framework="pt") as file:
        values = ((respell(name, to), file.get_tensor(name)) for name in header)
        write_new_adapter(destination, renamed, tensors, values)
    return len(tensors)


def _check_names(source: Path, names: list[str], to: Spelling) -> None:
    from models.checkpoint.layout import spelling_of, spellings

    if not names:
        raise NibbleError(f"{source} has no tensors.")
    other = next((name for name in names if spelling_of(name) is None), None)
    if other is not None:
        raise NibbleError(
            f"{source}: {other} is named neither like the text model's layers (model.layers.…) nor like the "
            "vision-language model's (model.language_model.layers.…).\n"
            "Only adapters of a text model's layers can be renamed."
        )
    found = spellings(names)
    if len(found) > 1:
        raise NibbleError(f"{source}: some names are those of the text model, some of the vision-language model.")
    if to in found:
        raise NibbleError(f"{source}: its names are those of the {to} model already; use it as it is.")


def _renamed_config(config: dict[str, Any], to: Spelling, where: str) -> dict[str, Any]:
    from models.checkpoint.layout import respell
    from quant.common.jsonfile import mapping, texts

    renamed = dict(config)
    for field in _NAME_LISTS:
        if isinstance(config.get(field), str):  # a pattern, or all-linear
            renamed[field] = respell(config[field], to)
        elif config.get(field) is not None:
            renamed[field] = [respell(name, to) for name in texts(config, field, where)]
    for field in _PATTERNS:
        if config.get(field) is not None:
            numbers = mapping(config, field, where)
            renamed[field] = {respell(pattern, to): number for pattern, number in numbers.items()}
    return renamed


if __name__ == "__main__":
    sys.exit(run_command(main))
