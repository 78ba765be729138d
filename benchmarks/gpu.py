"""`python -m benchmarks.gpu`: models at full size on CUDA beside the peer; CUDA's results against the CPU's."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.command import run_command
from benchmarks.gpu_cases import GROUPS, NOT_HERE, PEER, Group, Request
from benchmarks.gpu_process import ROOT, Outcome, deadlines, lines_of, run_cases
from benchmarks.gpu_report import case_table, check_line, kernels_text, peer_table, timing_table
from benchmarks.peer_env import environment_of, peer_python, python_in, requirements
from quant.common.errors import NibbleError
from quant.common.files import check_outputs

GiB = 1 << 30
MINUTES = 7.5  # the command's default limit: it ends within 8
# In this order. flash-linear-attention tunes its kernels when it is first used: its checks and timings come last.
PARTS = ("models", "peer", "checks", "timings")
CHECK_SECONDS, TIMING_SECONDS = 65.0, 30.0  # shares of the time, beside those of GROUPS
TRIAL_SHARE = 0.4  # of the time, at most, for the trial of our kernels where nobody has tried them
TINY_LENGTH = 128
INTERPRETER = (sys.executable, "-W", "ignore", "-m")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Four parts, in this order. models: trains models with random weights, made on the device (no\n"
        "download), GLM-4.7-Flash and Qwen3-30B-A3B at full size, Qwen3.5-35B-A3B and Trinity-Mini with fewer layers:\n"
        "peak memory, tokens per second, the optimiser's update. peer: GLM-4.7-Flash by transformers, PEFT and\n"
        "bitsandbytes. checks: CUDA's results against the CPU's on tiny models of every architecture. timings: single\n"
        "operations. Each model is built once, by a process of its own. Parts share the time: what one leaves is for\n"
        "those after it, so ask for one alone to give it all.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--part", nargs="+", choices=PARTS, help="these alone (default: all, the peer if its environment is there)")
    add("--only", metavar="WORDS", help="of models and peer: cases whose group or name contains WORDS")
    add("--device", default="cuda", help="cuda, cuda:1 … or cpu, which needs --tiny (default: cuda)")
    add("--tiny", action="store_true", help="tiny models, to try the command itself")
    add("--length", type=int, help="tokens of a sequence (default: each case's own)")
    add("--sequences", type=int, help="packed into a step (default: each case's own)")
    add("--steps", type=int, default=5, help="measured steps, after 2 others (default: %(default)s)")
    add("--memory-limit", type=float, metavar="GiB", help="let torch allocate no more, as on a smaller card")
    add("--minutes", type=float, default=MINUTES, help="when to stop (default: %(default)s)")
    add("--kernels", choices=("auto", "torch"), default="auto", help="as train.kernels; torch: of all cases")
    add("--profile", action="store_true", help="also list the kernels of one step of every case of models")
    add(
        "--peer-python", type=Path, metavar="FOLDER",
        help="the peer's virtual environment (default: .venv-peer/, which --part peer makes by pip)",
    )  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    return made


def require_device(name: str, tiny: bool) -> None:
    import torch

    if name == "cpu":
        if not tiny:
            raise NibbleError("--device cpu is for trying the command: add --tiny. The full models need a CUDA device.")
        return
    if not torch.cuda.is_available():
        raise NibbleError(
            f"benchmarks.gpu needs a CUDA device, and torch {torch.__version__} finds none.\n"
            "To try the command itself on a tiny model: python -m benchmarks.gpu --tiny --device cpu"
        )
    try:
        index = torch.device(name).index or 0
    except RuntimeError as error:
        raise NibbleError(f"--device {name}: there is no such device; choose cuda or cuda:<number>.") from error
    if index >= torch.cuda.device_count():
        raise NibbleError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.")


def header(device_name: str) -> str:
    import torch

    from parallel.device import device_name as maker_name

    device = torch.device(device_name)
    parts = [maker_name(device)]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        parts.append(f"{found.total_memory / GiB:.1f} GiB, compute capability {found.major}.{found.minor}")
        parts.append(f"CUDA {torch.version.cuda}")
    parts.append(f"torch {torch.__version__}")
    for library in ("triton", "bitsandbytes", "flash-linear-attention"):
        try:
            parts.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"no {library}")
    return "; ".join(parts)


def try_kernels(device: str, limit: float) -> None:
    """Afterwards the processes of the benchmark find it remembered. Prints what it says."""
    began = time.monotonic()
    for kind, text in lines_of([*INTERPRETER, "benchmarks.gpu_trial", device], limit):
        if text:
            print(f"the trial of the kernels: {text}" if kind == "end" else text, flush=True)
    print(f"kernels tried, or known from an earlier trial, in {time.monotonic() - began:.0f} s", flush=True)


def run_checks(device: str, kernels: str, limit: float) -> list[dict[str, Any]]:
    """Prints each check as it ends."""
    found = []
    for kind, text in lines_of([*INTERPRETER, "benchmarks.gpu_checks", device, kernels], limit):
        if kind == "line":
            check = json.loads(text)
        elif text:
            check = {"name": "the checks as a whole", "figure": text, "passed": False}
        else:
            break
        found.append(check)
        print(check_line(check), flush=True)
    return found


def run_timings(device: str, tiny: bool, limit: float) -> list[dict[str, Any]]:
    """What was measured before an error or the limit is kept."""
    command = [*INTERPRETER, "benchmarks.gpu_timings", device]
    found = []
    for kind, text in lines_of([*command, "tiny"] if tiny else command, limit):
        if kind == "line":
            found.append(json.loads(text))
        elif text:
            found.append({"name": "the timings as a whole", "note": text})
    return found


def interpreter_of_peer(arguments: argparse.Namespace) -> Path | None:
    """Of the environment that is given or made; None, with a line that says so, where it is neither."""
    if arguments.peer_python is not None:
        python = python_in(arguments.peer_python)
        if not python.exists():
            raise NibbleError(f"--peer-python {arguments.peer_python}: there is no virtual environment: no {python}.")
        return python
    if arguments.part is not None:
        instead = (
            "give the folder of an environment that was made elsewhere: --peer-python (benchmarks/README.md says how), "
            "or leave out the peer: --part models checks timings"
        )
        return peer_python(ROOT / ".venv-peer", requirements(), lambda line: print(line, flush=True), instead)
    folder, there = environment_of(ROOT / ".venv-peer", requirements())
    if there:
        return python_in(folder)
    print("peer: not measured, its environment is not there; --part peer makes it by pip, --peer-python takes another")
    return None


def chosen(groups: Sequence[Group], arguments: argparse.Namespace) -> list[Group]:
    """With the options of the command; groups of which --only leaves nothing are left out."""
    found = []
    for group in groups:
        changes: dict[str, Any] = {"kernels": "torch"} if arguments.kernels == "torch" else {}
        changes |= {"length": arguments.length or TINY_LENGTH} if arguments.length or arguments.tiny else {}
        changes |= {"sequences": arguments.sequences} if arguments.sequences else {}
        if "length" in changes or "sequences" in changes:
            changes["published"] = ""
        words = arguments.only or ""
        cases = [case for case in group.cases if words in group.name or words in case.name]
        distinct = dict.fromkeys(replace(case, **changes) for case in cases)
        if cases:
            found.append(replace(group, cases=tuple(distinct)))
    return found


def run_groups(arguments: argparse.Namespace, groups: Sequence[Group], peer: Path | None, limits: Any) -> list[Outcome]:
    """Prints each group's table as it ends."""
    what = "tiny models" if arguments.tiny else "random weights"
    limit = "" if arguments.memory_limit is None else f", no more than {arguments.memory_limit:g} GiB"
    print(f"\n{what}, bfloat16, recomputation on, adamw_8bit; memory in GiB{limit}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    outcomes = []
    for group in groups:
        request = Request(
            group, arguments.device, arguments.tiny, steps=arguments.steps,
            profile=arguments.profile, memory_limit=arguments.memory_limit,
        )  # fmt: skip
        if group.peer:
            command: tuple[str, ...] = (str(peer), "-W", "ignore", "-m", "benchmarks.gpu_peer")
            found = run_cases(command, request, next(limits), environment)
        else:
            found = run_cases([*INTERPRETER, "benchmarks.gpu_train"], request, next(limits))
        outcomes += found
        print("\n" + case_table(found), flush=True)
    return outcomes


def run(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    check_outputs({"--json": arguments.json}, [])
    require_device(arguments.device, arguments.tiny)
    head = header(arguments.device)
    print(head, flush=True)
    parts = arguments.part or PARTS
    peer = interpreter_of_peer(arguments) if "peer" in parts else None
    if arguments.part and "peer" in arguments.part:
        began = time.monotonic()  # making its environment is no part of the measurement
    if arguments.device != "cpu" and arguments.kernels == "auto" and set(parts) != {"peer"}:
        try_kernels(arguments.device, TRIAL_SHARE * 60 * arguments.minutes)
    groups = chosen([*(GROUPS if "models" in parts else ()), *([PEER] if peer else ())], arguments)
    shares = [group.seconds for group in groups]
    shares += [CHECK_SECONDS] * ("checks" in parts) + [TIMING_SECONDS] * ("timings" in parts)
    limits = deadlines(60 * arguments.minutes - (time.monotonic() - began), shares)
    outcomes = run_groups(arguments, groups, peer, limits) if groups else []
    checked: list[dict[str, Any]] = []
    if "checks" in parts:
        print("\nagainst the CPU, tiny models (error and tolerance)", flush=True)
        checked = run_checks(arguments.device, arguments.kernels, next(limits) - time.monotonic())
    timed: list[dict[str, Any]] = []
    if "timings" in parts:
        timed = run_timings(arguments.device, arguments.tiny, next(limits) - time.monotonic())
        what = "tiny sizes" if arguments.tiny else "8192 tokens in one document"
        print(f"\noperations, {what}, bfloat16\n{timing_table(timed)}\n", flush=True)
    if arguments.json:
        everything = {
            "device": head,
            "seconds": time.monotonic() - began,
            "cases": [asdict(outcome) | {"name": outcome.name} for outcome in outcomes],
            "checks": checked,
            "timings": timed,
        }
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    return 0 if conclude(outcomes, checked, timed) else 1


def conclude(outcomes: Sequence[Outcome], checked: Sequence[Any], timed: Sequence[Any]) -> bool:
    """Prints what several parts say together. Whether all of it is as it should be."""
    failed = [check for check in checked if check["passed"] is False]
    if checked:
        tried = [check for check in checked if check["passed"] is not None]
        skipped = f", {len(checked) - len(tried)} could not be tried here" if len(tried) < len(checked) else ""
        print(f"\n{len(tried) - len(failed)} of {len(tried)} checks passed{skipped}")
        for check in failed:
            print(check_line(check))
    if text := kernels_text(outcomes):
        print("\n" + text)
    beside, unequal = peer_table(outcomes)
    if beside:
        versions = next(outcome.result["versions"] for outcome in outcomes if outcome.peer and outcome.result)
        print("\nthe peer, " + ", ".join(f"{name} {version}" for name, version in versions.items()))
        there = {f"{name}=={version.partition('+')[0]}" for name, version in versions.items()}
        if other := [
            wanted for wanted in requirements() if wanted.partition("==")[0] in versions and wanted not in there
        ]:
            print(f"not the versions that are meant: {', '.join(other)}")
        print("\n".join([*unequal, beside]))
    broken = any(timing["note"] not in ("", *NOT_HERE) for timing in timed)
    return not (failed or broken or unequal or any(outcome.result is None for outcome in outcomes))


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
