"""The CUDA paths against the CPU reference on small inputs: storages, experts, attention, loss, model, optimisers.

`python -m benchmarks.gpu_checks DEVICE` prints one JSON object per check and ends with exit code 1 when one failed.
On the CPU itself it compares the reference with itself: a test of this file.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from models.attention import causal_attention
from models.decoder import CausalLM
from models.documents import Documents
from models.experts import Experts
from models.glm4_moe_lite import Glm4MoeLiteConfig, build
from models.linear import LoRA
from models.lora import AdapterSpec, add_lora, trainable_parameters
from quant.storage import Storage, StorageSpec, new_storage
from train.loss import linear_cross_entropy
from train.optim import build_optimizer

CPU = torch.device("cpu")
# float32 on both sides differs by the order of summation only. In bfloat16 the CPU's float32 result is the reference,
# so that the figure shows what rounding to 8 bits of mantissa costs through the whole computation.
FLOAT32 = 1e-5
BFLOAT16 = 3e-2

Check = tuple[str, Callable[[], float], float]  # name, the error that it measures, the largest error that passes

SMALL: dict[str, Any] = {
    "model_type": "glm4_moe_lite",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 24,
    "num_experts_per_tok": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    expected = expected.detach().to(CPU, torch.float64)
    return ((actual.detach().to(CPU, torch.float64) - expected).abs().max() / expected.abs().max()).item()


def normal(shape: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def storage_checks(device: torch.device) -> Iterator[Check]:
    for kind in ("nf4", "fp4", "int8"):
        for double in (True, False) if kind != "int8" else (False,):
            spec = StorageSpec(kind, double)
            reference = new_storage(spec, (5, 128, 256), torch.bfloat16, CPU, "stack")
            reference.load_dense(normal((5, 128, 256)))
            moved = new_storage(spec, (5, 128, 256), torch.bfloat16, CPU, "stack")
            moved.load_state_dict(reference.state_dict())
            moved.to(device)
            for dtype in (torch.float32, torch.bfloat16):
                name = f"dense() of {kind}{', double quantisation' if double else ''}, {str(dtype)[6:]}"
                for which in (None, 3, slice(1, 4)):

                    def dense(moved: Storage = moved, which: Any = which, dtype: torch.dtype = dtype) -> float:
                        expected = reference_of(moved).dense(which, dtype=dtype)
                        return relative_error(moved.dense(which, dtype=dtype), expected)

                    yield f"{name}, {which if which is not None else 'all'}", dense, 0.0 if kind != "int8" else 1e-7


def reference_of(storage: Storage) -> Storage:
    """The same packed tensors on the CPU."""
    copy = new_storage(storage.spec, storage.shape, storage.dtype, CPU, storage.name)
    copy.load_state_dict({name: tensor.to(CPU) for name, tensor in storage.state_dict().items()})
    return copy


def experts_block(kind: str, dtype: torch.dtype, device: torch.device) -> Experts:
    block = Experts(24, 128, 64, spec=StorageSpec(kind), dtype=dtype, device=CPU, name="experts")  # type: ignore[arg-type]
    for seed, projection in enumerate((block.gate_up_proj, block.down_proj)):
        shape = projection.weight.shape
        projection.weight.load_dense(normal(shape, 0.1, seed))
        projection.lora = LoRA(shape, 8, alpha=16.0)
        with torch.no_grad():
            projection.lora.A.copy_(normal(tuple(projection.lora.A.shape), 0.1, seed + 10))
            projection.lora.B.copy_(normal(tuple(projection.lora.B.shape), 0.1, seed + 20))
    return block.to(device)


def experts_gradients(kind: str, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Output and all gradients of a block, for the same inputs whatever the device."""
    block = experts_block(kind, dtype, device)
    x = normal((300, 128), seed=3).to(dtype).to(device).requires_grad_()
    weights, chosen = normal((300, 24), seed=4).sigmoid().topk(4, dim=-1)
    weights = weights.to(device).requires_grad_()
    out = block(x, chosen.to(device), weights)
    (out.float() * normal((300, 128), seed=5).to(device)).sum().backward()
    named = {name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}
    return {"output": out, "x": _grad(x), "routing weights": _grad(weights), **named}


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def experts_checks(device: torch.device) -> Iterator[Check]:
    for kind in ("none", "nf4", "int8"):
        for dtype, tolerance in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):

            def worst(kind: str = kind, dtype: torch.dtype = dtype) -> float:
                expected = experts_gradients(kind, torch.float32, CPU)
                actual = experts_gradients(kind, dtype, device)
                return max(relative_error(actual[name], expected[name]) for name in expected)

            yield f"experts, {kind}, {str(dtype)[6:]}: output and gradients", worst, tolerance


def attention_checks(device: torch.device) -> Iterator[Check]:
    lengths = [1, 70, 129, 3]

    def attend(dtype: torch.dtype, device: torch.device, heads: int, kv_heads: int, value_dim: int) -> list[Tensor]:
        documents = Documents.from_lengths(lengths, device)
        shapes = ((203, heads, 64), (203, kv_heads, 64), (203, kv_heads, value_dim))
        query, key, value = (normal(s, seed=n).to(dtype).to(device).requires_grad_() for n, s in enumerate(shapes))
        out = causal_attention(query, key, value, documents, 0.125)
        (out.float() * normal(tuple(out.shape), seed=9).to(device)).sum().backward()
        return [out, _grad(query), _grad(key), _grad(value)]

    for heads, kv_heads, value_dim in ((4, 4, 64), (4, 4, 32), (4, 2, 64)):
        for dtype, tolerance in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):

            def worst(
                dtype: torch.dtype = dtype, heads: int = heads, kv_heads: int = kv_heads, value_dim: int = value_dim
            ) -> float:
                expected = attend(torch.float32, CPU, heads, kv_heads, value_dim)
                actual = attend(dtype, device, heads, kv_heads, value_dim)
                return max(map(relative_error, actual, expected))

            name = f"attention, {heads}/{kv_heads} heads, value {value_dim}, {str(dtype)[6:]}: packed documents"
            yield name, worst, tolerance


