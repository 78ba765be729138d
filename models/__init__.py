"""Mixture-of-experts models in plain PyTorch: one file per architecture, the blocks that several share, LoRA.

from models import load_model
model = load_model("path/to/checkpoint", storage="nf4", dtype=torch.bfloat16, device="cpu", adapter=None)
logits = model(tokens)  # tokens int64 [B, T] -> [B, T, V]
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.load import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    # Commands of this package answer --help without importing torch.
    if name == "load_model":
        from models.load import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
