"""What a launch of a Triton kernel compiles to, for any NVIDIA card, on a machine that has none."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.kernels.language import Launch

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
    torch.uint8: "u8", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """registers: of a thread. spills: bytes of local memory. shared: bytes of a program. widest: bits of its widest
    load from global memory. products: the tensor cores' instructions, by name and how often they stand there.
    """

    registers: int
    spills: int
    shared: int
    widest: int
    products: dict[str, int]


def signature(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """The types of a launch's arguments, its constants and what is a multiple of 16, as Triton specialises them."""
    names = launch.kernel.arg_names
    types, constants, attributes = {}, dict(launch.constants), {}
    for place, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = f"*{_TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            types[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
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
    return inspect(made.asm["cubin"], made.metadata.shared)


def inspect(cubin: bytes, shared: int) -> Compiled:
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
    return Compiled(number("REG"), max(number("LOCAL"), 4 * local), shared, widest, products)
