"""What is in an adapter's folder: settings, and how much of each matrix it changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.adapters.adapter_file import packing_of
from models.adapters.packing import Packing
from models.adapters.peft_config import CONFIG, WEIGHTS, read_config
from models.adapters.targets import module_name
from models.checkpoint.hub_id import local_folder
from models.checkpoint.keymap import Key
from models.checkpoint.layout import respell
from models.checkpoint.native import NativeCheckpoint, dtype_name
from models.checkpoint.stream import HubReader
from models.checkpoint.tensorfile import DTYPES, read_header
from models.inspect.checkpoint import open_checkpoint
from models.inspect.diff import Compared
from models.inspect.pairs import Adapted, read_pairs
from models.inspect.settings import flat
from models.load import ModelFolder, open_folder
from quant.common.errors import NibbleError
from quant.common.words import some
from quant.kinds import new_storage

Progress = Callable[[int, int, str], None]


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def inspect_adapter(
    path: Path,
    *,
    base: str | Path | None = None,
    layout: Packing | None = None,
    quick: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """The report of an adapter.

    base: its base model, for what share of each matrix's norm the adapter is; None: what its config names, if that is
    on this machine. packing: of the B of stacks, which no shape tells. quick: the base isn't read.
    progress(done, total, what): matrices of the base, where it is read.
    Raises NibbleError for what is no plain LoRA, a file that contradicts its config, and a base that doesn't fit.
    """
    from safetensors import safe_open

    config = read_config(path)
    packing = packing_of(config, layout, str(path))
    adapted, others = read_pairs(path, config)
    header = read_header(path / WEIGHTS)
    named = str(config.get("base_model_name_or_path") or "")
    folder = None if quick else _base(base, named)
    with safe_open(path / WEIGHTS, framework="pt") as file:
        matrices = [_matrix(one, one.norms(file.get_tensor, packing)) for one in adapted]
    if folder is not None:
        for matrix, norm in zip(matrices, base_norms(folder, adapted, progress), strict=True):
            matrix |= {"base_norm": norm, "share": matrix["norm"] / norm if norm else None}
    dtypes = {info.dtype for info in header.values()}
    return {
        "path": str(path),
        "kind": "adapter",
        "base_model": named,
        "base": str(folder.path) if folder else None,
        "peft_version": config.get("peft_version"),
        "rslora": bool(config.get("use_rslora")),
        "target_modules": config.get("target_modules"),
        "target_parameters": config.get("target_parameters"),
        "layout": packing,
        "dtype": " + ".join(sorted(dtype_name(DTYPES[name]) if name in DTYPES else name for name in dtypes)),
        "parameters": sum(math.prod(info.shape) for info in header.values()),
        "bytes": (path / WEIGHTS).stat().st_size,
        "files": [{"name": name, "bytes": (path / name).stat().st_size} for name in (CONFIG, WEIGHTS)],
        "others": others,
        "dead_experts": sum(len(matrix["dead"]) for matrix in matrices),
        "matrices": matrices,
    }


def _matrix(one: Adapted, norms: list[float]) -> dict[str, Any]:
    if not all(map(math.isfinite, norms)):
        raise NibbleError(f"{one.name}: some values of its lora_A or lora_B are inf or NaN. The adapter is damaged.")
    return {
        "name": one.name,
        "layer": one.layer,
        "kind": one.kind,
        "rank": one.rank,
        "alpha": one.alpha,
        "scale": one.scale,
        "norm": math.hypot(*norms),
        "expert_norms": norms if one.experts is not None else None,
        "dead": [expert for expert, norm in enumerate(norms) if not norm] if one.experts is not None else [],
        "base_norm": None,
        "share": None,
    }


def _base(given: str | Path | None, named: str) -> ModelFolder | None:
    if given is not None:
        return open_folder(given)
    found = local_folder(named) if named else None
    return open_folder(found) if found else None


def base_norms(folder: ModelFolder, adapted: list[Adapted], progress: Progress) -> list[float]:
    """The Frobenius norm of what each of `adapted` is of in the base, a stack as one; a quantised base's as it is
    stored. One matrix at a time is in memory.

    Raises NibbleError where the base has no such matrix, or one of another shape.
    """
    reader, _ = open_checkpoint(folder)
    keys: dict[str, tuple[Key, int | None]] = {}
    for key in reader.keys:
        for name in (key.native, key.hub):  # vLLM's of Trinity's router is the native one
            keys[respell(module_name(name), "text")] = key, None
        for number, part in enumerate(key.parts if len(key.parts) > 1 else ()):
            keys[respell(module_name(part.replace(".{e}", "")), "text")] = key, number
    names = [respell(one.name, "text") for one in adapted]
    if missing := [name for name in names if name not in keys]:
        raise NibbleError(
            f"{folder.path} has no {some(missing, 3)}, which the adapter adapts.\n"
            "Is it the adapter's base model? --model names another one."
        )
    norms = []
    for number, (one, name) in enumerate(zip(adapted, names, strict=True)):
        key, row = keys[name]
        rows = key.shape[-2] // (len(key.parts) if row is not None else 1)
        experts = key.shape[0] if key.parts else None
        # PEFT before 0.19.1 exchanged the two.
        if {one.inside, one.outside} != {rows, key.shape[-1]} or (one.experts or experts) != experts:
            raise NibbleError(
                f"{folder.path}: {name} is {list(key.shape)}; A and B are for {one.outside} × {one.inside}"
                + (f", {one.experts} experts" if one.experts else "")
                + ".\nIs it the adapter's base model? --model names another one."
            )
        norms.append(_norm(reader, key, slice(None) if row is None else slice(row * rows, (row + 1) * rows)))
        progress(number + 1, len(adapted), name)
    return norms


@torch.no_grad()
def _norm(reader: HubReader | NativeCheckpoint, key: Key, rows: slice) -> float:
    """Of some rows of every matrix of a key."""
    assert key.spec is not None
    norms = []
    for expert in range(key.shape[0]) if key.parts else [None]:
        for piece in reader.read(key, None if expert is None else range(expert, expert + 1)):
            shape = key.shape if expert is None else (1, *key.shape[1:])
            storage = new_storage(key.spec, shape, key.dtype, "cpu", key.native)
            for name, tensor in piece.tensors.items():
                storage.get_parameter(name.removeprefix(f"{key.native}.")).copy_(tensor)
            dense = storage.dense(dtype=torch.float32)[..., rows, :]
            norms.append(torch.linalg.vector_norm(dense, dtype=torch.float64).item())
    return math.hypot(*norms)


def compared_adapter(path: Path) -> Compared:
    """What a difference between two adapters may be in: adapter_config.json, the norms of B·A, every tensor."""
    report = inspect_adapter(path, quick=True)
    places = {name: (WEIGHTS, info) for name, info in read_header(path / WEIGHTS).items()}
    values = {"config": flat(read_config(path)), "norm": {one["name"]: one["norm"] for one in report["matrices"]}}
    return Compared(path, values, places)
