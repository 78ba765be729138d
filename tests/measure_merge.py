"""How far peak memory grows from merging a small checkpoint to a large one: python -m tests.measure_merge DIR [WIDTH]

Prints four numbers of bytes: the growth of the peak resident memory (mapped files included), the size of the large
checkpoint, of its largest shard, and of its largest stack of experts. Run in a process of its own, by
tests/models/merge/test_merge_memory.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.merge.merging import merge
from tests.measure_convert import SHARD, peak, write

RANK = 4


def write_adapter(folder: Path, layers: int, experts: int, width: int) -> None:
    """Of all experts, in PEFT's layout."""
    folder.mkdir()
    tensors = {}
    for layer in range(1, layers):
        module = f"base_model.model.model.layers.{layer}.mlp.experts"
        for stack, rows in ((".base_layer", 2 * width), ("", width)):
            tensors[f"{module}{stack}.lora_A.weight"] = 0.1 * torch.randn(experts * RANK, width)
            tensors[f"{module}{stack}.lora_B.weight"] = 0.1 * torch.randn(rows, experts * RANK)
    save_file(tensors, folder / "adapter_model.safetensors")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": [], "target_parameters": stacks}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.19.1"}))


def main() -> None:
    root, width = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 256
    shard_bytes = SHARD * (width // 256) ** 2
    sizes = {"small": (2, 8), "large": (3, 40)}
    total = 0
    for name, (layers, experts) in sizes.items():
        total = write(root / name, layers, experts, width, shard_bytes)
        write_adapter(root / f"{name}-adapter", layers, experts, width)
    merge(root / "small", root / "small-adapter", root / "small-out")
    before = peak()
    merge(root / "large", root / "large-adapter", root / "large-out")
    grown = peak() - before
    largest = max(path.stat().st_size for path in (root / "large").glob("*.safetensors"))
    print(grown, total, largest, sizes["large"][1] * 2 * width * width * 2)


if __name__ == "__main__":
    main()
