"""What of a folder would be put on the hub: an adapter, or a checkpoint of either format, if it is whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quant.common.errors import NibbleError
from quant.common.words import format_bytes, printable, some, table

README = "README.md"


@dataclass(frozen=True)
class Contents:
    """What would be sent of `folder`. sizes: bytes by name. left: what else is there. remarks: what to know of it."""

    folder: Path
    kind: str
    sizes: dict[str, int]
    left: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    def text(self) -> str:
        total = format_bytes(sum(self.sizes.values()))
        rows = [(name, format_bytes(size)) for name, size in self.sizes.items()]
        lines = [f"{self.folder}: {self.kind}, {len(self.sizes)} files, {total}"]
        lines.append(table([("file", "size"), *rows], right=(1,)))
        lines += [f"not sent: {some(list(self.left), 8)}"] if self.left else []
        return "\n".join([*lines, *self.remarks])


def contents(folder: Path) -> Contents:
    """What is to be sent of a folder. Raises NibbleError where it isn't whole, or is none of the three kinds."""
    from models.adapters.peft_config import CONFIG as ADAPTER_CONFIG
    from models.checkpoint.native import MANIFEST
    from models.checkpoint.side_files import CONFIG

    if (folder / ADAPTER_CONFIG).is_file():
        kind, names, remarks = _adapter(folder)
    elif (folder / MANIFEST).is_file():
        kind, names, remarks = _converted(folder)
    elif (folder / CONFIG).is_file():
        kind, names, remarks = _checkpoint(folder)
    else:
        inside = next((path.parent for path in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))), None)
        hint = f"Did you mean {inside}?" if inside else f"One of {ADAPTER_CONFIG}, {MANIFEST}, {CONFIG} would be there."
        what = "neither an adapter nor a checkpoint" if folder.is_dir() else "no folder"
        raise NibbleError(f"{folder} is {what}.\n{hint}")
    names = list(dict.fromkeys([*names, *([README] if (folder / README).is_file() else [])]))
    for name in names:
        if (folder / name).is_symlink() and not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise NibbleError(
                f"{folder / name} is a link out of the folder, and isn't sent.\nPut the file itself there."
            )
    others = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    left = tuple(printable(name, 80) for name in others if name not in names)
    return Contents(folder, kind, {name: (folder / name).stat().st_size for name in names}, left, remarks)


_Found = tuple[str, list[str], tuple[str, ...]]


def _adapter(folder: Path) -> _Found:
    from safetensors import safe_open

    from models.adapters.peft_config import CONFIG, WEIGHTS, read_config
    from models.checkpoint.tensorfile import read_header
    from quant.storage import all_finite

    base = read_config(folder).get("base_model_name_or_path")
    names = read_header(folder / WEIGHTS).keys()
    if not names:
        raise NibbleError(f"{folder / WEIGHTS} has no tensors.")
    with safe_open(folder / WEIGHTS, "pt") as file:
        for name in names:
            other = name.replace(*((".lora_A.", ".lora_B.") if ".lora_A." in name else (".lora_B.", ".lora_A.")))
            if other not in names:
                raise NibbleError(f"{folder / WEIGHTS} has {printable(name, 200)}, but not {printable(other, 200)}.")
            if not all_finite(file.get_tensor(name)):
                raise NibbleError(f"{folder / WEIGHTS}: {printable(name, 200)} has values that are inf or NaN.")
    known = isinstance(base, str) and base and not base.startswith(("/", ".", "~")) and not Path(base).exists()
    remark = f"{CONFIG} names {printable(str(base), 120)} as its base: others need the base's hub id there"
    return "an adapter", [CONFIG, WEIGHTS], () if known else (remark,)


def _converted(folder: Path) -> _Found:
    from models.checkpoint.content import check_content
    from models.checkpoint.native import MANIFEST, NativeCheckpoint, describe

    manifest = NativeCheckpoint(folder).manifest
    absent = [name for name in manifest.files if not (folder / name).is_file()]
    if absent:
        raise NibbleError(f"{folder} lacks {some(absent)}, which {MANIFEST} names.\nConvert it again.")
    check_content(folder, manifest)
    return f"a converted checkpoint ({describe(manifest.spec, manifest.dtype)})", [MANIFEST, *manifest.files], ()


def _checkpoint(folder: Path) -> _Found:
    from models.checkpoint.hub import INDEX, HubCheckpoint
    from models.checkpoint.side_files import side_names

    with HubCheckpoint(folder) as checkpoint:
        shards = sorted(checkpoint.headers)
    index = [INDEX] if (folder / INDEX).is_file() else []
    return "a checkpoint in the hub's format", [*side_names(folder), *index, *shards], ()
