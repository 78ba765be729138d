"""From a folder on disk to a model on a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.adapters.packing import Packing
from models.checkpoint.content import check_content
from models.checkpoint.hub import HubCheckpoint, check_counts
from models.checkpoint.hub_id import hub_id_of, resolve_model
from models.checkpoint.keymap import KeyMap, key_map_of
from models.checkpoint.native import (
    MANIFEST,
    Manifest,
    NativeCheckpoint,
    convert_command,
    describe,
    dtype_name,
    is_converted,
    require_same_config,
    wrong_sizes,
)
from models.checkpoint.side_files import read_config
from models.checkpoint.stream import LEFT_OUT, HubReader, Reader
from models.decoder import CausalLM
from models.registry import architecture_for
from quant.choices import named_device, named_dtype
from quant.common.errors import NibbleError
from quant.common.progress import Bar
from quant.common.words import counted, some
from quant.storage import Kind, StorageSpec

log = logging.getLogger("nibble")


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint folder of either kind, with its weights unread; config.json and tokenizer files are in `path`.

    name: what to call the base model in an adapter's configuration: the hub id where it is known, otherwise what the
    user named. manifest: of a converted folder; None for a hub folder.
    """

    path: Path
    name: str
    config: dict[str, Any]
    manifest: Manifest | None

    def stored(
        self, storage: str | None = None, double_quant: bool | None = None, dtype: str | None = None
    ) -> tuple[str, bool, str]:
        """Storage, double_quant and dtype to load it with, by name. What is None is as a converted folder has it, else
        nf4, whether the storage has 4 bits, and bfloat16.
        """
        made = self.manifest
        kind = storage or (made.spec.kind if made else "nf4")
        if double_quant is None:
            double_quant = made.spec.double_quant if made and made.spec.kind == kind else kind in ("nf4", "fp4")
        return kind, double_quant, dtype or (dtype_name(made.dtype) if made else "bfloat16")


def open_folder(path_or_id: str | Path) -> ModelFolder:
    """Find a checkpoint (a hub id is downloaded) and read its config and manifest. Raises NibbleError."""
    folder = resolve_model(path_or_id)
    _, config = read_config(folder)
    manifest = Manifest.load(folder) if is_converted(folder) else None
    if manifest is not None:
        require_same_config(folder, config, manifest)
    name = manifest.source if manifest else str(path_or_id)
    return ModelFolder(folder, hub_id_of(Path(name)) or name, config, manifest)


def load_model(
    path: str | Path,
    storage: str = "nf4",
    dtype: torch.dtype | str = "bfloat16",
    device: torch.device | str = "cpu",
    adapter: str | Path | None = None,
    *,
    double_quant: bool = True,
    layout: Packing | None = None,
    progress: bool = False,
) -> CausalLM:
    """A model ready to compute with, in evaluation mode, all parameters frozen but those of an adapter.

    path: a hub-format folder (quantised while it is read, or a converted copy beside it is used), a converted folder,
        or a hub id.
    storage: of frozen matrices: none, nf4, fp4 or int8. double_quant: quantise the scales of 4-bit blocks too.
    dtype: bfloat16 or float32, of activations and of everything that isn't quantised, but for what the architecture
        keeps in float32 (routers, Trinity's norms, DeltaNet's decay).
    device: cpu, cuda or cuda:<number>.
    adapter: folder of a PEFT adapter to put on top. layout: order of the experts in its lora_B, where that isn't what
        the adapter says.
    progress: show a bar on standard error where that is a terminal.

    Raises NibbleError for a storage, dtype or device that isn't there, and where the checkpoint is missing, damaged,
    doesn't fit its config, or is stored otherwise than asked for.
    """
    device = named_device(device)
    model, reader = prepare_model(path, storage, dtype, device, double_quant=double_quant)
    allocate(model, device)
    with Bar("loading", show=progress) as bar:
        fill(dict(model.named_parameters()) | dict(model.named_buffers()), reader, bar.update)
    model.requires_grad_(False)
    model.eval()
    if adapter is not None:
        from models.adapters.files import load_adapter

        load_adapter(model, Path(adapter), layout=layout)
    return model


