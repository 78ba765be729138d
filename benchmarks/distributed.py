"""`python -m benchmarks.distributed`: what a model cut over several processes takes and moves, by gloo on CPU.

What is to be expected, for N processes (parallel.shard N) that hold P packed bytes of frozen weights and L of LoRA:

- held: P / N each.
- gathered from the others, per process and micro-batch: (N-1)/N of the layers' bytes twice, since recomputation and
  backward pass need them once more; (N-1)/N of embedding and head once. Never the dense bytes, which are 3.9 times
  those of nf4 with double quantisation in bfloat16. LoRA travels with its layer, in float32 4 bytes a value.
- reduced: (N-1)/N · L, once per micro-batch; nothing for frozen weights.
- with --expert M the experts of a layer are gathered among N/M processes only, so P_experts/M · (1 - M/N) bytes each
  time; in return every layer sends tokens five times (parallel/exchange.py): 5 · T·K·H values, of which (M-1)/M leave
  the process if the routing is even.
- peak host memory of loading: the share, one tensor, and the 16 MiB for which a file stays mapped.
- speed: gloo on one machine copies through memory that the computation needs too. It shows volume, not speed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.checkpoint import ensure_checkpoint, parameters_of
from benchmarks.report import MiB, table
from benchmarks.setting import DEFAULT, RANK, SETTINGS
from benchmarks.step import ROOT, _positive, default_threads
from quant.common.errors import NibbleError
from quant.common.files import check_outputs
from quant.common.terminal import print_error

LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # relative: N processes add up in another order than one

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one group of processes does. kind: load each of `sources` (hub and converted folder), train from the last,
    or both. micro_batches: of `tokens` each, per process and step. threads: of each process.
    """

    kind: Literal["load", "train", "both"]
    sources: tuple[str, ...]
    processes: int
    expert: int
    storage: str
    dtype: str
    tokens: int
    micro_batches: int
    warmup: int
    steps: int
    threads: int

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Job:
        return Job(**json.loads(text))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed",
        description="Memory per process, bytes moved and speed of a LoRA step cut over several processes of this\n"
        "machine (gloo, CPU), beside the same step in one process.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--processes", type=_positive, default=4, metavar="N", help="default: %(default)s")
    made.add_argument("--expert", type=_positive, default=1, metavar="M", help="parallel.expert (default: %(default)s)")
    made.add_argument("--arch", choices=sorted(SETTINGS), default=DEFAULT, help="default: %(default)s")
    made.add_argument("--storage", choices=("nf4", "fp4", "int8", "none"), default="nf4", help="default: %(default)s")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="default: %(default)s")
    made.add_argument("--tokens", type=_positive, default=512, help="per process and step (default: %(default)s)")
    made.add_argument("--steps", type=_positive, default=3, help="measured steps (default: %(default)s)")
    made.add_argument("--warmup", type=_positive, default=1, help="steps before them (default: %(default)s)")
    made.add_argument("--threads", type=_positive, help="of all processes together (default: the physical cores)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    made.add_argument(
        "--work", type=Path, default=ROOT / "outputs" / "benchmarks", metavar="DIR", help="for the random checkpoint"
    )
    made.add_argument("--tiny", action="store_true", help="a model of half a million parameters, to try the command")
    return made


