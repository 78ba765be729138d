"""Adapters on disk: writing one in PEFT's layout (≥ 0.19.1) or any other, and giving a model one of any layout."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from models.adapters.adapter_file import AdapterFile, respelled
from models.adapters.layouts import peft_shapes, prefixes_of, tensor_names, to_peft
from models.adapters.lora import Assign, adapted, assign_whole, attach_lora
from models.adapters.packing import Packing
from models.adapters.peft_config import CONFIG, WEIGHTS, describe, peft_config
from models.adapters.targets import AdapterSpec, Target, resolve
from models.blocks.linear import LoRA
from models.checkpoint.conversion import locked
from models.checkpoint.export import Gather, local_value
from models.checkpoint.keymap import Key, key_map_of
from models.checkpoint.layout import Spelling
from models.checkpoint.tensorfile import TensorWriter
from models.decoder import CausalLM
from quant.choices import named_dtype
from quant.common.errors import NibbleError
from quant.common.files import PARTIAL, disk_error, disk_errors, sync_folder, write_atomically

# --- writing


def save_adapter(
    model: CausalLM,
    directory: str | Path,
    base_model_name_or_path: str,
    *,
    names: Literal["checkpoint"] | Spelling = "checkpoint",
    gather: Gather = local_value,
    writes: bool = True,
) -> None:
    """Write the LoRA of `model` to `directory` so that PEFT and `load_adapter` read it.

    base_model_name_or_path: hub id or folder of the base checkpoint, for PEFT to find it.
    names: `checkpoint` names matrices as the base checkpoint does. PEFT applies an adapter to the class whose names it
        has: `text` is for AutoModelForCausalLM, also of a vision-language checkpoint; `vision-language` for the whole.
    gather, writes: where the model is cut into parts on several processes, all of them call this: `gather` makes one
        tensor of the parts of a parameter, one at a time, and only the process that `writes` touches the disk.
    The tensors keep their dtype. The same adapter always gives the same bytes. A save that fails or is interrupted
    leaves the old adapter or, for a moment at the end, none; never a mixture. Raises NibbleError when the model has no
    adapter or the disk is full.
    """
    key_map = key_map_of(model)
    if names != "checkpoint":
        key_map = respelled(key_map, names)
    found = adapted(model, key_map)
    if not found:
        raise NibbleError("this model has no adapter to save; add_lora or load_adapter gives it one.")
    prefixes = prefixes_of([key for key, _ in found])
    if not writes:
        for _ in _file_tensors(found, prefixes, gather):
            pass
        return
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, directory) from error
    config = peft_config(key_map, found, base_model_name_or_path)
    text, config_path = _as_text(config), directory / CONFIG
    tensors = {}
    for key, lora in found:
        for name, shape in zip(tensor_names(prefixes[key.native]), peft_shapes(key, lora.rank), strict=True):
            tensors[name] = (shape, lora.A.dtype)
    with TensorWriter(directory / WEIGHTS, tensors) as writer:
        for name, tensor in _file_tensors(found, prefixes, gather):
            writer.write(name, tensor)
        if config_path.exists() and config_path.read_bytes() != text:
            # Between the two renames there is no adapter, rather than new weights under an old config.
            config_path.unlink()
        writer.finish()
    write_atomically(config_path, text)


def _file_tensors(
    found: Sequence[tuple[Key, LoRA]], prefixes: Mapping[str, str], gather: Gather
) -> Iterator[tuple[str, Tensor]]:
    for key, lora in found:
        yield from zip(tensor_names(prefixes[key.native]), to_peft(gather(lora.A), gather(lora.B)), strict=True)


def _as_text(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def check_free(out: Path) -> None:
    """Raises NibbleError unless `out` is an empty folder, or nothing."""
    if out.exists() and not out.is_dir():
        raise NibbleError(f"{out} is a file. Name a folder that is empty or isn't there.")
    if out.exists() and (held := sorted(path.name for path in out.iterdir())):
        raise NibbleError(f"{out} holds {held[0]} already. Name a folder that is empty or isn't there.")


def write_new_adapter(
    out: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    values: Iterable[tuple[str, Tensor]],
) -> None:
    """Write an adapter's two files to a folder that is free (`check_free`), both or neither: the folder has another
    name until they are whole. tensors: shapes and dtypes of `values`, which are taken one at a time.

    Raises NibbleError, for a full disk too, after which nothing is left.
    """
    check_free(out)
    real = out.resolve()
    partial = real.with_name(real.name + PARTIAL)
    with locked(partial):
        if others := {path.name.removesuffix(PARTIAL) for path in partial.iterdir()} - {WEIGHTS, CONFIG}:
            raise NibbleError(f"{partial} holds {min(others)}, and isn't an unfinished adapter. Move it away.")
        try:
            with TensorWriter(partial / WEIGHTS, tensors) as writer:
                for name, tensor in values:
                    writer.write(name, tensor)
                writer.finish()
            write_atomically(partial / CONFIG, _as_text(config))
            with disk_errors(out):
                partial.rename(real)
        except BaseException:
            for name in (WEIGHTS, CONFIG):
                (partial / name).unlink(missing_ok=True)
            with suppress(OSError):
                partial.rmdir()
            raise
        sync_folder(real.parent)


# --- reading


def load_adapter(
    model: CausalLM,
    directory: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    expected: AdapterSpec | None = None,
    layout: Packing | None = None,
) -> AdapterSpec:
    """Give `model` the adapter in `directory`, and return its spec. Every other parameter is frozen.

    dtype: of A and B; None is the file's (float32 for a float16 file).
    expected: when given, an adapter of other matrices, ranks, alphas or scaling is refused.
    layout: as for `AdapterFile`, which says what is read and what is refused.
    Raises NibbleError, before the model is touched, for what doesn't fit it.
    """
    file = AdapterFile(directory, key_map_of(model), model.model_type, layout=layout)
    if expected is not None:
        wanted = resolve(key_map_of(model), expected, model.model_type)
        _check_expected(file.targets, file.rslora, wanted, expected.rslora, str(directory))
    attach_lora(model, file.targets, file.rslora, named_dtype(dtype) if dtype is not None else file.dtype)
    _read_weights(model, file, assign_whole)
    return adapter_spec(model)


def read_adapter_weights(
    model: CausalLM, directory: str | Path, assign: Assign = assign_whole, *, layout: Packing | None = None
) -> None:
    """Read the tensors of the adapter that `load_adapter` gave to `model`, once more: for a model that was on the meta
    device then. One matrix or stack at a time is in memory.
    """
    _read_weights(model, AdapterFile(directory, key_map_of(model), model.model_type, layout=layout), assign)


def _read_weights(model: CausalLM, file: AdapterFile, assign: Assign) -> None:
    for pair in file:
        lora = cast(LoRA, model.get_submodule(f"{pair.target.module}.lora"))
        assign(lora.A, pair.a)
        assign(lora.B, pair.b)


def adapter_spec(model: CausalLM) -> AdapterSpec:
    """The spec that describes the adapter of `model`."""
    key_map = key_map_of(model)
    found = adapted(model, key_map)
    if not found:
        raise NibbleError("this model has no adapter.")
    return describe(key_map, found)


def _check_expected(
    targets: Sequence[Target], rslora: bool, wanted: Sequence[Target], wanted_rslora: bool, where: str
) -> None:
    have, want = ({target.module: target for target in side} for side in (targets, wanted))
    ask = "\nMake adapter.targets, rank, alpha, rslora and layers those of the adapter, or leave init_from out."
    for name in (name for name in (*want, *have) if (name in have) != (name in want)):
        has, lacks = ("the adapter", "adapter.targets") if name in have else ("adapter.targets", "the adapter")
        raise NibbleError(f"{where}: {has} adapts {name}, {lacks} does not.{ask}")
    for name, target in have.items():
        for field in ("rank", "alpha"):
            mine, other = getattr(target, field), getattr(want[name], field)
            if mine != other:
                raise NibbleError(f"{where}: {name} has {field} {mine}, adapter.{field} says {other}.{ask}")
    if rslora != wanted_rslora:
        raise NibbleError(f"{where}: use_rslora is {rslora}, adapter.rslora is {wanted_rslora}.{ask}")
