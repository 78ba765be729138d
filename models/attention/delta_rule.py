"""The gated delta rule (Gated DeltaNet, Yang et al. 2024, arXiv:2412.06464), the linear attention of Qwen3.5.

Every head keeps a matrix S [dk, dv] that maps keys to values. A token lets it decay, corrects what it holds for the
token's key towards the token's value, and reads it with the query:

    S ← e^g S;    S ← S + β k (v − kᵀ S);    o = qᵀ S

with k and q scaled to unit length, q by dk**-0.5 too, and S zero at the start of every document.

Token by token (models/attention/delta_step.py) that is N small steps in a row. The chunked form cuts the flat batch
into chunks of C tokens; inside a chunk a unit lower triangular system stands for the C corrections that see one another
(the WY form of DeltaNet, arXiv:2406.06484 §3), and only the N / C states follow one another. With e_ij = e^(g_j+1 + … +
g_i) for tokens i ≥ j of one document and zero for all others, and γ_i the decay from the chunk's start to token i, zero
when the token's document starts inside the chunk:

    T = (I + strictLower(β_i k_i·k_j e_ij))⁻¹;    V' = T (β v) − T (β γ k) S;    P = (q_i·k_j) e_ij
    O = γ q S + P V';    S ← γ_last S + Σ_j e_last,j k_j V'_jᵀ

Shapes: N tokens, hk key heads of width dk, hv value heads of width dv, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.attention.delta_kernels import delta_rule_in_kernels, uses_kernels
from models.attention.fla import flash_gated_delta_rule, uses_fla
from models.blocks.documents import Documents
from models.kernels.delta_chunks import NORM_EPS
from quant.common.devices import on_cpu
from quant.products import without_autocast


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, documents: Documents
) -> Tensor:
    """The outputs o of all tokens: [N, hv, dv] in the dtype of value.

    query, key [N, hk, dk] as they are before scaling; value [N, hv, dv], where hv is a multiple of hk and value head j
    reads key head j // (hv / hk); decay float32 [N, hv], the g ≤ 0 above; beta float32 [N, hv]. Gradients for all five.
    States and everything between are float32 (float64 for a float64 value). On CUDA in half precision the kernels of
    flash-linear-attention are used when they are installed and right, or else those of models/kernels where they have
    shown that they are, and everywhere else the chunked form in torch.
    """
    if uses_fla(value.device, value.dtype):
        return flash_gated_delta_rule(query, key, value, decay, beta, documents.offsets)
    if uses_kernels(query, value):
        return delta_rule_in_kernels(query, key, value, decay, beta, documents)
    return chunked_gated_delta_rule(query, key, value, decay, beta, documents)


@dataclass(frozen=True)
class Blocking:
    """How the work is cut: tokens in a chunk; chunks and value heads that are computed at a time.

    The last two bound the scratch memory. One state per block of chunks is kept for the backward pass, which computes
    those between again.
    """

    chunk: int = 64
    chunks: int = 8
    heads: int = 8


ON_CPU, ON_CUDA = Blocking(), Blocking(chunks=16, heads=64)


def chunked_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    documents: Documents,
    blocking: Blocking | None = None,
) -> Tensor:
    """The chunked form in torch on any device. Arguments and result as of `gated_delta_rule`."""
    if value.shape[1] % key.shape[1]:
        raise ValueError(f"{value.shape[1]} value heads are not a multiple of {key.shape[1]} key heads")
    blocking = blocking or (ON_CPU if on_cpu(value.device) else ON_CUDA)
    result: Tensor = _Chunked.apply(blocking, query, key, value, decay, beta, documents.positions)
    return result


@torch.no_grad()
def chunks_from_state(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, positions: Tensor, state: Tensor
) -> Tensor:
    """The chunked form for one document, from the state [hv, dk, dv] after the tokens before these.

    The state, in the dtype of the computation, is overwritten with that after the last token. positions: int64 [N].
    Arguments and result otherwise as of `gated_delta_rule`.
    """
    blocking = ON_CPU if on_cpu(value.device) else ON_CUDA
    return _outputs(_Inputs((query, key, value, decay, beta, positions), blocking), state=state)


class _Chunked(torch.autograd.Function):
    @staticmethod
    @without_autocast
    def forward(ctx: Any, blocking: Blocking, *tensors: Tensor) -> Tensor:
        inputs = _Inputs(tensors, blocking)
        # The state at the start of every block of chunks.
        kept = inputs.empty_states(inputs.steps) if any(ctx.needs_input_grad) else None
        out = _outputs(inputs, kept)
        ctx.save_for_backward(*tensors, kept)
        ctx.blocking = blocking
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        inputs = _Inputs(tensors, ctx.blocking)
        gradients = _Gradients(inputs, ctx.needs_input_grad[1:])
        scratch = _Scratch(inputs.value, inputs.dtype)
        for heads in inputs.head_blocks():
            d_state = inputs.zero_state(heads)
            for step, chunks in reversed(list(enumerate(inputs.chunk_blocks()))):
                block = _Block(inputs, heads, chunks, kept[step, heads.values], scratch)
                d_state = gradients.add(block, block.load("d_out", grads[0]), d_state)
        return (None, *gradients.result(), None)


def _outputs(inputs: _Inputs, kept: Tensor | None = None, state: Tensor | None = None) -> Tensor:
    """All of o. kept: gets the state at the start of every block of chunks. state: see `chunks_from_state`."""
    out = torch.empty_like(inputs.value)
    scratch = _Scratch(inputs.value, inputs.dtype)
    for heads in inputs.head_blocks():
        current = inputs.zero_state(heads) if state is None else state[heads.values]
        for step, chunks in enumerate(inputs.chunk_blocks()):
            if kept is not None:
                kept[step, heads.values] = current
            block = _Block(inputs, heads, chunks, current, scratch)
            block.store(out, block.output())
            current = block.states[-1]
        if state is not None:
            state[heads.values] = current
    return out


@dataclass(frozen=True)
class _Heads:
    """Some consecutive key heads and the value heads that read them."""

    keys: slice
    values: slice


class _Inputs:
    """The arguments, and what the chunks need to know of the documents.

    n chunks of C tokens, the last filled up with tokens that change nothing. same [n, C, C]: one for pairs of tokens
    of one document, the second not after the first. reads [n, C]: one for tokens whose document has begun in an earlier
    chunk. decay, beta [n, hv, C]. later [C, C]: one where the first token of a chunk comes after the second.
    """

    def __init__(self, tensors: Sequence[Tensor], blocking: Blocking) -> None:
        query, key, value, decay, beta, positions = tensors
        self.query, self.key, self.value, self.blocking = query, key, value, blocking
        self.dtype = dtype = torch.promote_types(value.dtype, torch.float32)
        self.tokens, self.groups = len(value), value.shape[1] // key.shape[1]
        self.padding = -self.tokens % blocking.chunk
        self.chunks = (self.tokens + self.padding) // blocking.chunk
        self.steps = -(-self.chunks // blocking.chunks)

        shape = (self.chunks, blocking.chunk)
        starts = torch.arange(self.tokens, device=value.device) - positions
        # The tokens that fill the last chunk belong to its last document: without decay and beta they change nothing.
        starts = torch.cat((starts, starts[-1:].expand(self.padding))).view(shape)
        self.same = (starts[:, :, None] == starts[:, None, :]).tril().to(dtype)
        chunk_starts = torch.arange(self.chunks, device=value.device) * blocking.chunk
        self.reads = (starts < chunk_starts[:, None]).to(dtype)
        self.decay, self.beta = (
            F.pad(x.to(dtype), (0, 0, 0, self.padding)).view(*shape, -1).transpose(1, 2).contiguous()
            for x in (decay, beta)
        )
        self.later = torch.ones(blocking.chunk, blocking.chunk, dtype=dtype, device=value.device).tril(-1)

    def head_blocks(self) -> Iterator[_Heads]:
        size, groups, heads = max(1, self.blocking.heads // self.groups), self.groups, self.key.shape[1]
        for start in range(0, heads, size):
            stop = min(start + size, heads)
            yield _Heads(slice(start, stop), slice(start * groups, stop * groups))

    def chunk_blocks(self) -> Iterator[slice]:
        for start in range(0, self.chunks, self.blocking.chunks):
            yield slice(start, min(start + self.blocking.chunks, self.chunks))

    def empty_states(self, count: int) -> Tensor:
        shape = (count, self.value.shape[1], self.key.shape[2], self.value.shape[2])
        return self.value.new_empty(shape, dtype=self.dtype)

    def zero_state(self, heads: _Heads) -> Tensor:
        return self.empty_states(1)[0, heads.values].zero_()


def _unit_lower_inverse(matrix: Tensor) -> Tensor:
    """(I + strictLower(matrix))⁻¹ of a batch [..., C, C]; diagonal and upper half of `matrix` are not read."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    return torch.linalg.solve_triangular(matrix, eye, upper=False, unitriangular=True)


