"""What the launches of a training step compile to, for any NVIDIA card, on a machine that has none."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.launches_cases import LaunchCase, full_config, targets_of
from benchmarks.launches_step import Step, measure
from quant.kernels.language import Launch, recording

# Compute capabilities, and the shared memory that a program may have there, in bytes (CUDA C++ Programming Guide,
# technical specifications per compute capability).
TARGETS = {
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (12, 0): 99 << 10,
}
TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA|QMMA|IMMA|DMMA)\b[.\w]*")

_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """registers: of a thread. spills: bytes of local memory. shared: bytes of a program. widest: bits of its widest
    load from global memory. multiplies: whether it has products; products: the tensor cores' instructions, by name and
    how often they stand there.
    """

    registers: int
    spills: int
    shared: int
    widest: int
    multiplies: bool
    products: dict[str, int]


def signature(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """The types of a launch's arguments, its constants and what is a multiple of 16, as Triton specialises them."""
    names = launch.kernel.arg_names
    types, constants, attributes = {}, dict(launch.constants), {}
    for place, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        any_value = launch.kernel.params[place].do_not_specialize
        if value is None or (isinstance(value, int) and value == 1 and not any_value):
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            types[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not any_value:
                attributes[place,] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32"
    for name in constants:
        types[name] = "constexpr"
    return {name: types[name] for name in names}, constants, attributes


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Compiled:
    """Raises whatever Triton's compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, attributes = signature(launch)
    source = ASTSource(launch.kernel, types, constants, attributes)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    made = triton.compile(source, target=target, options=launch.options)
    return inspect(made.asm["cubin"], made.metadata.shared, multiplies="tt.dot" in made.asm["ttir"])


def inspect(cubin: bytes, shared: int, multiplies: bool) -> Compiled:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (
            subprocess.run([tools / tool, option, file], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    products: dict[str, int] = {}
    for found in TENSOR_CORES.findall(code):
        products[found] = products.get(found, 0) + 1
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.\S*", code)
    widths = [int(width) for load in loads for width in re.findall(r"\.(64|128)\b", load)]
    # Loads through the tensor memory accelerator are as wide as their box.
    widest = 128 if "UTMALDG" in code or "UBLKCP" in code else max(widths, default=32 if loads else 0)

    def number(name: str) -> int:
        return int(re.findall(rf"{name}:(\d+)", usage)[-1])

    local = len(re.findall(r"\bSTL\b", code))
    return Compiled(number("REG"), max(number("LOCAL"), 4 * local), shared, widest, multiplies, products)


@dataclass(frozen=True)
class Built:
    """A kernel as a step of two layers launches it, `launches` times, and what it compiles to."""

    name: str
    capability: tuple[int, int]
    launches: int
    code: Compiled

    @property
    def fault(self) -> str | None:
        if self.code.spills:
            return f"spills {self.code.spills} bytes"
        if self.code.shared > TARGETS[self.capability]:
            return f"more shared memory than the card's {TARGETS[self.capability] >> 10} KiB"
        if self.code.multiplies and not self.code.products:
            return "a product without tensor cores"
        return None


# As few layers as have all kinds of an architecture's layers.
_FEW = {
    "glm4_moe_lite": {},
    "glm4_moe": {},
    "glm_moe_dsa": {"first_k_dense_replace": 1},
    "afmoe": {"num_dense_layers": 1, "global_attn_every_n_layers": 2},
    "qwen3_moe": {},
    "qwen3_5_moe": {"full_attention_interval": 2},
}


def step_of(arch: str, storage: str) -> Step:
    """One of two layers, 2 × 2048 tokens."""
    return measure(LaunchCase(full_config(arch, 2) | _FEW[arch], storage, targets=targets_of(arch)))


def launches_of(arch: str, storage: str, capability: tuple[int, int]) -> dict[str, list[Launch]]:
    """What a step of two layers launches on a card, alike launches together."""
    with recording(capability) as launches:
        step_of(arch, storage)
    alike: dict[str, list[Launch]] = {}
    for launch in launches:
        alike.setdefault(repr((launch.kernel.__name__, *signature(launch), launch.options)), []).append(launch)
    return alike


def build_all(
    archs: Sequence[str], storages: Sequence[str], capabilities: Sequence[tuple[int, int]], beginnings: tuple[str, ...]
) -> Iterator[Built]:
    """Each kernel of these models' steps whose name begins so, once for each form in which it is launched."""
    for capability in capabilities:
        seen: set[str] = set()
        for arch in archs:
            for storage in storages:
                for form, launches in launches_of(arch, storage, capability).items():
                    name = launches[0].kernel.__name__.strip("_")
                    if form not in seen and name.startswith(beginnings):
                        seen.add(form)
                        yield Built(name, capability, len(launches), compile_launch(launches[0], capability))