def prepare_model(
    path: str | Path,
    storage: str = "nf4",
    dtype: torch.dtype | str = "bfloat16",
    device: torch.device | str = "cpu",
    *,
    double_quant: bool = True,
    verify: bool = True,
) -> tuple[CausalLM, Reader]:
    """The model on the meta device, and what its weights are read from; arguments and errors as for `load_model`.

    device: where matrices of a hub checkpoint are quantised. verify: compare the files of a converted checkpoint with
    their checksums (`check_content`); of several processes that read one folder, one is enough.
    """
    spec, dtype = StorageSpec(cast(Kind, storage), double_quant), named_dtype(dtype)
    folder = open_folder(path)
    where = str(folder.path / "config.json")
    architecture = architecture_for(folder.config, where)
    config = architecture.parse_config(folder.config, where)
    checkpoint = HubCheckpoint(folder.path) if folder.manifest is None else _converted(folder.path, spec, dtype)
    check_counts(checkpoint.shapes, config.layers, config.experts, where)
    model = architecture.build(config, spec, dtype, "meta")
    keys = key_map_of(model)
    if isinstance(checkpoint, HubCheckpoint):
        copy = find_converted(checkpoint, spec, dtype)
        if copy is None:
            return model, _hub_reader(checkpoint, keys, device)
        log.info("%s: using the converted copy %s", folder.path, copy.path)
        checkpoint = copy
    if verify:
        check_content(checkpoint.path, checkpoint.manifest)
    return model, checkpoint.bind(keys.keys)


def _hub_reader(checkpoint: HubCheckpoint, keys: KeyMap, device: torch.device | str) -> HubReader:
    reader = HubReader(checkpoint, keys, device)
    if reader.carried:
        log.info("%s: %s: %s", checkpoint.path, LEFT_OUT, reader.left_out())
    return reader


def find_converted(checkpoint: HubCheckpoint, spec: StorageSpec, dtype: torch.dtype) -> NativeCheckpoint | None:
    """A whole converted copy, beside the hub folder, of just this content, storage and dtype; None if there is none."""
    beside = checkpoint.path.absolute().parent
    for manifest_path in sorted(beside.glob(f"*/{MANIFEST}")):
        try:
            manifest = Manifest.load(manifest_path.parent)
        except NibbleError as error:
            log.warning("not used: %s", error)
            continue
        if not manifest.complete or (manifest.spec, manifest.dtype) != (spec, dtype):
            continue
        renew = f"To be sure, convert {manifest_path.parent} again with --force."
        if not checkpoint.has_fingerprint(manifest.fingerprint, renew):
            continue
        if wrong := wrong_sizes(manifest_path.parent, manifest):
            log.warning("%s is a converted copy but not used: %s", manifest_path.parent, some(wrong))
            continue
        return NativeCheckpoint(manifest_path.parent)
    return None


def _converted(folder: Path, spec: StorageSpec, dtype: torch.dtype) -> NativeCheckpoint:
    checkpoint = NativeCheckpoint(folder)
    found = checkpoint.manifest
    if (found.spec, found.dtype) != (spec, dtype):
        other = Manifest(found.model_type, spec, dtype, found.source, "", {})
        raise NibbleError(
            f"{folder} is converted to {describe(found.spec, found.dtype)}; asked for is {describe(spec, dtype)}.\n"
            f"Ask for what is there, or convert again: {convert_command(other, Path(f'{folder}-{spec.kind}'))}"
        )
    return checkpoint


def fill(
    tensors: Mapping[str, Tensor],
    reader: Reader,
    progress: Callable[[int, int], None] | None = None,
    *,
    experts: Mapping[str, range] | None = None,
    cut: Callable[[str, Tensor], Tensor] = lambda name, value: value,
) -> None:
    """Stream a checkpoint into a model's tensors, by their native names.

    progress(done, total): of dense values. experts: by native name of a stack, the consecutive experts that its tensors
    hold; all where it isn't named. cut(name, value): the rows that are held of a tensor that is no expert's.
    Raises NibbleError naming tensors that the checkpoint left unfilled.
    """
    total = sum(torch.Size(key.shape).numel() for key in reader.keys)
    filled, done = dict.fromkeys(tensors, 0), 0
    with torch.no_grad():
        for key in reader.keys:
            held = (experts or {}).get(key.native)
            first = held.start if held is not None else 0
            for piece in reader.read(key, held):
                for name, value in piece.tensors.items():
                    target = tensors[name]
                    if piece.start is None:
                        value = cut(name, value)
                    else:
                        target = target[piece.start - first :][: value.shape[0]]
                    if target.shape != value.shape or target.dtype != value.dtype:
                        raise ValueError(
                            f"{name}: {tuple(value.shape)} {value.dtype} for {tuple(target.shape)} {target.dtype}"
                        )
                    target.copy_(value)
                    filled[name] += value.numel()
            done += torch.Size(key.shape).numel()
            if progress is not None:
                progress(done, total)
    wrong = sorted(name for name, tensor in tensors.items() if filled[name] != tensor.numel())
    if wrong:
        raise NibbleError(
            f"{counted(len(wrong), 'tensor')} of the model not filled from the checkpoint: {some(wrong)}."
        )


def allocate(model: CausalLM, device: torch.device | str) -> None:
    """Replace a model's meta tensors by uninitialised ones on `device`, one by one, keeping tied ones tied."""

    def empty(tensor: Tensor) -> Tensor:  # not empty_like, which of a meta tensor brings sympy: 0.7 s
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(empty(parameter), requires_grad=False)
            setattr(module, name, made[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, empty(buffer))
