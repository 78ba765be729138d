"""What the operations of a step on meta tensors would launch, move, multiply and keep on an accelerator."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.shards import is_cut

# An H100's, as reached and not as printed: bytes a second; operations a second of products of 16 bits; float32 products
# run on scalar units unless TF32 is allowed.
BYTES_PER_SECOND = 2.8e12
OPERATIONS_PER_SECOND = 700e12
FLOAT32_OPERATIONS_PER_SECOND = 60e12
ALLOCATION = 512  # torch's CUDA allocator rounds up to multiples of it

# Kinds of operations, by the beginnings of their names. What begins otherwise is done element by element.
KINDS: dict[str, tuple[str, ...]] = {
    "messages": ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_", "allreduce_"),
    "grouped products": ("_grouped_mm", "grouped_"),
    "products": ("mm", "addmm", "bmm", "baddbmm"),
    "dequantisation": ("dequantize_", "dequantise_"),
    "attention": ("_varlen_attn", "_flash_attention", "_scaled_dot_product"),
    "gathers and scatters": ("index", "gather", "scatter", "embedding", "_index_put"),
    "copies and casts": ("_to_copy", "copy_", "clone", "cat", "stack", "repeat", "constant_pad", "flip"),
    "reductions and sorting": (
        "sum", "mean", "amax", "any", "all", "norm", "max", "min", "cumsum", "sort", "topk", "_softmax", "nonzero",
        "searchsorted",        "_fused_rms_norm",
    ),
    "filling": ("zero", "ones", "full", "fill_", "arange", "new_zeros", "new_ones", "new_full", "scalar_tensor"),
}  # fmt: skip
ELEMENT_BY_ELEMENT = "element by element"
ALL_KINDS = (*KINDS, ELEMENT_BY_ELEMENT)
# They take memory and launch nothing.
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh")
# On meta they stand for their `out` form (quant/fourbit.py): what they give takes no memory.
_INTO_OUT = ("dequantize_4bit",)
# Their schemas don't say that they write into what they are given.
_WRITE_UNSAID = (*KINDS["messages"], "all_gather_copy_in")
# Of their first operand they touch only the rows or values that are chosen.
_GATHERS = ("index_select", "gather", "embedding", "index")
_SCATTERS = ("index_copy_", "index_put_", "_index_put_impl_", "scatter_", "scatter_add_", "index_add_")
_WRITE_ONLY = ("copy_", "fill_", "zero_")
_PRODUCTS = (*KINDS["grouped products"], *KINDS["products"])
_FACTORS = (("mat1", "mat2"), ("self", "mat2"), ("batch1", "batch2"))


@dataclass
class Total:
    """Of several operations: how many, the bytes that they read and write, their multiplications and additions, and
    the seconds that a device at the rates above takes at least, one after another.
    """

    launches: int = 0
    bytes: int = 0
    operations: int = 0
    seconds: float = 0.0

    def add(self, other: Total) -> Total:
        self.launches += other.launches
        self.bytes += other.bytes
        self.operations += other.operations
        self.seconds += other.seconds
        return self


def kind_of(name: str) -> str:
    """name: of an operator without its overload, such as `addmm_`."""
    return next((kind for kind, starts in KINDS.items() if name.startswith(starts)), ELEMENT_BY_ELEMENT)


class Recorder(TorchDispatchMode):
    """Within it, every operation on tensors without values (on the meta device, or fake ones) is counted by place and
    name, and their storages are followed.

    An operation counts as one launch if it gives a tensor with memory of its own or writes into one; views and
    allocations don't. What torch implements as one operator is one, though a sort or a softmax may launch several
    kernels. place: where operations are counted now, set by whoever knows. live, peak: bytes of meta tensors that
    exist, rounded as torch's CUDA allocator does; `follow` adds what was there before. What an operator allocates for
    itself while it runs isn't seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.place: Any = None
        self.totals: defaultdict[tuple[Any, str], Total] = defaultdict(Total)
        self.live = self.peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = list(_tensors((*args, *kwargs.values()))), list(_tensors((result,)))
        # What is done to a DTensor itself, FSDP2's view of a part, gives another view.
        if any(map(_without_values, (*given, *made))) and not any(map(is_cut, (*given, *made))):
            known = {tensor.untyped_storage()._cdata for tensor in given}
            fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
            name = func._schema.name.partition("::")[2]
            if name not in _INTO_OUT:
                self.follow(fresh)
            if name not in _ALLOCATIONS and _launches(func._schema, fresh):
                arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
                total = _work(func._schema, name, arguments | kwargs, given, fresh)
                self.totals[self.place, name].add(total)
        return result

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Their storages are live from now on until nothing refers to them."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if not _without_values(tensor) or key in self._storages:
                continue
            size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION

            def freed(_: Any, key: int = key, size: int = size) -> None:
                del self._storages[key]
                self.live -= size

            self._storages[key] = weakref.ref(storage, freed)
            self.live += size
        self.peak = max(self.peak, self.live)


