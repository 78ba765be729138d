"""`python -m benchmarks.step`: a training step on CPU beside the peer's, in the same run."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import ensure_checkpoint, parameters_of
from benchmarks.peer_env import BITSANDBYTES, peer_python, requirements
from benchmarks.report import Result, check_equal_work, profile_text, step_table, tokens_per_second, verdict
from benchmarks.setting import DEFAULT, RANK, SETTINGS, Request
from quant.common.devices import allowed_cores
from quant.common.errors import NibbleError
from quant.common.files import check_outputs
from quant.common.terminal import print_error

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("grouped_mm", "eager")
WORDS = ("autocast", "repaired")
NATIVE = "nibble"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="Tokens per second and peak memory of a QLoRA step on CPU, beside transformers, PEFT and\n"
        "bitsandbytes in an environment of their own (.venv-peer/, made on first use by pip, which reads\n"
        "PIP_INDEX_URL and its like).\n"
        "Every measurement is a process of its own; repetitions of the sides alternate. Run it on an idle machine.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--arch", choices=sorted(SETTINGS), default=DEFAULT, help="default: %(default)s")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: %(default)s")
    made.add_argument("--threads", type=_positive, help="of both sides (default: the physical cores)")
    made.add_argument("--repetitions", type=_positive, default=3, help="of every side (default: %(default)s)")
    made.add_argument("--steps", type=_positive, default=6, help="measured steps of each (default: %(default)s)")
    made.add_argument("--warmup", type=int, default=2, help="steps before them (default: %(default)s)")
    made.add_argument("--tokens", type=_positive, default=1024, help="of a step (default: %(default)s)")
    made.add_argument(
        "--backends", type=_backends, default=list(BACKENDS), metavar="LIST",
        help="the peer's: grouped_mm, eager; with +autocast (bfloat16 autocast) or +repaired (both of its expert "
        "adapters learn, where otherwise one stays as it is); default: grouped_mm,eager",
    )  # fmt: skip
    made.add_argument(
        "--peer-bitsandbytes", default=BITSANDBYTES, metavar="VERSION", help="of the peer (default: %(default)s)"
    )
    made.add_argument("--native-only", action="store_true", help="measure this side alone")
    made.add_argument("--profile", action="store_true", help="also say where the native step's time goes")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    made.add_argument(
        "--work", type=Path, default=ROOT / "outputs" / "benchmarks", metavar="DIR", help="for the random checkpoint"
    )
    made.add_argument("--tiny", action="store_true", help="a model of half a million parameters, to try the command")
    return made


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return number


def _backends(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    for spec in found:
        name, *words = spec.split("+")
        if name not in BACKENDS or not set(words) <= set(WORDS):
            raise argparse.ArgumentTypeError(
                f"{spec!r}: choose {' or '.join(BACKENDS)}, alone or with +{' or +'.join(WORDS)}"
            )
    return found


def physical_cores(cpuinfo: str, allowed: int) -> int:
    """Cores that share no hyperthread, from the text of /proc/cpuinfo; no more than `allowed` processors."""
    cores = set()
    for block in cpuinfo.split("\n\n"):
        pairs = (line.partition(":") for line in block.splitlines())
        fields = {name.strip(): value.strip() for name, _, value in pairs}
        if "core id" in fields:
            cores.add((fields.get("physical id", "0"), fields["core id"]))
    return min(len(cores) or allowed, allowed)


def default_threads() -> int:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return physical_cores(text, allowed_cores())


def measured_apart(command: Sequence[str], what: str, threads: int, environment: Mapping[str, str]) -> Result:
    """The JSON of the last line that `command` prints, run on `threads` threads in a process of its own.

    Raises NibbleError, naming `what`, with the last lines of one that fails.
    """
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env={**environment, **limits}, capture_output=True, text=True, check=False)
    if done.returncode:
        end = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise NibbleError(f"{what} failed with exit code {done.returncode}:\n{end}")
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def worker(python: Path, module: str, request: Request) -> Result:
    """One measurement of a side; see `measured_apart`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return measured_apart([str(python), "-m", module, request.dumps()], module, request.threads, environment)


def header(arguments: argparse.Namespace, config: dict[str, Any], threads: int) -> list[str]:
    import torch

    from parallel.device import device_name
    from quant.products import product_dtype

    cpu = torch.device("cpu")
    units = product_dtype(cpu, torch.bfloat16) == torch.bfloat16
    versions = "  ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "bitsandbytes"))
    lines = [
        f"cpu      {device_name(cpu)}; bfloat16 units: {'yes' if units else 'no'}; {threads} threads; load average "
        + ", ".join(f"{load:.1f}" for load in os.getloadavg()),
        f"nibble   {versions}",
    ]
    if not arguments.native_only:
        lines.append("peer     " + "  ".join(requirements(arguments.peer_bitsandbytes)).replace("==", " "))
    lines.append(
        f"model    {arguments.arch}, {parameters_of(config):,} parameters, nf4 with double quantisation, "
        f"LoRA of rank {RANK} on attention and experts"
    )
    lines.append(
        f"step     {arguments.tokens} tokens, {arguments.dtype}, recomputation on, AdamW; "
        f"{arguments.warmup} steps to warm up, {arguments.steps} measured, {arguments.repetitions} repetitions"
    )
    if arguments.dtype == "bfloat16" and not units:
        lines.append(
            "note     this CPU emulates bfloat16 products. nibble widens them to float32 (exactly), the peer doesn't:\n"
            "         most of the ratio is that. --dtype float32 compares the two without it."
        )
    if os.getloadavg()[0] > 0.25 * threads:
        lines.append("note     THE MACHINE IS BUSY: the figures are too low and uneven.")
    return lines


