"""What goes with a checkpoint's weights into a conversion or an export: config.json, tokenizer, templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant.common.errors import NibbleError
from quant.common.files import is_file_name
from quant.common.jsonfile import MAX_BYTES, read_json
from quant.common.words import some

CONFIG = "config.json"
# Everything beside the weights that a tokenizer, a chat template or generation needs.
SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    # What a vision-language model makes of images and videos: not needed here, but by those who get an export.
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)

# Templates by name, beside the default one, as transformers keeps them.
TEMPLATES = "additional_chat_templates"


def read_config(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """config.json of a hub or converted folder: its bytes, and the object. Raises NibbleError."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "doesn't exist"
        raise NibbleError(f"{folder} {what}. Wanted: a folder with {CONFIG} and *.safetensors.")
    path = folder / CONFIG
    if not path.is_file():
        raise NibbleError(
            f"{folder}: there is no {CONFIG}, so this isn't a checkpoint folder.\n{what_is_there(folder)}"
        )
    config = read_json(path, dict)
    return path.read_bytes(), config


def what_is_there(folder: Path) -> str:
    """The files of a folder, for a message about one that isn't there."""
    names = sorted(entry.name for entry in folder.iterdir())
    return f"It holds: {some(names)}." if names else "It is empty."


def is_plain(name: str) -> bool:
    """Whether a name out of a file is that of a file in the same folder (or a template in its folder of them)."""
    path = Path(name)
    template = name == f"{TEMPLATES}/{path.name}" and path.suffix == ".jinja"
    return is_file_name(name) and (path.name == name or template)


def side_names(folder: Path) -> list[str]:
    """The names of those that `folder` has."""
    names = [*SIDE_FILES, *(f"{TEMPLATES}/{path.name}" for path in sorted((folder / TEMPLATES).glob("*.jinja")))]
    return [name for name in names if (folder / name).is_file()]


def side_files(folder: Path) -> dict[str, bytes]:
    """What goes with the weights into a conversion or an export, by name, as far as `folder` has it.

    Raises NibbleError for a link that leads out of the folder: what it would copy is nobody's to give. The hub's cache
    is made of links into its own store, which is followed.
    """
    found = {}
    for name in side_names(folder):
        path = folder / name
        real = path.resolve()
        store = next((part for part in folder.absolute().parents if part.name.startswith("models--")), None)
        inside = [folder.resolve(), *([store.resolve()] if store is not None else [])]
        if not any(real.is_relative_to(root) for root in inside):
            raise NibbleError(
                f"{path} is a link to {real}, outside the checkpoint's folder, and isn't copied.\n"
                "Put the file itself there, or remove the link."
            )
        try:
            if real.stat().st_size > MAX_BYTES:
                raise NibbleError(f"{path} has {real.stat().st_size:,} bytes, too many for such a file.")
            found[name] = real.read_bytes()
        except OSError as error:
            raise NibbleError(f"{path} can't be read: {error.strerror}.") from error
    return found
