"""A random checkpoint of any architecture in the hub's format: one tensor per expert and projection.

`ensure_checkpoint` writes it once, in a process of its own (`python -m benchmarks.checkpoint FOLDER`).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.decoder import CausalLM

STAMP = "benchmark.json"  # written last: a folder without it is unfinished


def parameters_of(config: dict[str, Any]) -> int:
    """The model's parameters; GLM's routers' correction biases are buffers."""
    from models.checkpoint.conversion import count_parameters
    from models.checkpoint.keymap import key_map_of

    return count_parameters(key_map_of(_empty(config, "config.json")).keys)


def _empty(config: dict[str, Any], where: str) -> CausalLM:
    """The model without values."""
    import torch

    from models.registry import architecture_for
    from quant.storage import StorageSpec

    architecture = architecture_for(config, where)
    return architecture.build(architecture.parse_config(config, where), StorageSpec("none"), torch.bfloat16, "meta")


def ensure_checkpoint(config: dict[str, Any], root: Path) -> Path:
    """The folder of this config's checkpoint under `root`; written there first if it isn't."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
    folder = root / f"random-{digest}"
    if not (folder / STAMP).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        subprocess.run([sys.executable, "-m", "benchmarks.checkpoint", str(folder)], check=True)
    return folder


def write(folder: Path, seed: int = 0) -> None:
    """Fill a folder that holds config.json with what training from scratch starts with, and router biases near 0.

    bfloat16, also where models compute in float32: so both sides have the same values.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    import torch
    from safetensors.torch import save_file

    from models.checkpoint.keymap import key_map_of
    from train.demo.checkpoint import initial_value

    model = _empty(config, str(folder))
    spread, generator = config["initializer_range"], torch.Generator().manual_seed(seed)
    tensors = {}
    for key in key_map_of(model).keys:
        value = initial_value(model, key, spread, generator)
        if key.native.endswith("e_score_correction_bias"):
            tensors[key.hub] = torch.randn(key.shape, generator=generator).mul_(0.1 * spread)
            continue
        # A stack of experts [E, out, in] is one matrix [out / parts, in] for each expert and part.
        pieces = [part for expert in value for part in expert.chunk(len(key.parts))] if key.parts else [value]
        tensors |= {name: piece.bfloat16() for name, piece in zip(key.part_keys(), pieces, strict=True)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / STAMP).write_text("{}\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
