"""Adapters on disk, in PEFT's format (≥ 0.19.1): adapter_config.json and adapter_model.safetensors.

A matrix's tensors are an ordinary LoRA: lora_A [R, in], lora_B [out, R]. A stack of experts is two matrices:

    lora_A [E·R, in]    the experts' A below one another
    lora_B [out, R·E]   column j·E + e is column j of expert e's B

Where both stacks of a layer are adapted PEFT nests them in the order in which they are defined: gate_up_proj's tensors
are at `experts.base_layer.lora_*`, down_proj's at `experts.lora_*`. A single adapted stack is at the latter. The
file doesn't say which stack a tensor belongs to; the config's target_parameters do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models.adapters.lora import Assign, adapted, assign_whole, attach_lora
from models.adapters.peft_config import CONFIG, WEIGHTS, config_targets, describe, peft_config, read_config
from models.adapters.targets import AdapterSpec, Target, module_name, resolve
from models.blocks.groups import GROUP_WORDS, TARGET_GROUPS
from models.blocks.linear import LoRA
from models.checkpoint.export import Gather, local_value
from models.checkpoint.keymap import Key, KeyMap, key_map_of
from models.checkpoint.layout import Layout, Spelling, spellings
from models.checkpoint.tensorfile import DTYPES, TensorInfo, TensorWriter, read_header
from models.decoder import CausalLM
from quant.choices import named_dtype
from quant.common.errors import NibbleError
from quant.common.files import disk_error, write_atomically
from quant.common.words import some

_PREFIX = "base_model.model."
_OLD_LAYOUT = (
    "Its expert tensors have the layout of PEFT before 0.19.1 (in and out swapped), which newer PEFT can't read.\n"
    "Merge it into its base with the PEFT that made it, and train from the merged weights."
)

# --- names


def _respelled(key_map: KeyMap, to: Spelling) -> KeyMap:
    return key_map.laid_out(Layout(wrapped=to == "vision-language", fused=True))


def _tensor_names(keys: Sequence[Key]) -> dict[str, str]:
    """Where the file keeps the A and B of each adapted matrix: native name to prefix."""
    stacks: dict[str, list[str]] = {}
    prefixes = {}
    for key in keys:
        if len(key.shape) == 2:
            prefixes[key.native] = f"{_PREFIX}{module_name(key.hub)}"
        else:
            stacks.setdefault(key.hub.rpartition(".")[0], []).append(key.native)
    for module, natives in stacks.items():
        for depth, native in enumerate(reversed(natives)):
            prefixes[native] = f"{_PREFIX}{module}" + ".base_layer" * depth
    return prefixes


def _file_shapes(key: Key, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    *experts, out_features, in_features = key.shape
    width = rank * (experts[0] if experts else 1)
    return (width, in_features), (out_features, width)


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
        key_map = _respelled(key_map, names)
    found = adapted(model, key_map)
    if not found:
        raise NibbleError("this model has no adapter to save; add_lora or load_adapter gives it one.")
    prefixes = _tensor_names([key for key, _ in found])
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
    text = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    config_path = directory / CONFIG
    tensors = {}
    for key, lora in found:
        for letter, shape in zip("AB", _file_shapes(key, lora.rank), strict=True):
            tensors[f"{prefixes[key.native]}.lora_{letter}.weight"] = (shape, lora.A.dtype)
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
        a, b = gather(lora.A), gather(lora.B)
        if b.ndim == 3:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        yield f"{prefixes[key.native]}.lora_A.weight", a
        yield f"{prefixes[key.native]}.lora_B.weight", b


# --- reading


def load_adapter(
    model: CausalLM,
    directory: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    expected: AdapterSpec | None = None,
) -> AdapterSpec:
    """Give `model` the adapter in `directory`, and return its spec. Every other parameter is frozen.

    dtype: of A and B; None is the file's (float32 for a float16 file).
    expected: when given, an adapter of other matrices, ranks, alphas or scaling is refused.
    The adapter's names may be those of the text model or of the vision-language model, whichever the checkpoint is.
    Raises NibbleError, before the model is touched, for a feature that isn't plain LoRA, a target that matches nothing,
    and tensors that are missing, unknown or of the wrong shape.
    """
    directory = Path(directory)
    config, key_map, where = read_config(directory), key_map_of(model), str(directory)
    header = read_header(directory / WEIGHTS)
    spelt = spellings(header)
    if len(spelt) == 1:
        key_map = _respelled(key_map, *spelt)
    targets = config_targets(config, key_map, header, where, model.model_type)
    _check_tensors(targets, header, config, key_map, where)
    rslora = bool(config.get("use_rslora"))
    if expected is not None:
        _check_expected(targets, rslora, resolve(key_map, expected, model.model_type), expected.rslora, where)
    if dtype is None:
        stored = {DTYPES.get(info.dtype) for info in header.values()}
        dtype = torch.bfloat16 if stored == {torch.bfloat16} else torch.float32
    attach_lora(model, targets, rslora, named_dtype(dtype))
    read_adapter_weights(model, directory)
    return adapter_spec(model)


def read_adapter_weights(model: CausalLM, directory: str | Path, assign: Assign = assign_whole) -> None:
    """Read the tensors of the adapter that `load_adapter` gave to `model`, once more: for a model that was on the meta
    device then. One tensor at a time is in memory.
    """
    from safetensors import safe_open

    path, key_map = Path(directory) / WEIGHTS, key_map_of(model)
    spelt = spellings(read_header(path))
    found = adapted(model, _respelled(key_map, *spelt) if len(spelt) == 1 else key_map)
    prefixes = _tensor_names([key for key, _ in found])
    with safe_open(path, framework="pt") as file:
        for key, lora in found:
            a: Tensor = file.get_tensor(f"{prefixes[key.native]}.lora_A.weight")
            b: Tensor = file.get_tensor(f"{prefixes[key.native]}.lora_B.weight")
            if len(key.shape) == 3:
                experts = key.shape[0]
                a, b = a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
            assign(lora.A, a)
            assign(lora.B, b)


def adapter_spec(model: CausalLM) -> AdapterSpec:
    """The spec that describes the adapter of `model`."""
    key_map = key_map_of(model)
    found = adapted(model, key_map)
    if not found:
        raise NibbleError("this model has no adapter.")
    return describe(key_map, found)


def _check_tensors(
    targets: Sequence[Target], header: Mapping[str, TensorInfo], config: Mapping[str, Any], key_map: KeyMap, where: str
) -> None:
    version = tuple(int(part) for part in re.findall(r"\d+", str(config.get("peft_version") or ""))[:3])
    if version and version < (0, 19, 1) and any(len(target.key.shape) == 3 for target in targets):
        raise NibbleError(f"{where}: made by PEFT {config['peft_version']}. {_OLD_LAYOUT}")
    prefixes = _tensor_names([target.key for target in targets])
    expected: dict[str, tuple[int, int]] = {}
    for target in targets:
        prefix, shapes = prefixes[target.key.native], _file_shapes(target.key, target.rank)
        names = [f"{prefix}.lora_{letter}.weight" for letter in "AB"]
        expected.update(zip(names, shapes, strict=True))
        swapped = [(shapes[0][0], shapes[1][0]), (shapes[0][1], shapes[1][1])]
        stored = [header[name].shape if name in header else () for name in names]
        if len(target.key.shape) == 3 and stored != list(shapes) and stored == swapped:
            raise NibbleError(f"{where}: {names[0]} is {list(stored[0])}. {_OLD_LAYOUT}")
    unknown, missing = sorted(header.keys() - expected.keys()), sorted(expected.keys() - header.keys())
    if unknown:
        hint = "\nThe config and the tensors don't belong together, or the adapter is for another model."
        groups = {module_name(key.hub): key.group for key in key_map.keys if key.group not in TARGET_GROUPS}
        for name in unknown:
            module = name.removeprefix(_PREFIX).rpartition(".lora_")[0]
            if module in groups:
                can = ", ".join(TARGET_GROUPS)
                hint = f"\n{module} is of the {GROUP_WORDS[groups[module]]}; LoRA is supported on {can}."
            if re.search(r"\b(visual|vision_tower|vision_model)\b", module):
                hint = "\nIt adapts the vision tower, which isn't computed here: only adapters of the text model load."
        if any(re.search(r"experts\.\d+\.", name) for name in unknown):
            hint = (
                "\nIt adapts the experts one by one, as transformers 4 has them. "
                "Load it with PEFT on transformers 5 and save it again."
            )
        raise NibbleError(f"{where}: {some(unknown, 3)} in {WEIGHTS}, which {CONFIG} doesn't name.{hint}")
    if missing:
        raise NibbleError(f"{where}: {WEIGHTS} lacks {some(missing, 3)}, which {CONFIG} names for this model.")
    for name, shape in expected.items():
        if header[name].shape != shape:
            raise NibbleError(
                f"{where}: {name} is {list(header[name].shape)}; this model and the rank make it {list(shape)}."
            )


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
