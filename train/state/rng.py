"""Random number generators: their states as JSON types."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rng_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators (CUDA's where it is in use), as JSON types."""
    version, words, gauss = random.getstate()
    kind, numbers, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(numbers).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _encoded(torch.get_rng_state()),
        "cuda": [_encoded(state) for state in cuda],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Set the generators to a state from `rng_state`; CUDA's only where there are as many devices as there were."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, numbers, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(numbers, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decoded(state["torch"]))
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decoded(text) for text in state["cuda"]])


def _encoded(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
