"""Mixture-of-experts models in plain PyTorch: one file per architecture, the blocks that several share, LoRA.

from models import load_model
model = load_model("path/to/checkpoint", storage="nf4", dtype="bfloat16", device="cpu", adapter=None)
logits = model(tokens)  # tokens int64 [B, T] -> [B, T, V]

docs/research.md goes through the names below.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from models.convert import convert as convert
from models.merge import merge_adapter as merge_adapter

if TYPE_CHECKING:  # `as`: public, for type checkers
    from models.adapters.files import load_adapter as load_adapter
    from models.adapters.files import save_adapter as save_adapter
    from models.adapters.lora import add_lora as add_lora
    from models.adapters.lora import trainable_parameters as trainable_parameters
    from models.adapters.targets import AdapterSpec as AdapterSpec
    from models.blocks.documents import Documents as Documents
    from models.blocks.router import Router as Router
    from models.checkpoint.export import export_hub as export_hub
    from models.decoder import CausalLM as CausalLM
    from models.experts.block import Experts as Experts
    from models.generation.sampling import Sampling as Sampling
    from models.load import load_model as load_model
    from models.registry import ARCHITECTURES as ARCHITECTURES

# Imported when they are first asked for: the commands of this package answer --help without importing torch.
_HOMES = {
    "ARCHITECTURES": "models.registry",
    "AdapterSpec": "models.adapters.targets",
    "CausalLM": "models.decoder",
    "Documents": "models.blocks.documents",
    "Experts": "models.experts.block",
    "Router": "models.blocks.router",
    "Sampling": "models.generation.sampling",
    "add_lora": "models.adapters.lora",
    "export_hub": "models.checkpoint.export",
    "load_adapter": "models.adapters.files",
    "load_model": "models.load",
    "save_adapter": "models.adapters.files",
    "trainable_parameters": "models.adapters.lora",
}

__all__ = ["convert", "merge_adapter", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
