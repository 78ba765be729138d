"""On a machine with CUDA: are its paths right, and what does full-size GLM-4.7-Flash take? Nothing is downloaded.

    python -m benchmarks.gpu

First the CUDA paths are compared with the CPU reference (benchmarks/gpu_checks.py). Then, each in a process of its
own, the full-size model with random packed weights is trained for a few steps of 2 × 2048 tokens with recomputation and
8-bit AdamW. Ends within 8 minutes; a case that fails or has no time left says so, and the table comes last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from parallel.device import choose_device, device_name
from quant.errors import NibbleError

from .gpu_case import Case

LIMIT_SECONDS = 460.0  # for everything, so that the whole command ends within 8 minutes
CHECKS_SECONDS = 150.0
CASE_SECONDS = 110.0
GIB = 2**30

BOTH = ("attention", "experts")
# Peer: axolotl's own figures, examples/glm47-flash/README.md: same sequence length, micro-batch, rank and optimiser.
PEER = {
    "nf4, LoRA on attention": "~24 GiB",
    "nf4, LoRA on attention and experts": "~34 GiB",
    "int8, LoRA on attention and experts": "out of memory on 48 GB",
}
CASES = (
    Case("nf4, LoRA on attention", "nf4", ("attention",)),
    Case("nf4, LoRA on attention and experts", "nf4", BOTH),
    Case("nf4, LoRA on attention and experts, bfloat16 LoRA", "nf4", BOTH, adapter_dtype="bfloat16"),
    Case("int8, LoRA on attention and experts", "int8", BOTH),
)


@dataclass(frozen=True)
class Outcome:
    """What a subprocess left: its JSON lines, or why there are none."""

    results: list[dict[str, Any]]
    failure: str = ""


def run_module(module: str, argument: str, seconds: float) -> Outcome:
    """Runs `python -m module argument`, at most so long; standard error passes through."""
    command = [sys.executable, "-m", module, argument]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as expired:
        return Outcome(json_lines(_text(expired.stdout)), f"stopped after {seconds:.0f} s")
    sys.stderr.write(done.stderr)
    failure = ""
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.strip()]
        failure = reasons[-1][:160] if reasons else f"exit code {done.returncode}"
    return Outcome(json_lines(done.stdout), failure)


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def json_lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            found.append(json.loads(line))
    return found


def check_line(result: dict[str, Any]) -> str:
    figure = f"error {result['error']:.1e}" if "error" in result else result.get("raised", "")
    return (
        f"{'pass' if result['passed'] else 'FAIL'}  {result['check']:<62} {figure} (at most {result['tolerance']:.0e})"
    )


def table(rows: Sequence[tuple[Case, Outcome]], passed: int, failed: int, unfinished: str) -> str:
    """The closing table: checks in one line, then a line per case."""
    lines = [f"checks of CUDA paths: {passed} passed, {failed} failed{f'; {unfinished}' if unfinished else ''}", ""]
    header = ("case, rank 32, 2 × 2048 tokens", "weights", "peak", "reserved", "tokens/s", "peer's published peak")
    cells = [header]
    for case, outcome in rows:
        peer = PEER.get(case.name, "–")
        if not outcome.results:
            cells.append((case.name, "–", "–", "–", outcome.failure or "no result", peer))
            continue
        r = outcome.results[-1]
        sizes = (f"{r[key] / GIB:.2f} GiB" for key in ("weights_bytes", "peak_bytes", "reserved_bytes"))
        weights, peak, reserved = sizes
        cells.append((case.name, weights, peak, reserved, f"{r['tokens_per_second']:,.0f}", peer))
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 … (default: cuda); cpu only with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the command itself")
    parser.add_argument("--skip-checks", action="store_true", help="measure only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        return benchmark(options)
    except NibbleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def benchmark(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    if device.type != "cuda" and not options.tiny:
        raise NibbleError(
            "benchmarks.gpu needs a CUDA device: the full-size model would take hours on a CPU.\n"
            "Use --device cuda, or try the command at a small size: --tiny --device cpu."
        )
    deadline = time.monotonic() + LIMIT_SECONDS
    print(f"{device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)

    checks = Outcome([])
    if not options.skip_checks:
        checks = run_module("benchmarks.gpu_checks", str(device), CHECKS_SECONDS)
        for result in checks.results:
            print(check_line(result), flush=True)
    failed = sum(not result["passed"] for result in checks.results)

    rows: list[tuple[Case, Outcome]] = []
    for case in CASES:
        case = replace(case, device=str(device), tiny=options.tiny, length=64 if options.tiny else case.length)
        left = min(CASE_SECONDS, deadline - time.monotonic())
        outcome = run_module("benchmarks.gpu_case", case.dumps(), left) if left > 20 else Outcome([], "no time left")
        print(f"{case.name}: {outcome.failure or json.dumps(outcome.results[-1:])}", flush=True)
        rows.append((case, outcome))

    unfinished = checks.failure if checks.failure and not failed else ""
    print("\n" + table(rows, len(checks.results) - failed, failed, unfinished), flush=True)
    if options.json:
        everything = {
            "device": device_name(device),
            "torch": torch.__version__,
            "checks": checks.results,
            "cases": [{"name": case.name, "results": o.results, "failure": o.failure} for case, o in rows],
        }
        options.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    complete = not failed and not checks.failure and all(outcome.results for _, outcome in rows)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