def _without_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _launches(schema: Any, fresh: list[Tensor]) -> bool:
    """Whether it computes anything: what returns nothing is an assertion or writes into what it is given."""
    if schema.name.partition("::")[2] in _WRITE_UNSAID:
        return True
    return schema.is_mutable or not schema.returns or any(tensor.numel() for tensor in fresh)


def _work(schema: Any, name: str, arguments: dict[str, Any], given: list[Tensor], fresh: list[Tensor]) -> Total:
    """Of one operation."""
    operations, rate = 0, OPERATIONS_PER_SECOND
    for first, second in _FACTORS:
        if name.startswith(_PRODUCTS) and first in arguments and second in arguments:
            a, b = arguments[first], arguments[second]
            operations = 2 * a.numel() * b.shape[-1]
            rate = FLOAT32_OPERATIONS_PER_SECOND if a.dtype == torch.float32 else rate
            break
    if name.startswith("router"):  # as long as float32 takes, though tensor cores do it
        operations = 2 * len(arguments["logits"]) * arguments["matrix"].numel()
        rate = FLOAT32_OPERATIONS_PER_SECOND
    if name.startswith("_varlen_attn"):
        operations = _attention_operations(arguments, backward="backward" in name)
    if name == "grouped_product":
        operations, moved = _grouped_product(arguments)
    elif name == "grouped_gradient":
        operations, moved = _grouped_gradient(arguments)
    else:
        moved = _bytes_moved(schema, name, arguments, given, fresh)
    return Total(1, moved, operations, max(moved / BYTES_PER_SECOND, operations / rate))


def _grouped_product(arguments: dict[str, Any]) -> tuple[int, int]:
    """Operations and bytes of quant.kernels.grouped.grouped_product, where every expert has as many rows."""
    matrices, more, out = arguments["matrices"], arguments["more_matrices"], arguments["out"]
    share = matrices.shape[0] / len(arguments["ends"])  # of all experts, and so of all rows
    rows, inner, columns = share * len(out), matrices.shape[1], matrices.shape[2]
    moved = rows * (inner + columns) * out.element_size() + _bytes(matrices)
    if more is not None:
        inner += more.shape[1]
        moved += rows * more.shape[1] * out.element_size() + share * _bytes(more)
    return int(2 * rows * inner * columns), int(moved)


def _grouped_gradient(arguments: dict[str, Any]) -> tuple[int, int]:
    """Operations and bytes of quant.kernels.grouped.grouped_gradient."""
    left, out, rows = arguments["left"], arguments["out"], len(arguments["slots"])
    width = out.shape[1] + out.shape[2]
    return 2 * rows * out.shape[1] * out.shape[2], rows * width * left.element_size() + _bytes(out)


def _attention_operations(arguments: dict[str, Any], backward: bool) -> int:
    """Causal, of documents of one length: two products over the pairs of tokens that see each other, backward five."""
    query, longest = arguments["query"], arguments["max_q"]
    documents = len(arguments["cu_seq_q"]) - 1
    left = (arguments.get("window_size") or [-1])[0]
    sees = longest if left < 0 else min(left + 1, longest)
    pairs = documents * (sees * (sees + 1) // 2 + (longest - sees) * sees)
    return (5 if backward else 2) * 2 * pairs * query.shape[1] * query.shape[2]


def _bytes_moved(schema: Any, name: str, arguments: dict[str, Any], given: list[Tensor], fresh: list[Tensor]) -> int:
    """Everything read once and everything written once."""
    if name in _GATHERS:  # an `out` is the last that is given
        picked = fresh[0] if fresh else given[-1]
        return 2 * _bytes(picked) + sum(map(_bytes, given[1:]))
    if name in _SCATTERS:  # written: as much as is given
        return sum(map(_bytes, given[1:])) + _bytes(given[-1])
    moved = sum(map(_bytes, (*given, *fresh)))
    for argument in schema.arguments:
        written = arguments.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(written, Tensor):
            overwritten = argument.kwarg_only or name in _WRITE_ONLY
            moved += 0 if overwritten else _bytes(written)
    return moved


def _bytes(tensor: Tensor) -> int:
    """Of its elements that differ: what is expanded lies there once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()
