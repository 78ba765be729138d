"""The command that writes an adapter as a server reads it: python -m models.export ADAPTER OUT --for vllm"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take their time
    from quant.common.interrupts import end_on_interrupt

    end_on_interrupt()

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from models.adapters.packing import add_layout_option
from models.hub_push import add_push_options, check_push, push_and_say
from quant.common.interrupts import raise_on_interrupt
from quant.common.terminal import exit_code, refuse_empty, run_command, say, write

if TYPE_CHECKING:
    from models.export.write import Exported

_DESCRIPTION = """\
Write an adapter in the form that a server reads, with nothing left that the server would pass over in silence:
  peft      PEFT's own (0.19.1 and newer), of which transformers makes use
  vllm      a LoRA per expert and matrix (GLM, Trinity, Qwen3, Qwen3.5's text model), or stacks of experts (Qwen3.5's
            vision-language model); scales folded into B, one rank
  sglang    a LoRA per expert and matrix, likewise (not tried with SGLang)
  llamacpp  a LoRA per expert and matrix, likewise, for llama.cpp's convert_lora_to_gguf.py
Matrices that the server can't serve are refused by name, with the ways out. docs/serving.md has the commands."""

_EXAMPLE = """\
example:
  python -m models.export outputs/glm45/adapter outputs/glm45/adapter-vllm --for vllm
  vllm serve zai-org/GLM-4.5-Air --enable-lora --max-lora-rank 32 --lora-modules mine=outputs/glm45/adapter-vllm"""


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m models.export",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = arguments.add_argument
    add("adapter", metavar="ADAPTER", help="folder with adapter_config.json and adapter_model.safetensors")
    add("out", metavar="OUT", help="folder for what is written: empty, or not there yet")
    add("--for", dest="server", choices=("peft", "vllm", "sglang", "llamacpp"), required=True, help="who is to read it")
    add("--model", metavar="MODEL", help="folder of the base (config.json is enough); default: the adapter says it")
    add(
        "--names",
        choices=("text", "vision-language"),
        help="of Qwen3.5: the class that will load it (default: that of the base's config.json)",
    )
    add_layout_option(arguments)
    add("--drop", metavar="NAME", action="append", default=[], help="leave out a matrix (kv_b_proj) or group (router)")
    add("--keep", metavar="NAME", action="append", default=[], help="write a matrix although it would be refused")
    add("--verify", action="store_true", help="load the result, and compare a forward pass with base and adapter")
    add("--json", action="store_true", help="print the result as one JSON object")
    add_push_options(arguments, "what is written")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)
    return exit_code(lambda: _export(arguments), "interrupted; the same command starts again")


def _export(arguments: argparse.Namespace) -> int:
    refuse_empty(arguments)
    from models.export.verify import check_verifiable, verify
    from models.export.write import export_adapter

    raise_on_interrupt()
    check_push(arguments.push, public=arguments.public)
    adapter, out = Path(arguments.adapter), Path(arguments.out)
    if arguments.verify:
        check_verifiable(adapter, arguments.model, arguments.drop)
    done = export_adapter(
        adapter,
        out,
        arguments.server,
        model=arguments.model,
        names=arguments.names,
        layout=arguments.layout,
        drop=arguments.drop,
        keep=arguments.keep,
    )
    found = {
        "out": str(out),
        "for": arguments.server,
        "base": str(done.base),
        "names": done.names,
        "experts": "stacked" if done.stacked else "per expert",
        "rank": done.rank,
        "tensors": done.tensors,
        "dropped": done.dropped,
    }
    if not arguments.json:
        say(_as_text(out, arguments.server, done), sys.stdout)
    if arguments.verify:
        compared = verify(adapter, out, done, arguments.layout)
        found |= {"largest_difference": compared.difference, "effect": compared.effect}
        if not arguments.json:
            say(f"verified  {compared.how}: {compared}", sys.stdout)
    if arguments.json:
        write(json.dumps(found), sys.stdout)
    push_and_say(out, arguments.push, public=arguments.public)
    return 0


def _as_text(out: Path, server: str, done: Exported) -> str:
    form = "experts stacked" if done.stacked else "a LoRA per expert and matrix"
    rank = f"ranks up to {done.rank}" if server == "peft" else f"rank {done.rank}, scale 1"
    lines = [f"{out}: {done.tensors} tensors, {form}, {rank}, names of the {done.names} model"]
    lines += [f"left out  {name}: {count} of the adapter's matrices" for name, count in done.dropped.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