def measure(
    arguments: argparse.Namespace, config: dict[str, Any], threads: int
) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """Every side's repetitions, the native side first; and of sides of the peer that failed, why."""
    say = _say
    python = None
    if not arguments.native_only:
        python = peer_python(ROOT / ".venv-peer", requirements(arguments.peer_bitsandbytes), say)
    checkpoint = ensure_checkpoint(config, arguments.work)
    native = Request(
        str(checkpoint.resolve()),
        arch=arguments.arch,
        dtype=arguments.dtype,
        tokens=arguments.tokens,
        warmup=arguments.warmup,
        steps=arguments.steps,
        threads=threads,
    )
    plan = [(NATIVE, Path(sys.executable), "benchmarks.step_native", native)]
    if python is not None:
        for backend in arguments.backends:
            plan.append((f"peer {backend}", python, "benchmarks.step_peer", replace(native, backend=backend)))
    sides: dict[str, list[Result]] = {name: [] for name, *_ in plan}
    failed: dict[str, str] = {}
    for repetition in range(arguments.repetitions):
        turn = repetition % len(plan)  # another one goes first each time
        for name, interpreter, module, request in plan[turn:] + plan[:turn]:
            if name in failed:
                continue
            last = name == NATIVE and repetition == arguments.repetitions - 1
            try:
                result = worker(interpreter, module, replace(request, profile=arguments.profile and last))
            except NibbleError as error:
                if name == NATIVE:
                    raise
                failed[name] = str(error)
                say(f"repetition {repetition + 1}/{arguments.repetitions}  {name}: failed")
                continue
            sides[name].append(result)
            speed = tokens_per_second(result, arguments.tokens)
            say(f"repetition {repetition + 1}/{arguments.repetitions}  {name}: {speed:,.0f} tokens/s")
    return {name: results for name, results in sides.items() if name not in failed}, failed


def conclusions(sides: dict[str, list[Result]], dtype: str, tokens: int, tiny: bool = False) -> list[str]:
    """Checks that the sides did the same work, and what the reader must know about it."""
    native = sides[NATIVE][0]
    lines = []
    for name, (first, *_) in sides.items():
        if name != NATIVE:
            check_equal_work(native, first, name, dtype)
        lines.append(
            f"{name}: first loss {first['losses'][0]:.4f}, gradient norm {first['grad_norms'][0]:.3f}; "
            f"weights {first['frozen_bytes']:,} bytes; trains {first['trainable']:,} parameters in "
            f"{first['trainable_dtype']}; {first['moved']} of {first['tensors']} trained tensors changed"
        )
        if "unmoved" in first["notes"] and first["notes"]["unmoved"]:
            lines.append(
                "  It leaves the LoRA of one of the two expert tensors without effect and gradient, and does that much "
                "less work; +repaired measures it with both."
            )
    if len(sides) > 1 and not tiny:
        lines += verdict(sides, tokens)
    return lines


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    config = SETTINGS[arguments.arch].sized(arguments.tiny)
    threads = arguments.threads or default_threads()
    try:
        check_outputs({"--json": arguments.json}, [])
        if arguments.profile and arguments.arch != DEFAULT:
            raise NibbleError(f"--profile knows the parts of {DEFAULT} only; leave out --arch or --profile.")
        head = header(arguments, config, threads)
        print("\n".join(head), flush=True)
        sides, failed = measure(arguments, config, threads)
        profile = sides[NATIVE][-1]["notes"].pop("profile", None)
        if profile is not None:
            print("\nwhere the native step's time goes\n\n" + profile_text(profile))
        if arguments.json:
            everything = {
                "header": head,
                "tokens": arguments.tokens,
                "sides": sides,
                "failed": failed,
                "profile": profile,
            }
            arguments.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        print("\n" + "\n".join(conclusions(sides, arguments.dtype, arguments.tokens, arguments.tiny)))
        print("\npeaks are above the imports\n" + step_table(sides, arguments.tokens))
        for name, reason in failed.items():
            last = reason.splitlines()[-1]
            print(f"\n{name} can't train {arguments.arch} in this setting, so nothing is compared with it: {last}")
    except NibbleError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
