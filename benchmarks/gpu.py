"""`python -m benchmarks.gpu`: CUDA paths against the CPU reference, then operations and models: memory and speed."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.command import run_command
from benchmarks.gpu_cases import CASES, NOT_HERE, Case, NamedCase
from benchmarks.report import table
from quant.common.errors import NibbleError
from quant.common.files import check_outputs

ROOT = Path(__file__).resolve().parent.parent
GiB = 1 << 30
MINUTES = 7.5  # the command's default limit: it ends within 8
# flash-linear-attention tunes its kernels when it is first used: those checks and timings come last.
CHECK_SECONDS = 240.0
TIMING_SECONDS = 90.0
CASE_SECONDS = 120.0
# A case that can't be built and warmed up in this time isn't started.
LEAST_SECONDS = 20.0
OUT_OF_MEMORY = "out of memory"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="First compares CUDA's results with the CPU's on tiny models of every architecture. Then times\n"
        "single operations, and trains models with random weights, made on the device (no download): GLM-4.7-Flash at\n"
        "full size, Qwen3.5-35B-A3B and Trinity-Mini with fewer layers: peak memory and tokens per second.\n"
        "Every case is a process of its own: one that runs out of memory doesn't hide the others.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--device", default="cuda", help="cuda, cuda:1 … or cpu, which needs --tiny (default: cuda)")
    made.add_argument("--tiny", action="store_true", help="tiny models, to try the command itself")
    made.add_argument(
        "--only", metavar="WORDS", help="cases whose name contains WORDS; or 'checks' or 'timings' for these alone"
    )
    made.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default: %(default)s)")
    made.add_argument("--sequences", type=int, default=2, help="packed into a step (default: %(default)s)")
    made.add_argument("--steps", type=int, default=5, help="measured steps, after 2 others (default: %(default)s)")
    made.add_argument(
        "--memory-limit", type=float, metavar="GiB", help="let torch allocate no more, as on a smaller card"
    )
    made.add_argument("--minutes", type=float, default=MINUTES, help="when to stop (default: %(default)s)")
    made.add_argument("--kernels", choices=("auto", "torch"), default="auto", help="as train.kernels (default: auto)")
    made.add_argument("--profile", action="store_true", help="also list the kernels of one step of every case")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    return made


@dataclass
class Outcome:
    """A case's result, or why there is none."""

    name: str
    published: str
    result: dict[str, Any] | None
    reason: str = ""


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


