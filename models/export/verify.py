"""Whether what was written computes what the adapter computes: a forward pass of each, beside each other.

The model with the adapter is nibble's. The other one is transformers': with PEFT where PEFT reads the layout (stacks);
of a LoRA per expert each product is added to the weight that its name means, as a server has it. Both in float32.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from models.adapters.files import load_adapter
from models.adapters.layouts import PREFIX
from models.adapters.packing import Packing
from models.adapters.peft_config import CONFIG, WEIGHTS
from models.checkpoint.hub import HubCheckpoint
from models.checkpoint.native import is_converted
from models.export.write import Exported, base_of
from models.load import load_model
from quant.common.errors import NibbleError
from quant.common.words import printable

TOLERANCE = 1e-4  # of the largest logit. Tiny models differ by 1e-6; forty layers of float32 by some 1e-5.
_TOKENS = 24


@dataclass(frozen=True)
class Compared:
    """Largest differences of logits: of the two models, and of base and adapter; `logits`, the largest of them."""

    how: str
    difference: float
    effect: float
    logits: float

    def __str__(self) -> str:
        return (
            f"the largest difference of logits is {self.difference:.1e}; the adapter changes them by up to "
            f"{self.effect:.1e}, of at most {self.logits:.1e}"
        )


def check_verifiable(adapter: Path, model: Path | None, drop: Collection[str]) -> None:
    """Raises NibbleError for what is known before exporting: that these can't be compared, or not here."""
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing:
        raise NibbleError(
            f"--verify loads the result with transformers and PEFT, and {' and '.join(missing)} isn't installed here.\n"
            "pip install transformers peft, or leave --verify out."
        )
    if drop:
        raise NibbleError(
            f"--verify with --drop: without {', '.join(drop)} the result computes something else than {adapter}.\n"
            "Leave --verify out, and compare the losses of both with python -m train.evaluate."
        )
    base, _ = base_of(adapter, model)
    if is_converted(base):
        raise NibbleError(
            f"--verify: {base} is a converted checkpoint, which transformers can't load.\n"
            "Name the hub's with --model, or leave --verify out."
        )
    HubCheckpoint(base).close()  # its weights are there


def verify(adapter: Path, out: Path, done: Exported, layout: Packing | None = None) -> Compared:
    """Compare the logits of base + `adapter` with those of base + what was written to `out`.

    Both models are loaded one after the other, in float32. `check_verifiable` has found nothing. Raises NibbleError
    where they differ, where the adapter has no effect, by which nothing would be shown, and where transformers or PEFT
    can't load theirs.
    """
    expected, vocabulary = _native_logits(done.base, adapter, layout)
    gc.collect()
    tokens = _tokens(vocabulary)
    how = f"{'with PEFT on' if done.stacked else 'by the names in the file added to the weights of'} transformers"
    try:
        base, found = _reference_logits(done, out, tokens)
    except Exception as error:  # they differ between versions of transformers and PEFT
        why = printable(f"{type(error).__name__}: {error}", 300)
        raise NibbleError(f"{out} is written, but not verified, as transformers or PEFT failed: {why}") from error
    size = expected.abs().max().item()
    compared = Compared(how, _largest(found, expected), _largest(expected, base), size)
    if compared.effect <= TOLERANCE * size:
        raise NibbleError(
            f"{out} is written, but comparing shows nothing, as the adapter hardly has an effect: {compared}."
        )
    if not compared.difference <= min(TOLERANCE * size, compared.effect / 20):
        raise NibbleError(f"{out} doesn't compute what {adapter} computes, {how}: {compared}.")
    return compared


def _tokens(vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0))


def _native_logits(base: Path, adapter: Path, layout: Packing | None) -> tuple[Tensor, int]:
    model = load_model(base, storage="none", dtype="float32")
    load_adapter(model, adapter, layout=layout)
    vocabulary = model.config.vocabulary
    with torch.no_grad():
        return model(_tokens(vocabulary)), vocabulary


def _reference_logits(done: Exported, out: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of the base, and with what was written."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if done.names == "vision-language" else AutoModelForCausalLM
    reference = kind.from_pretrained(done.base, dtype=torch.float32, trust_remote_code=False).eval()
    base = _logits(reference, tokens)
    if done.stacked:
        return base, _with_peft(reference, out, tokens)
    with torch.no_grad():
        _add_to_weights(reference, out)
    return base, _logits(reference, tokens)


def _logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens).logits
    return logits


def _largest(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


def _with_peft(reference: Any, out: Path, tokens: Tensor) -> Tensor:
    from peft import PeftModel

    return _logits(PeftModel.from_pretrained(reference, str(out)).eval(), tokens)


def _add_to_weights(reference: Any, out: Path) -> None:
    """W + alpha / r · B A for every pair in the file, which is in the layout per expert."""
    config = json.loads((out / CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    with safe_open(out / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dict
            if not name.endswith(".lora_A.weight"):
                continue
            module = name.removesuffix(".lora_A.weight")
            a, b = (file.get_tensor(f"{module}.lora_{letter}.weight").float() for letter in "AB")
            _weight(reference, module.removeprefix(PREFIX)).add_(b @ a, alpha=scale)


def _weight(model: Any, name: str) -> Tensor:
    """The matrix that a module's name means: of an expert, its part of a stack."""
    experts, _, rest = name.partition(".experts.")
    index, _, part = rest.partition(".")
    if not index.isdecimal():
        if name.endswith(".mlp.gate") and hasattr(model.get_submodule(name.removesuffix(".gate")), "router"):
            name = name.replace(".mlp.gate", ".mlp.router.gate")  # Trinity's, as vLLM calls it
        weight: Tensor = model.get_submodule(name).weight
        return weight
    stack = model.get_submodule(f"{experts}.experts")
    if part == "down_proj":
        down: Tensor = stack.down_proj[int(index)]
        return down
    gate, up = stack.gate_up_proj[int(index)].chunk(2)
    return gate if part == "gate_proj" else up
