"""`python -m train --config FILE`: check the config, then run it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from quant.errors import NibbleError
from train.config import check_files, config_schema, dump_config, load_config
from train.console import flush_streams, say
from train.schema import help_text

EXAMPLE = "python -m train --config configs/glm47_qlora.yaml --set train.max_steps=3 --print-config"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m train",
        usage="python -m train --config FILE [--set KEY=VALUE ...] [--check | --print-config]\n"
        "       python -m train --print-schema | --help",
        description="Fine-tune a model as a YAML file describes. Exit code: 0 done, or stopped with everything saved;\n"
        "2 something in the config, the data or the checkpoint is wrong; 130 interrupted.",
        epilog=f"example (shows the config that would run):\n  {EXAMPLE}\n\n"
        f"config keys:\n\n{help_text(config_schema())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", metavar="FILE", help="YAML file that describes the run (see configs/)")
    made.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides",
        help="change one key, e.g. --set train.max_steps=3; VALUE is YAML; may be repeated",
    )  # fmt: skip
    only = made.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="only check the config and that its files are there")
    only.add_argument("--print-config", action="store_true", help="only print the config with every key filled in")
    only.add_argument("--print-schema", action="store_true", help="only print the config's JSON schema")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.print_schema:
        say(json.dumps(config_schema(), indent=2, ensure_ascii=False), sys.stdout)
        return 0
    if arguments.config is None:
        parser().error("--config FILE is required, e.g. --config configs/glm47_qlora.yaml")
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            say(dump_config(config).removesuffix("\n"), sys.stdout)
            return 0
        check_files(config)
        if arguments.check:
            say(f"{arguments.config}: ok", sys.stdout)
            return 0
        # Only now: importing torch takes seconds, and a mistake in a config must show at once.
        from train.run import run

        return run(config, config_path=Path(arguments.config))
    except NibbleError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        return 130


def print_error(error: NibbleError) -> None:
    """`error: …` on standard error, its further lines indented under the first."""
    first, *rest = str(error).splitlines()
    indent = " " * len("error: ")
    say("\n".join([f"error: {first}", *(indent + line.removeprefix(indent) for line in rest)]), sys.stderr)


if __name__ == "__main__":
    try:
        code = main()
    finally:
        flush_streams()  # argparse, too, prints and leaves: --help | head
    sys.exit(code)
