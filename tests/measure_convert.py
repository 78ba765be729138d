"""How far peak memory grows from a small checkpoint to a large one: python -m tests.measure_convert DIR

Prints three numbers of bytes: the growth of the peak resident memory (mapped files included) when the large one is
converted, its growth beyond the model's own tensors when it is loaded straight from the hub folder, and the size of
the large checkpoint. Run in a process of its own, by tests/models/checkpoint/test_convert.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from models import load_model
from models.checkpoint.conversion import convert
from models.glm4_moe_lite import Glm4MoeLiteConfig, build
from quant.storage import StorageSpec
from tests.helpers import TINY_GLM, key_map_for

SHARD = 4 * 2**20


def write(folder: Path, layers: int, experts: int, width: int = 256, shard_bytes: int = SHARD) -> int:
    """A checkpoint of random bfloat16 in shards of 4 MiB; its size in bytes. width: of tokens and of experts."""
    folder.mkdir(parents=True)
    sizes = {"num_hidden_layers": layers, "n_routed_experts": experts}
    sizes |= {"moe_intermediate_size": width, "hidden_size": width}
    config = TINY_GLM | sizes | {"model_type": "glm4_moe_lite"}
    (folder / "config.json").write_text(json.dumps(config))
    shard: dict[str, torch.Tensor] = {}
    weight_map, total = {}, 0

    def flush() -> None:
        name = f"model-{len(list(folder.iterdir())):05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for key in key_map_for(build, Glm4MoeLiteConfig.parse(config, "")).keys:
        shape = (key.shape[1] // len(key.parts), key.shape[2]) if key.parts else key.shape
        for name in key.hub_keys():
            shard[name] = torch.randn(shape).bfloat16()
            total += shard[name].nbytes
            if sum(tensor.nbytes for tensor in shard.values()) > shard_bytes:
                flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def peak() -> int:
    """Bytes: VmHWM, the largest resident set so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    root = Path(sys.argv[1])
    spec = StorageSpec("nf4", True)
    write(root / "small", layers=2, experts=8)
    large = write(root / "large", layers=3, experts=40)
    # Not beside the source, where loading would take the converted copy.
    convert(root / "small", root / "out" / "small", spec)
    before = peak()
    convert(root / "large", root / "out" / "large", spec)
    converting = peak() - before
    before = peak()
    model = load_model(root / "large", "nf4")
    loading = peak() - before - sum(tensor.nbytes for tensor in model.state_dict().values())
    print(converting, loading, large)


if __name__ == "__main__":
    main()