def lines_of(command: Sequence[str], limit: float) -> Iterator[tuple[str, str]]:
    """Run a command: ("line", text) for each line of its standard output as it comes, and last ("end", reason).

    reason is "" for a clean end, otherwise what happened; the command is killed after `limit` seconds.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    out: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []
    assert process.stdout is not None and process.stderr is not None

    def read(stream: Any) -> None:
        for line in stream:
            out.put(line.rstrip("\n"))
        out.put(None)

    threads = [
        threading.Thread(target=read, args=(process.stdout,), daemon=True),
        threading.Thread(target=lambda stream: said.extend(stream), args=(process.stderr,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + limit
    try:
        while True:
            try:
                line = out.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                yield "end", f"stopped after {limit:.0f} s"
                return
            if line is None:
                break
            yield "line", line
        code = process.wait()
        threads[1].join(timeout=60)
        yield "end", "" if code == 0 else _reason(code, said)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _reason(code: int, said: Sequence[str]) -> str:
    """The last line of a traceback, or the exit code."""
    text = "".join(said)
    if "OutOfMemoryError" in text or "CUDA out of memory" in text:
        return OUT_OF_MEMORY
    lines = [line.strip() for line in said if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(("File", "raise"))]
    return (errors or lines or [f"exit code {code}"])[-1][:160]


def run_checks(device: str, kernels: str, limit: float) -> list[dict[str, Any]]:
    """Prints each check as it ends."""
    found = []
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_checks", device, kernels]
    for kind, text in lines_of(command, limit):
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
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_timings", device]
    found = []
    for kind, text in lines_of([*command, "tiny"] if tiny else command, limit):
        if kind == "line":
            found.append(json.loads(text))
        elif text:
            found.append({"name": "the timings as a whole", "note": text})
    return found


def timing_table(found: Sequence[dict[str, Any]]) -> str:
    rows = []
    for timing in found:
        if timing["note"]:
            rows.append([timing["name"], "", "", timing["note"]])
        else:
            peak = f"{timing['peak'] / (1 << 20):,.0f}" if timing["peak"] else ""
            rows.append([timing["name"], f"{timing['forward']:.2f}", f"{timing['backward']:.2f}", peak])
    return table(["operation", "forward ms", "backward ms", "peak MiB above the inputs"], rows)


def check_line(check: dict[str, Any]) -> str:
    word = {True: "pass", False: "FAIL", None: "skip"}[check["passed"]]
    return f"{word}  {check['name']}: {check['figure']}"


def run_case(named: NamedCase, case: Case, limit: float) -> Outcome:
    last = ""
    for kind, text in lines_of([sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_train", case.dumps()], limit):
        if kind == "line":
            last = text
        elif text:
            return Outcome(named.name, named.published, None, text)
    return Outcome(named.name, named.published, json.loads(last))


def case_table(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        found = outcome.result
        if found is None:
            short = "out of memory" if outcome.reason == OUT_OF_MEMORY else "no result"
            rows.append([outcome.name, "", "", short, "", outcome.published, "", "", ""])
            continue
        rows.append(
            [
                outcome.name,
                f"{found['trainable'] / 1e6:,.1f}",
                f"{found['weights'] / GiB:.2f}",
                f"{found['peak'] / GiB:.2f}",
                f"{found['reserved'] / GiB:.2f}",
                outcome.published,
                f"{found['tokens_per_second']:,.0f}",
                f"{min(found['seconds']):.2f} to {max(found['seconds']):.2f}",
                f"{found['busiest_expert']:.1f}",
            ]
        )
    head = ["case", "trained M", "weights", "peak", "reserved", "peer's", "tokens/s", "s per step", "busiest expert"]
    return table(head, rows)


def kernels_text(outcomes: Sequence[Outcome]) -> str:
    blocks = []
    for outcome in outcomes:
        kernels = (outcome.result or {}).get("kernels")
        if kernels:
            rows = [[name[:90], f"{ms:,.1f}", f"{calls:,}"] for name, ms, calls in kernels]
            blocks.append(table([outcome.name, "ms", "calls"], rows))
    return "\n\n".join(blocks)


def run(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    check_outputs({"--json": arguments.json}, [])
    require_device(arguments.device, arguments.tiny)
    head = header(arguments.device)
    print(head, flush=True)
    found: list[dict[str, Any]] = []
    if arguments.only is None or arguments.only == "checks":
        print("\nagainst the CPU, tiny models (error and tolerance)", flush=True)
        found = run_checks(arguments.device, arguments.kernels, CHECK_SECONDS)
    timed: list[dict[str, Any]] = []
    if arguments.only is None or arguments.only == "timings":
        timed = run_timings(arguments.device, arguments.tiny, TIMING_SECONDS)
        what = "tiny sizes" if arguments.tiny else "8192 tokens in one document"
        print(f"\noperations, {what}, bfloat16\n{timing_table(timed)}\n", flush=True)
    outcomes: list[Outcome] = []
    for named in CASES:
        if arguments.only is not None and arguments.only not in named.name:
            continue
        left = 60 * arguments.minutes - (time.monotonic() - began)
        if left < LEAST_SECONDS:
            outcomes.append(
                Outcome(named.name, named.published, None, f"not run: {arguments.minutes:g} minutes are over")
            )
            continue
        case = replace(
            named.case,
            device=arguments.device,
            tiny=arguments.tiny,
            length=arguments.length,
            sequences=arguments.sequences,
            steps=arguments.steps,
            profile=arguments.profile,
            kernels=arguments.kernels,
            memory_limit=arguments.memory_limit,
        )
        outcome = run_case(named, case, min(left, CASE_SECONDS))
        outcomes.append(outcome)
        said = outcome.reason or f"{outcome.result['tokens_per_second']:,.0f} tokens/s"  # type: ignore[index]
        print(f"{time.monotonic() - began:4.0f} s  {named.name}: {said}", file=sys.stderr, flush=True)
    if arguments.json:
        everything = {
            "device": head,
            "checks": found,
            "timings": timed,
            "cases": [vars(outcome) for outcome in outcomes],
        }
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    failed = [check for check in found if check["passed"] is False]
    if found:
        tried = [check for check in found if check["passed"] is not None]
        skipped = f", {len(found) - len(tried)} could not be tried here" if len(tried) < len(found) else ""
        print(f"\n{len(tried) - len(failed)} of {len(tried)} checks passed{skipped}")
        for check in failed:
            print(check_line(check))
    if text := kernels_text(outcomes):
        print("\n" + text)
    if outcomes:
        what = "tiny models" if arguments.tiny else "GLM-4.7-Flash where no other model is named, random weights"
        limit = "" if arguments.memory_limit is None else f", no more than {arguments.memory_limit:g} GiB"
        tokens = f"{arguments.sequences} × {arguments.length} tokens"
        print(f"\n{what}: {tokens}, bfloat16, recomputation on, adamw_8bit; memory in GiB{limit}")
        print(case_table(outcomes))
    broken = any(timing["note"] not in ("", *NOT_HERE) for timing in timed)
    return 1 if failed or broken or any(outcome.result is None for outcome in outcomes) else 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
