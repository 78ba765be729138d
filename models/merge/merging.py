"""Merging an adapter into its base: opening both, writing the result, and saying what quantisation did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from models.adapters.packing import Packing
from models.checkpoint.conversion import Interrupted, convert_content
from models.checkpoint.hub import HubCheckpoint, meta_model
from models.checkpoint.hub_id import resolve_model
from models.checkpoint.native import Manifest, is_converted
from models.checkpoint.side_files import CONFIG
from models.merge.content import Merged, Onto
from models.merge.error import Row, summary
from models.merge.folder import write_folder
from models.merge.trained import UNKNOWN, Trained, trained_storage
from quant.common.errors import NibbleError
from quant.common.files import user_path
from quant.storage import StorageSpec

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Summary:
    """What a merge did. stored: how the result is kept. matrices: merged hub tensors. bytes: of the result.

    trained: where the storage of the training is known from. errors: by layer and kind; report: the same in up to three
    lines. seconds: of this run.
    """

    destination: Path
    stored: str
    matrices: int
    bytes: int
    trained: str
    errors: list[Row]
    report: list[str]
    seconds: float


def merge(
    model: str | Path,
    adapter: str | Path,
    destination: str | Path,
    *,
    storage: StorageSpec | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    onto: Onto = "base",
    trained: Trained | None = None,
    layout: Packing | None = None,
    force: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> Summary:
    """See `models.merge_adapter`. storage: of a converted checkpoint, whose other tensors are `dtype`; None writes the
    hub's format. progress(done, total, what): in bytes or parameters, and the file.
    """
    begun = time.monotonic()
    folder, out = resolve_model(model), user_path(destination)
    if is_converted(folder):
        raise NibbleError(
            f"{folder} is a converted checkpoint; an adapter is merged into the hub's format.\n"
            f"Name what it was made from ({Manifest.load(folder).source}), and --storage for a converted result."
        )
    spec, why = trained_storage(Path(adapter), trained)
    if onto == "dequantised" and (why == UNKNOWN or spec.kind == "none"):
        how = "isn't known" if why == UNKNOWN else f"was not quantised ({why})"
        raise NibbleError(
            f"--onto dequantised: the base that {adapter} was trained against {how}.\n"
            "Say how it was stored with --trained-with, or merge onto the base."
        )
    with HubCheckpoint(folder) as base:
        if why == UNKNOWN and not _stores(spec, base):
            spec, why = StorageSpec(), "as its shapes can't be stored as nf4"
        merged = Merged(
            base, str(model), str(adapter), trained=spec, onto=onto, layout=layout, device=device, progress=progress
        )
        if storage is None:
            stored, nbytes = "as the base", base.nbytes
            try:
                write_folder(merged, out, force, progress)
            except KeyboardInterrupt as error:
                raise Interrupted(
                    "interrupted: the shards that are finished are kept.\nThe same command goes on where it stopped."
                ) from error
        else:
            merged.merged = _arguments(adapter, onto, trained, layout)
            result = convert_content(merged, out, storage, dtype, device=device, force=force, progress=progress)
            stored, nbytes = result.stored, result.bytes
        rows = merged.norms.rows()
        return Summary(
            destination=out,
            stored=stored,
            matrices=len(merged.changed),
            bytes=nbytes,
            trained=why,
            errors=rows,
            report=summary(rows, spec, why, onto == "dequantised"),
            seconds=time.monotonic() - begun,
        )


def _stores(spec: StorageSpec, base: HubCheckpoint) -> bool:
    """Whether the base's shapes can be stored so. What else is wrong with it is told where it is opened."""
    try:
        meta_model(base.config, base.shapes, str(base.path / CONFIG), spec, torch.float32)
    except NibbleError:
        return False
    return True


def _arguments(adapter: str | Path, onto: Onto, trained: Trained | None, layout: Packing | None) -> tuple[str, ...]:
    """Of the command that makes the same, for nibble.json."""
    options = {"--onto": None if onto == "base" else onto, "--trained-with": trained, "--layout": layout}
    return (str(adapter), *(part for name, value in options.items() if value is not None for part in (name, value)))