def jobs(arguments: argparse.Namespace, hub: Path, converted: Path, threads: int) -> dict[str, Job]:
    """What is measured: loading, training on all processes, and the same steps on one with all the threads."""
    processes, sources = arguments.processes, (str(hub.resolve()), str(converted.resolve()))
    train = Job(
        "train", sources, processes, arguments.expert, arguments.storage, arguments.dtype, arguments.tokens, 1,
        arguments.warmup, arguments.steps, max(1, threads // processes),
    )  # fmt: skip
    alone = replace(train, processes=1, expert=1, micro_batches=processes, threads=threads)
    if arguments.tiny:  # only tried: half of the processes will do
        return {"train": replace(train, kind="both"), "alone": alone}
    return {"load": replace(train, kind="load"), "train": train, "alone": alone}


def prepare(arguments: argparse.Namespace, config: dict[str, Any]) -> tuple[Path, Path]:
    """The benchmark's checkpoint in the hub's format, and converted; both are made once.

    The converted one doesn't lie beside the other, where loading would find it.
    """
    import torch

    from models.checkpoint.conversion import convert
    from quant.storage import StorageSpec

    hub = ensure_checkpoint(config, arguments.work)
    name = f"{hub.name}-{arguments.storage}-{arguments.dtype}"
    converted: Path = arguments.work / "converted" / name
    convert(hub, converted, StorageSpec(arguments.storage), getattr(torch, arguments.dtype))
    return hub, converted


def launch(job: Job, timeout: float = 3600) -> list[Result]:
    """Run a job in its processes, with what torchrun would set; what each found, by rank.

    Raises NibbleError with the last lines of the first that fails, or when it isn't done after `timeout` seconds.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        running: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(job.processes):
                with Path(folder, f"{rank}.err").open("wb") as errors:
                    command = [sys.executable, "-m", "benchmarks.distributed_process", job.dumps(), f"{folder}/{rank}"]
                    environment = os.environ | _environment(job, rank, port)
                    started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=errors, stderr=errors)
                running.append(started)
            _wait(running, Path(folder), time.monotonic() + timeout)
        finally:
            for process in running:
                process.kill()
                process.wait()
        return [json.loads(Path(folder, str(rank)).read_text(encoding="utf-8")) for rank in range(job.processes)]


def _environment(job: Job, rank: int, port: int) -> dict[str, str]:
    found = {
        "RANK": rank, "WORLD_SIZE": job.processes, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": job.threads, "MKL_NUM_THREADS": job.threads, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": 1,
    }  # fmt: skip
    if job.kind != "train":
        # glibc then gives freed memory back at once. Else one load would fill what another has left behind.
        found["MALLOC_MMAP_THRESHOLD_"] = 128 * 1024
    return {name: str(value) for name, value in found.items()}


def _wait(running: list[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    while (codes := [process.poll() for process in running]) != [0] * len(running):
        for rank, code in enumerate(codes):
            if code or time.monotonic() > deadline:
                said = (folder / f"{rank}.err").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                what = f"failed with exit code {code}" if code else "is not done in time"
                raise NibbleError("\n".join([f"process {rank} of {len(codes)} {what}:", *said[-8:]]))
        time.sleep(0.05)


def check_equal_work(found: dict[str, list[Result]], dtype: str) -> None:
    """Raises NibbleError unless one process computed the same losses as all of them, and what was gathered is what the
    plan says."""
    ours, alone = found["train"][0]["losses"], found["alone"][0]["losses"]
    for step, (a, b) in enumerate(zip(ours, alone, strict=False)):  # the last one is recorded, not timed
        if not abs(a - b) <= LOSS_TOLERANCE[dtype] * abs(b):
            raise NibbleError(f"step {step + 1}: the loss of {len(found['train'])} processes is {a}, of one {b}.")
    for rank, result in enumerate(found["train"]):
        gathered = result["gathered_forward"] + result["gathered_backward"]
        if abs(gathered - result["planned"]) > 0.01 * result["planned"]:
            raise NibbleError(
                f"process {rank} gathered {gathered:,} bytes in a step, by parallel/plan.py {result['planned']:,}."
            )


def tables(found: dict[str, list[Result]], job: Job) -> str:
    """Of several processes the one that has most; speed is of all together."""
    train, load = found["train"], found.get("load", found["train"])

    def most(results: list[Result], name: str) -> int:
        return max(int(result[name]) for result in results)

    held, share = most(train, "held"), train[0]["total"] / job.processes
    memory = [
        ["frozen weights held", _mib(held), _mib(share), f"{held / share:.3f}"],
        ["  after the steps, with all that is left alive", _mib(most(train, "alive")), _mib(share), ""],
    ]
    for index, source in enumerate(("hub", "converted")):
        worst = max((result["loads"][index] for result in load), key=lambda each: each["peak"] - each["share"])
        expected = worst["share"] + worst["largest"] + worst["mapped"]
        name = f"peak of loading, {source} checkpoint"
        memory.append([name, _mib(worst["peak"]), _mib(expected), f"{worst['peak'] / expected:.3f}"])
    gathered = max(train, key=lambda result: result["gathered_forward"] + result["gathered_backward"])
    total = gathered["gathered_forward"] + gathered["gathered_backward"]
    moved = [
        ["gathered", _mib(total), _mib(gathered["planned"])],
        ["  in the forward pass", _mib(gathered["gathered_forward"]), ""],
        ["  in the backward pass", _mib(gathered["gathered_backward"]), ""],
        ["  if frozen weights were gathered as bfloat16", "", _mib(gathered["dense"])],
        ["gradients reduced and scattered", _mib(most(train, "reduced")), ""],
    ]
    if job.expert > 1:
        moved.append(["tokens to and from experts", _mib(most(train, "exchanged")), ""])
    tokens = job.tokens * job.processes
    ours = tokens / max(result["seconds"] for result in train)
    alone = tokens / found["alone"][0]["seconds"]
    speed = [
        [f"{job.processes} processes × {job.threads} threads", f"{ours:,.0f}", f"{ours / alone:.2f}"],
        [f"1 process × {found['alone'][0]['threads']} threads", f"{alone:,.0f}", ""],
    ]
    return "\n\n".join(
        [
            table(["memory of a process, MiB", "measured", "expected", "ratio"], memory),
            table(["moved per process and step, MiB", "measured", "by the plan"], moved),
            table(["speed", "tokens/s", "ratio"], speed),
        ]
    )


def _mib(nbytes: float) -> str:
    return f"{nbytes / MiB:,.2f}"


def header(arguments: argparse.Namespace, config: dict[str, Any], threads: int) -> list[str]:
    import torch

    from parallel.device import device_name

    lines = [
        f"cpu      {device_name(torch.device('cpu'))}; {threads} threads in all; torch {torch.__version__}; "
        "load average " + ", ".join(f"{load:.1f}" for load in os.getloadavg()),
        f"model    {arguments.arch}, {parameters_of(config):,} parameters, {arguments.storage}, LoRA of rank {RANK} in "
        "float32 on attention and experts",
        f"cut      over {arguments.processes} processes, parallel.expert {arguments.expert}; gloo on one machine: it "
        "shows volume, not speed",
        f"step     {arguments.tokens} tokens in each process, {arguments.dtype}, recomputation on, AdamW; "
        f"{arguments.warmup} to warm up, {arguments.steps} measured",
    ]
    if os.getloadavg()[0] > 0.25 * threads:
        lines.append("note     THE MACHINE IS BUSY: times mean nothing; bytes are right all the same.")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    config = SETTINGS[arguments.arch].sized(arguments.tiny)
    threads = arguments.threads or default_threads()
    try:
        check_outputs({"--json": arguments.json}, [])
        if arguments.processes % arguments.expert:
            raise NibbleError(f"--expert {arguments.expert} doesn't divide --processes {arguments.processes}.")
        head = header(arguments, config, threads)
        print("\n".join(head), flush=True)
        planned = jobs(arguments, *prepare(arguments, config), threads)
        found = {name: launch(job) for name, job in planned.items()}
        if arguments.json:
            text = json.dumps({"header": head, "found": found}, indent=1)
            arguments.json.write_text(text + "\n", encoding="utf-8")
        check_equal_work(found, arguments.dtype)
        print("\n" + tables(found, planned["train"]))
    except NibbleError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
