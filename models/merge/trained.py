"""How the base was stored when an adapter was trained: what its run says, or QLoRA's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast, get_args

from quant.common.errors import NibbleError
from quant.common.words import shown
from quant.storage import Kind, StorageSpec

# With -single: without quantising the scales too.
Trained = Literal["none", "nf4", "nf4-single", "fp4", "fp4-single", "int8"]
TRAINED: tuple[Trained, ...] = get_args(Trained)
UNKNOWN = "as none is known: --trained-with"
_RUN = "config.yaml"  # in the folder of a run, whose adapter/ is the adapter
_LARGEST = 2**20  # bytes of such a file


def trained_storage(adapter: Path, given: Trained | None) -> tuple[StorageSpec, str]:
    """The storage, and where it is known from, in words (UNKNOWN: supposed). given: by the user. Raises NibbleError."""
    if given is not None:
        kind, _, single = given.partition("-")
        return StorageSpec(cast(Kind, kind), not single), "as given"
    plain = adapter.name not in ("", "..") and not adapter.is_symlink()
    path = (adapter if plain else adapter.resolve()).parent / _RUN
    model = _model_section(path)
    if "storage" in model:
        double = model.get("double_quant")  # null: true for 4 bits
        try:
            if not isinstance(double, bool | None):
                raise NibbleError(f"model.double_quant is {shown(double)}")
            return StorageSpec(model["storage"], double is not False), f"as {path} says"
        except NibbleError as error:
            raise NibbleError(f"{path}: {error}.\nSay how the base was stored: --trained-with.") from error
    return StorageSpec("nf4"), UNKNOWN


def _model_section(path: Path) -> dict[str, Any]:
    """`model` in the config of a run; empty where there is none."""
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return {}
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return {}  # some other program's
    model = config.get("model") if isinstance(config, dict) else None
    return model if isinstance(model, dict) else {}
