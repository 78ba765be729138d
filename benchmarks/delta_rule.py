"""`python -m benchmarks.delta_rule`: the gated delta rule on CPU beside transformers' torch path, in the same run.

What the arithmetic asks for, with chunks of 64 tokens and heads of width 128: in one chunk of one head the products of
two [64, 128] matrices and of [64, 64] by [64, 128] are 1.05 MFLOP each (five of them: k·k, q·k, T v, T k, P V'), those
with a state 2.1 MFLOP (three: erase, write, read), so 11.5 MFLOP forward. 8192 tokens of 32 heads are 4096 such
chunks: 47 GFLOP forward, and 163 GFLOP with the backward pass, which computes 8 of those units again and has 19 of its
own. At 200 GFLOP/s in float32, what four cores with AVX2 reach in one large product, that is 0.8 s. Memory cannot be
less than the output, its gradient and the gradients of query, key and value: 5 × 128 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.measure import CPU, reset_peak_memory, resident_bytes
from benchmarks.report import MiB, Result, table
from benchmarks.step import default_threads, measured_apart
from parallel.device import device_name, peak_memory_bytes
from quant.common.errors import NibbleError
from quant.common.terminal import print_error

NATIVE, PEER = "nibble", "transformers"
TIME_TARGET, MEMORY_TARGET = 1 / 8, 1 / 4  # of the peer's
EQUAL = 1e-4  # relative difference allowed between the two sides' norms


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.delta_rule",
        description="Seconds and peak memory of the gated delta rule, forward and backward in float32 on CPU, beside\n"
        "transformers' torch_chunk_gated_delta_rule. Every measurement is a process of its own. Run it on an idle\n"
        "machine.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--tokens", type=int, default=8192, help="of one document (default: %(default)s)")
    made.add_argument("--key-heads", type=int, default=32, help="default: %(default)s")
    made.add_argument("--value-heads", type=int, default=32, help="default: %(default)s; Qwen3.5 has 32 over 16 keys")
    made.add_argument("--dim", type=int, default=128, help="width of a head (default: %(default)s)")
    made.add_argument("--repetitions", type=int, default=3, help="processes of each side (default: %(default)s)")
    made.add_argument("--threads", type=int, default=default_threads(), help="default: the physical cores")
    made.add_argument("--native-only", action="store_true", help="measure this side alone")
    made.add_argument("--side", choices=(NATIVE, PEER), help=argparse.SUPPRESS)  # what a measuring process does
    return made


def rule(side: str) -> Callable[..., Tensor]:
    """A side's function of query, key, value, decay and beta, [N, heads, ...]."""
    if side == NATIVE:
        from models.attention.delta_rule import chunked_gated_delta_rule
        from models.blocks.documents import Documents

        def native(query: Tensor, *others: Tensor) -> Tensor:
            key, value, decay, beta = others
            documents = Documents.from_lengths([len(query)])
            return chunked_gated_delta_rule(query, key, value, decay, beta, documents)

        return native

    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_chunk_gated_delta_rule

    def peer(*inputs: Tensor) -> Tensor:
        out: Tensor = torch_chunk_gated_delta_rule(*(x[None] for x in inputs), use_qk_l2norm_in_kernel=True)[0]
        return out[0]

    return peer


def measure_here(side: str, arguments: argparse.Namespace) -> Result:
    """Twice forward and backward in this process: the first for memory and the norms, the second for time."""
    torch.set_num_threads(arguments.threads)
    run = rule(side)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(arguments.tokens, *shape, generator=generator)

    keys, values = (arguments.key_heads, arguments.dim), (arguments.value_heads, arguments.dim)
    inputs = [normal(*keys), normal(*keys), normal(*values)]
    inputs += [-0.3 * normal(arguments.value_heads).exp(), normal(arguments.value_heads).sigmoid()]
    for x in inputs:
        x.requires_grad_()
    run(*(x[:64] for x in inputs)).sum().backward()  # libraries start their threads
    for x in inputs:
        x.grad = None
    before = resident_bytes()
    reset_peak_memory(CPU)
    found: Result = {}
    for _ in range(2):
        begin = time.perf_counter()
        out = run(*inputs)
        middle = time.perf_counter()
        d_out = torch.ones_like(out)
        start = time.perf_counter()
        gradients = torch.autograd.grad(out, inputs, d_out)
        end = time.perf_counter()
        if not found:  # the peak before the norms, which make copies
            found["peak"] = peak_memory_bytes(CPU) - before
            found["norms"] = [x.detach().double().norm().item() for x in (out, *gradients)]
        found |= {"forward": middle - begin, "backward": end - start}
        del out, d_out, gradients
    return found


