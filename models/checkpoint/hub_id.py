"""Hub ids, the folders that they mean on this machine, and downloading one that isn't there yet."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from models.checkpoint.side_files import CONFIG
from quant.common.errors import NibbleError
from quant.common.files import user_path

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Of the folders in a repository only the templates' is wanted; the * of these patterns takes in slashes.
_FETCHED = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt")
_NOT_FETCHED = ("*/*.safetensors", "*/*.json", "*/*.model", "*/tokenizer*", *(f"*{end}" for end in PICKLES), "*.py")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The organisations that publish the supported models, to name a whole hub id where only a folder's name is known.
_ORGANISATIONS = {"GLM-": "zai-org", "Qwen": "Qwen", "Trinity-": "arcee-ai"}


def hub_id_of(folder: Path) -> str | None:
    """The hub id that a folder was downloaded from, as far as its path tells; None where it doesn't."""
    for part in folder.absolute().parts:
        if part.startswith("models--") and part.count("--") == 2:  # the hub cache: models--org--name/snapshots/…
            return part.removeprefix("models--").replace("--", "/")
    return None


def _likely_hub_id(folder: Path) -> str:
    for prefix, organisation in _ORGANISATIONS.items():
        if folder.name.startswith(prefix):
            return f"{organisation}/{folder.name}"
    return f"ORGANISATION/{folder.name}"


def downloaded_sums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """By name, the SHA-256 that the hub gave for files of a folder, in hexadecimal; files without one are left out.

    Of large files the hub's cache has it as the name of the file that a link leads to, and a folder that was downloaded
    with --local-dir in a line of `.cache/huggingface/download/NAME.metadata`. Small ones have another kind of hash.
    """
    found = {}
    for name in names:
        path, given = folder / name, ""
        metadata = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        if path.is_symlink():
            given = path.resolve().name
        elif metadata.is_file():
            given = "".join(metadata.read_text(errors="replace")[:1000].splitlines()[1:2])
        if re.fullmatch("[0-9a-f]{64}", given):
            found[name] = given
    return found


def download_command(folder: Path, file: str = "") -> str:
    """The command that fetches a whole checkpoint, or one file of it, into `folder`."""
    repository = hub_id_of(folder) or _likely_hub_id(folder)
    return shlex.join(["hf", "download", repository, *filter(None, [file]), "--local-dir", str(folder)])


def looks_like_hub_id(path: str) -> bool:
    """Whether a name that is no folder here can be meant as a hub id: org/name, and org is no folder here either."""
    return _HUB_ID.fullmatch(path) is not None and not os.path.exists(Path(path).parent)


def resolve_model(path_or_id: str | Path) -> Path:
    """The folder of a checkpoint: a folder as it is; a hub id ("zai-org/GLM-4.7-Flash") is fetched to the hub's cache.

    Only safetensors, JSON, tokenizer and template files are fetched. Raises NibbleError where there is neither.
    """
    folder = user_path(path_or_id)
    if os.path.exists(folder):  # which, unlike Path.exists, is false for a name that is too long
        return folder
    name = str(path_or_id)
    if not looks_like_hub_id(name):
        raise NibbleError(
            f"{name} doesn't exist. Wanted: a checkpoint folder, or a hub id such as zai-org/GLM-4.7-Flash."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        found = snapshot_download(
            name,
            allow_patterns=[*_FETCHED],
            ignore_patterns=[*_NOT_FETCHED],
        )
        return Path(found)
    except GatedRepoError as error:
        why = "the hub gives it only to those who accepted its conditions: do so on its page, then `hf auth login`"
        raise NibbleError(_not_fetched(name, why)) from error
    except RepositoryNotFoundError as error:
        raise NibbleError(
            _not_fetched(name, "the hub has no such model, or it is private (`hf auth login`)")
        ) from error
    except LocalEntryNotFoundError as error:
        raise NibbleError(_not_fetched(name, "the hub can't be reached and the hub cache doesn't hold it")) from error
    except Exception as error:  # the client's HTTP library, and with it the errors, differ between versions
        first = next(iter(str(error).strip().splitlines()), "no reason given")
        raise NibbleError(_not_fetched(name, f"{type(error).__name__}: {first}")) from error


def _not_fetched(name: str, why: str) -> str:
    folder = Path("checkpoints") / name.split("/")[1]
    return (
        f"{name} is no folder here and could not be fetched from the hub: {why}.\n"
        f"Where there is a connection: hf download {name} --local-dir {folder}\n"
        f"Then set model.path (or the argument) to that folder."
    )


def local_folder(name: str) -> Path | None:
    """The folder that a name meant (a folder, or a hub id in the hub's cache) if it is on this machine."""
    folder = user_path(name)
    if os.path.isdir(folder):
        return folder
    if not looks_like_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CONFIG)
    return Path(found).parent if isinstance(found, str) else None