def small_model(dtype: torch.dtype, device: torch.device, storage: str = "nf4") -> CausalLM:
    spec = StorageSpec(storage)  # type: ignore[arg-type]
    model = build(Glm4MoeLiteConfig.parse(SMALL, "benchmark"), spec=spec, dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(0)
    quantised = {id(p) for module in model.modules() if isinstance(module, Storage) for p in module.parameters()}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Storage):
                module.load_dense(torch.randn(module.shape, generator=generator) * 0.1)
        for parameter in model.parameters():
            if id(parameter) not in quantised and parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.requires_grad_(False)
    add_lora(model, AdapterSpec(("attention", "experts", "router"), rank=8, alpha=16.0))
    with torch.no_grad():
        for number, (_, parameter) in enumerate(trainable_parameters(model)):
            parameter.add_(normal(tuple(parameter.shape), 0.05, number))
    return model.to(device).train()


def model_gradients(dtype: torch.dtype, device: torch.device, recompute: bool) -> dict[str, Tensor]:
    model = small_model(dtype, device)
    model.activation_checkpointing = recompute
    lengths = [40, 1, 59]
    tokens = torch.randint(0, 512, (100,), generator=torch.Generator().manual_seed(1))
    hidden = model.hidden(tokens.to(device), Documents.from_lengths(lengths, device))
    labels = tokens.roll(-1)
    labels[::3] = -100
    loss = linear_cross_entropy(hidden, model.head.weight.dense(), labels.to(device), 60)
    loss.backward()
    return {"loss": loss, **{name: _grad(parameter) for name, parameter in trainable_parameters(model)}}


def model_checks(device: torch.device) -> Iterator[Check]:
    for recompute in (False, True):

        def worst(recompute: bool = recompute) -> float:
            expected = model_gradients(torch.float32, CPU, False)
            actual = model_gradients(torch.float32, device, recompute)
            return max(relative_error(actual[name], expected[name]) for name in expected)

        yield f"model, float32, recompute {'on' if recompute else 'off'}: loss and LoRA gradients", worst, 5e-5

    def loss_only() -> float:
        # A choice of experts may flip when rounded to bfloat16, and gradients with it; the loss hardly notices.
        expected = model_gradients(torch.float32, CPU, False)["loss"]
        return relative_error(model_gradients(torch.bfloat16, device, True)["loss"], expected)

    yield "model, bfloat16, recompute on: loss", loss_only, BFLOAT16


def loss_checks(device: torch.device) -> Iterator[Check]:
    def both(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        hidden = normal((90, 128)).to(dtype).to(device).requires_grad_()
        head = normal((3000, 128), 0.1, 1).to(dtype).to(device).requires_grad_()
        labels = torch.randint(0, 3000, (90,), generator=torch.Generator().manual_seed(2))
        labels[::4] = -100
        loss = linear_cross_entropy(hidden, head, labels.to(device), 60, chunk_bytes=2**18)
        loss.backward()
        return [loss, _grad(hidden), _grad(head)]

    for dtype, tolerance in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):

        def worst(dtype: torch.dtype = dtype) -> float:
            return max(map(relative_error, both(dtype, device), both(torch.float32, CPU)))

        yield f"linear cross-entropy, {str(dtype)[6:]}: loss and gradients", worst, tolerance


def optimizer_checks(device: torch.device) -> Iterator[Check]:
    paged = ["paged_adamw", "paged_adamw_8bit"] if device.type == "cuda" else []
    for name in ("adamw", "adamw_8bit", *paged):

        def distance(name: str = name) -> float:
            """Largest difference of three steps from torch's AdamW on the CPU, relative to how far those moved."""
            moved = []
            for optimizer, where in ((name, device), ("adamw", CPU)):
                parameter = torch.nn.Parameter(normal((64, 512)).to(where))
                made = build_optimizer(optimizer, [("weight", parameter)], 1e-2, (0.9, 0.999), 1e-8, 0.01)
                for step in range(3):
                    parameter.grad = normal((64, 512), seed=step + 1).to(where)
                    made.step()
                moved.append((parameter.detach() - normal((64, 512)).to(where)).to(CPU))
            return relative_error(moved[0], moved[1])

        # 8-bit states are coarse by design: bitsandbytes' moments have 8 bits, in blocks of 256.
        yield f"optimiser {name}: three steps", distance, 0.3 if "8bit" in name else 1e-4


GROUPS = (storage_checks, experts_checks, attention_checks, loss_checks, model_checks, optimizer_checks)


def run_checks(device: torch.device, report: Callable[[dict[str, Any]], None]) -> bool:
    """Runs every check; one that raises is a failed check, and the others go on."""
    passed = True
    for group in GROUPS:
        for name, measure, tolerance in group(device):
            result: dict[str, Any] = {"check": name, "tolerance": tolerance}
            try:
                result["error"] = measure()
                result["passed"] = result["error"] <= tolerance
            except Exception as error:  # noqa: BLE001  whatever it is, it is this check's result
                result |= {"passed": False, "raised": f"{type(error).__name__}: {error}".splitlines()[0]}
                traceback.print_exc()
            passed &= bool(result["passed"])
            report(result)
    return passed


if __name__ == "__main__":
    ok = run_checks(torch.device(sys.argv[1]), lambda result: print(json.dumps(result), flush=True))
    sys.exit(0 if ok else 1)