def worker(side: str, arguments: argparse.Namespace) -> Result:
    """One measurement of a side; see `measured_apart`."""
    command = [sys.executable, "-m", "benchmarks.delta_rule", "--side", side]
    for name in ("tokens", "key_heads", "value_heads", "dim", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return measured_apart(command, f"the measurement of {side}", arguments.threads, os.environ)


def check_equal_results(native: Result, peer: Result) -> None:
    """Raises NibbleError when the norms of the output or of a gradient differ."""
    names = ("output", *(f"gradient of {name}" for name in ("query", "key", "value", "decay", "beta")))
    for name, ours, theirs in zip(names, native["norms"], peer["norms"], strict=True):
        if abs(ours - theirs) > EQUAL * abs(theirs):
            raise NibbleError(
                f"the sides do not compute the same: the norm of the {name} is {ours} here, {theirs} there"
            )


def summary(results: Sequence[Result]) -> dict[str, float]:
    """Medians over the repetitions."""
    found = {name: statistics.median(result[name] for result in results) for name in ("forward", "backward", "peak")}
    return found | {"both": statistics.median(result["forward"] + result["backward"] for result in results)}


def report(sides: dict[str, list[Result]], targets: bool) -> str:
    medians = {name: summary(results) for name, results in sides.items()}
    head = ("", "forward s", "backward s", "both s", "peak MiB above the inputs")
    rows = [
        [name, f"{m['forward']:.2f}", f"{m['backward']:.2f}", f"{m['both']:.2f}", f"{m['peak'] / MiB:,.0f}"]
        for name, m in medians.items()
    ]
    lines = [table(head, rows)]
    if PEER in medians:
        for what, name, target in (("time", "both", TIME_TARGET), ("peak memory", "peak", MEMORY_TARGET)):
            ratio = medians[NATIVE][name] / medians[PEER][name]
            met = f"; target 1/{1 / target:.0f}: {'met' if ratio <= target else 'NOT MET'}" if targets else ""
            lines.append(f"{what}: {ratio:.3f} of the peer's (1/{1 / ratio:.1f}){met}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.side:
        print(json.dumps(measure_here(arguments.side, arguments)))
        return 0
    loads = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    print(
        f"cpu      {device_name(CPU)}; {arguments.threads} threads; load average {loads}; torch {torch.__version__}\n"
        f"work     {arguments.tokens} tokens, {arguments.key_heads} key heads and {arguments.value_heads} value heads "
        f"of width {arguments.dim}, float32, {arguments.repetitions} repetitions"
    )
    if os.getloadavg()[0] > 0.25 * arguments.threads:
        print("note     THE MACHINE IS BUSY: the figures are uneven, and too high.")
    names = [NATIVE] if arguments.native_only else [NATIVE, PEER]
    sides: dict[str, list[Result]] = {name: [] for name in names}
    try:
        for repetition in range(arguments.repetitions):
            for name in names[:: -1 if repetition % 2 else 1]:
                sides[name].append(worker(name, arguments))
                last = sides[name][-1]
                seconds = last["forward"] + last["backward"]
                text = f"repetition {repetition + 1}/{arguments.repetitions}  {name}: {seconds:.2f} s"
                print(text, file=sys.stderr, flush=True)
        if not arguments.native_only:
            check_equal_results(sides[NATIVE][0], sides[PEER][0])
    except NibbleError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print("\n" + report(sides, targets=arguments.tokens >= 8192))
    return 0


if __name__ == "__main__":
    sys.exit(main())
