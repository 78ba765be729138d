"""`python -m train --config FILE`: check the config, then run it."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take their time
    from quant.common.interrupts import end_on_interrupt

    end_on_interrupt()

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.hub_push import add_push_options, check_push, push_and_say
from quant.common.errors import NibbleError
from quant.common.interrupts import INTERRUPTED, raise_on_interrupt
from quant.common.terminal import error_text, exit_code, run_command, say, write
from train.config.load import Config, check_files, config_schema, dump_config, load_config
from train.config.schema import help_text

if TYPE_CHECKING:
    from parallel.world import World

EXAMPLE = "python -m train --config configs/glm47_qlora.yaml --set train.max_steps=3 --print-config"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m train",
        usage="python -m train --config FILE [--set KEY=VALUE ...] \n"
        "                       [--restart | --extend-to STEPS | --check | --print-config]\n"
        "                       [--push USER/NAME [--public]]\n"
        "       python -m train --print-schema | --help",
        description="Fine-tune a model as a YAML file describes. Exit code: 0 done, or stopped with everything saved;\n"
        "1 any other error, with a traceback; 2 something in the config, the data or the checkpoint is wrong;\n"
        "130 interrupted.",
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
    only.add_argument(
        "--restart",
        action="store_true",
        help="train from the start: an earlier run in output.dir is moved to output.dir.1 (.2 …)",
    )
    only.add_argument(
        "--extend-to",
        metavar="STEPS",
        type=_steps,
        help="let the run that has finished in output.dir go on to so many steps in all. A constant learning rate "
        "stays as it is; a linear or cosine one rises and falls once more, over the added steps",
    )
    only.add_argument(
        "--check",
        action="store_true",
        help="only check the config, its files, the first rows and the model's config.json",
    )
    only.add_argument("--print-config", action="store_true", help="only print the config with every key filled in")
    only.add_argument("--print-schema", action="store_true", help="only print the config's JSON schema")
    add_push_options(made, "the adapter (with train.keep_best the best one), or the fully fine-tuned model,")
    return made


def _steps(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(f"expected a number of steps, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if (arguments.push or arguments.public) and (arguments.check or arguments.print_config or arguments.print_schema):
        parser().error("--push and --public are for a run")
    if arguments.print_schema:
        write(json.dumps(config_schema(), indent=2, ensure_ascii=False), sys.stdout)
        return 0
    if arguments.config is None:
        parser().error("--config FILE is required, e.g. --config configs/glm47_qlora.yaml")
    if several_processes():
        return exit_code(lambda: run_with_others(arguments))
    return exit_code(lambda: carry_out(arguments, load_config(arguments.config, arguments.overrides)))


def carry_out(arguments: argparse.Namespace, config: Config, world: World | None = None) -> int:
    """What the arguments ask for. world: of several processes, of which the first one prints."""
    first = world is None or world.first
    if arguments.print_config:
        if first:
            write(dump_config(config).removesuffix("\n"), sys.stdout)
        return 0
    check_files(config, rows=first)
    if arguments.check:
        if first:
            show_check(arguments.config, config)
        return 0
    # Only now: importing torch takes seconds, and a mistake in a config must show at once.
    from parallel.world import ALONE
    from train.run import run

    raise_on_interrupt()
    if first:
        check_push(arguments.push, public=arguments.public)
    code = run(
        config,
        config_path=Path(arguments.config),
        world=world or ALONE,
        restart=arguments.restart,
        extend_to=arguments.extend_to,
    )
    if first and arguments.push is not None:
        push_result(config, arguments.push, public=arguments.public)
    return code


def push_result(config: Config, repository: str, *, public: bool) -> None:
    """Push what the run has made, if it is through: of train.keep_best the best."""
    from train.state.run_folder import RunFolder

    folder = RunFolder(Path(config.output.dir))
    if not folder.finished.is_file():
        say(f"not pushed to {repository}: the run isn't through", sys.stderr)
        return
    best = folder.result(config, best=True)
    push_and_say(best if config.train.keep_best and best.is_dir() else folder.result(config), repository, public=public)


def show_check(name: str, config: Config) -> None:
    from train.check import check

    checked, unchecked = check(config, lambda text: say(f"warning: {text}", sys.stderr))
    lines = [f"{name}: ok"]
    for title, found in (("checked", checked), ("not checked", unchecked)):
        lines += [f"  {title if text is found[0] else '':11}  {text}" for text in found]
    say("\n".join(lines), sys.stdout)


def several_processes() -> bool:
    """Whether a launcher has started this process as one of several; parallel.world, which knows more, needs torch."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def run_with_others(arguments: argparse.Namespace) -> int:
    """One of several processes. An error, in the config too, is printed once for all of them."""
    # torch would add dozens of lines of its own to every connection that a failed process leaves broken.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported
    from parallel.world import launched_world
    from train.launched import run_launched
    from train.output.report import log_path

    world = launched_world()
    log, older = Path(), 0

    def size() -> int:
        return log.stat().st_size if log.is_file() else 0

    def body() -> int:
        nonlocal log, older
        config = load_config(arguments.config, arguments.overrides)
        log = log_path(Path(config.output.dir), world.rank)
        older = size()  # of earlier runs
        return carry_out(arguments, config, world)

    return run_launched(world, body, lambda error: describe(error, log if size() > older else None))


def describe(error: BaseException, log: Path | None = None) -> tuple[str, int]:
    """The message for the user, and the exit code.

    An error that isn't a NibbleError is its traceback, or the last line of it where `log` has the rest.
    """
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, NibbleError):
        return error_text(error), error.exit_code
    if log is not None:
        last = "".join(traceback.format_exception_only(type(error), error)).strip()
        return error_text(NibbleError(f"{last}\nThe traceback is in {log}.")), 1
    return "".join(traceback.format_exception(error)).rstrip(), 1


if __name__ == "__main__":
    # A run needs nothing of torch.compile. bitsandbytes marks fallbacks of its kernels for it when it is imported,
    # which without this setting loads torch's compiler: 2 seconds.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    sys.exit(run_command(main))