class _Scratch:
    """Buffers by name that each block of work leaves to the next, since fresh memory costs more than the arithmetic."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype = like, dtype
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = self.like.new_empty(size, dtype=self.dtype)
        return self.buffers[name][:size].view(shape)


class _Block:
    """Some chunks of some heads, with everything up to the states and the corrected values V'.

    m chunks, g key heads, h = g · groups value heads:
    query, key [m, g, C, dk] of unit length, the query also scaled; query_scale, key_scale [m, g, C, 1], what they were
    multiplied by; value [m, h, C, dv]; beta [m, h, C, 1]; between [m, h, C, C], the e_ij; gamma [m, h, C, 1];
    kappa [m, h, C, 1], the decay from a token to the end of its chunk; inverse [m, h, C, C], T; attention [m, h, C, C],
    P; reading γ q, writing κ k, erasing T β γ k [m, h, C, dk]; corrected [m, h, C, dv], V'; states [m + 1, h, dk, dv].
    """

    def __init__(self, inputs: _Inputs, heads: _Heads, chunks: slice, state: Tensor, scratch: _Scratch) -> None:
        self.inputs, self.heads, self.chunks, self.scratch = inputs, heads, chunks, scratch
        self.size, self.rows = inputs.blocking.chunk, chunks.stop - chunks.start
        self.key, self.key_scale = self.unit("key", inputs.key)
        self.query, self.query_scale = self.unit("query", inputs.query, inputs.query.shape[-1] ** -0.5)
        self.value = self.load("value", inputs.value)
        self.beta = inputs.beta[chunks, heads.values, :, None]

        # Every e_ij is a sum from token to token, not the difference of two: nothing is lost after a strong decay.
        square = (*self.value.shape[:2], self.size, self.size)
        decay = inputs.decay[chunks, heads.values, None]
        decay = torch.mul(inputs.same[chunks, None], decay, out=scratch("square", *square))
        self.gamma = decay.sum(-1, keepdim=True).exp_().mul_(inputs.reads[chunks, None, :, None])
        self.between = scratch("between", *square)
        torch.mm(decay.flatten(0, 2), inputs.later, out=self.between.flatten(0, 2))
        self.between.exp_().mul_(inputs.same[chunks, None])
        self.kappa = self.between[:, :, -1, :, None]
        self.carry = self.gamma[:, :, -1:]

        self.keys_by_keys = self.times("keys_by_keys", self.key, self.key.mT)
        self.queries_by_keys = self.times("queries_by_keys", self.query, self.key.mT)
        self.attention = self.scaled("attention", self.queries_by_keys, self.between)
        system = self.scaled("square", self.keys_by_keys, self.between)
        self.inverse = _unit_lower_inverse(system.mul_(self.beta))
        self.writing = self.scaled("writing", self.key, self.kappa)
        self.reading = self.scaled("reading", self.query, self.gamma)
        right = self.scaled("wide", self.key, self.beta * self.gamma)
        self.erasing = self.times("erasing", self.inverse, right)
        right = torch.mul(self.value, self.beta, out=scratch("wide", *self.value.shape))
        self.corrected = self.times("corrected", self.inverse, right)
        self.states = scratch("states", self.rows + 1, *state.shape)
        self.states[0] = state
        for row in range(self.rows):
            self.corrected[row].baddbmm_(self.erasing[row], self.states[row], alpha=-1)
            torch.mul(self.states[row], self.carry[row], out=self.states[row + 1])
            self.states[row + 1].baddbmm_(self.writing[row].mT, self.corrected[row])

    def output(self) -> Tensor:
        out = self.times("wide", self.reading, self.states[:-1])
        out.flatten(0, 1).baddbmm_(self.attention.flatten(0, 1), self.corrected.flatten(0, 1))
        return out

    def times(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """a @ b of two batches [m, heads, ., .], in the buffer of that name."""
        out = self.scratch(name, *a.shape[:-1], b.shape[-1])
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
        return out

    def scaled(self, name: str, x: Tensor, factor: Tensor) -> Tensor:
        """x [m, g, C, d] times a factor [m, h, C, 1 or d] of each value head: [m, h, C, d]."""
        out = self.scratch(name, *factor.shape[:3], x.shape[-1])
        torch.mul(x[:, :, None], self.grouped(factor), out=self.grouped(out))
        return out

    def grouped(self, x: Tensor) -> Tensor:
        """[m, h, ...] as [m, g, groups, ...]."""
        return x.unflatten(1, (-1, self.inputs.groups))

    def dot(self, x: Tensor, dx: Tensor) -> Tensor:
        """Row by row, of x [m, g, C, d] (or [m, h, C, d]) with dx [m, h, C, d]: [m, h, C, 1]."""
        if x.shape == dx.shape:
            product = torch.mul(x, dx, out=self.scratch("product", *dx.shape))
        else:
            product = self.scaled("product", x, dx)
        return product.sum(-1, keepdim=True)

    def summed(self, x: Tensor) -> Tensor:
        """x [m, h, ...] summed over the value heads of each key head: [m, g, ...]. x itself when there is one each."""
        return x if self.inputs.groups == 1 else self.grouped(x).sum(2)

    def unit(self, name: str, x: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        x = self.load(name, x)
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = squares.add_(NORM_EPS).rsqrt_().mul_(factor)
        return x.mul_(scale), scale

    def through_unit(self, x: Tensor, dx: Tensor, scale: Tensor, factor: float = 1.0) -> Tensor:
        """The gradient of what `unit` was given, in the place of that of its result x."""
        return dx.addcmul_(x, self.dot(x, dx), value=-(factor**-2)).mul_(scale)

    def load(self, name: str, x: Tensor) -> Tensor:
        """The block's part of x [N, heads, d], as [m, heads, C, d] in the dtype of the computation."""
        heads = self.heads.values if x.shape[1] == self.inputs.value.shape[1] else self.heads.keys
        x = x[self.chunks.start * self.size : self.chunks.stop * self.size, heads]
        missing = self.rows * self.size - len(x)
        if missing:
            x = F.pad(x, (0, 0, 0, 0, 0, missing))
        x = x.unflatten(0, (self.rows, self.size)).transpose(1, 2)
        return self.scratch(name, *x.shape).copy_(x)

    def store(self, out: Tensor, x: Tensor) -> None:
        """Writes x [m, heads, C, d] to the block's part of out [N, heads, d]."""
        heads = self.heads.values if out.shape[1] == self.inputs.value.shape[1] else self.heads.keys
        out = out[self.chunks.start * self.size : self.chunks.stop * self.size, heads]
        x = x.transpose(1, 2)
        if len(out) == self.rows * self.size:
            out.unflatten(0, (self.rows, self.size)).copy_(x)
        else:
            out.copy_(x.flatten(0, 1)[: len(out)])


class _Gradients:
    """Gradients of the five arguments, filled block by block."""

    def __init__(self, inputs: _Inputs, needs: tuple[bool, ...]) -> None:
        self.inputs, self.needs = inputs, needs
        self.query, self.key, self.value = (
            torch.empty_like(x) if need else None
            for x, need in zip((inputs.query, inputs.key, inputs.value), needs[:3], strict=True)
        )
        self.log_gamma = torch.empty_like(inputs.decay)
        self.beta = torch.empty_like(inputs.beta)

    def add(self, block: _Block, d_out: Tensor, d_state: Tensor) -> Tensor:
        """d_out [m, h, C, dv]; d_state [h, dk, dv] of the state after the block; returns that of the state before."""
        b, scratch = block, block.scratch
        states, d_states = b.states[:-1], scratch("d_states", *b.states.shape)
        d_states[-1] = d_state
        torch.bmm(b.reading.mT.flatten(0, 1), d_out.flatten(0, 1), out=d_states[:-1].flatten(0, 1))
        d_corrected = b.times("d_corrected", b.attention.mT, d_out)
        for row in reversed(range(b.rows)):
            d_corrected[row].baddbmm_(b.writing[row], d_states[row + 1])
            d_states[row].baddbmm_(b.erasing[row].mT, d_corrected[row], alpha=-1)
            d_states[row].addcmul_(b.carry[row], d_states[row + 1])
        d_right = b.times("d_right", b.inverse.mT, d_corrected)  # of β v − β γ k S
        d_beta = b.dot(b.value, d_right)

        # Inside the chunks: P, and the triangular system with its constant diagonal. Both are k·k or q·k times e_ij,
        # and e_ij grows with the log of γ_i and falls with that of γ_j.
        d_attention = b.times("d_attention", d_out, b.corrected.mT).mul_(b.between)
        d_system = b.times("d_system", d_right, b.corrected.mT).mul_(b.between).neg_()
        d_system.diagonal(dim1=-2, dim2=-1).zero_()
        d_log = b.scaled("square", b.keys_by_keys, d_system)
        d_beta += d_log.sum(-1, keepdim=True)
        b.grouped(d_log.mul_(b.beta)).addcmul_(b.grouped(d_attention), b.queries_by_keys[:, :, None])
        d_log_gamma = d_log.sum(-1, keepdim=True) - d_log.sum(-2)[..., None]
        d_attention, d_system = b.summed(d_attention), b.summed(d_system.mul_(b.beta))
        symmetric = torch.add(d_system, d_system.mT, out=scratch("square", *d_system.shape))
        dq = b.times("dq", d_attention, b.key)
        dk = b.times("dk", d_attention.mT, b.query)
        dk.flatten(0, 1).baddbmm_(symmetric.flatten(0, 1), b.key.flatten(0, 1))

        # Through the states: γ q reads them, T (β γ k) S erases, κ k writes, and γ_last S is carried on.
        d_reading = b.times("wide", d_out, states.mT).mul_(b.gamma)
        d_log_gamma += b.dot(b.query, d_reading)
        dq += b.summed(d_reading)
        d_erasing = b.times("wide", d_right, states.mT).mul_(b.gamma)
        common = b.dot(b.key, d_erasing)
        d_beta -= common
        d_log_gamma -= common * b.beta
        dk -= b.summed(d_erasing.mul_(b.beta))
        d_writing = b.times("wide", b.corrected, d_states[1:].mT).mul_(b.kappa)
        common = b.dot(b.key, d_writing)
        d_log_gamma -= common
        dk += b.summed(d_writing)
        carried = torch.mul(states, d_states[1:], out=scratch("product", *states.shape)).sum((-1, -2))
        d_log_gamma[:, :, -1] += common.sum(2) + b.carry[:, :, 0] * carried[..., None]

        if self.query is not None:
            b.store(self.query, b.through_unit(b.query, dq, b.query_scale, b.query.shape[-1] ** -0.5))
        if self.key is not None:
            b.store(self.key, b.through_unit(b.key, dk, b.key_scale))
        if self.value is not None:
            b.store(self.value, d_right.mul_(b.beta))
        self.log_gamma[b.chunks, b.heads.values] = d_log_gamma[..., 0]
        self.beta[b.chunks, b.heads.values] = d_beta[..., 0]
        return d_states[0]

    def result(self) -> tuple[Tensor | None, ...]:
        inputs, needs = self.inputs, self.needs

        def flat(x: Tensor) -> Tensor:
            return x.transpose(1, 2).flatten(0, 1)[: inputs.tokens]

        decay = flat((inputs.same.mT @ self.log_gamma.mT).mT) if needs[3] else None
        beta = flat(self.beta) if needs[4] else None
        return self.query, self.key, self.value, decay, beta
