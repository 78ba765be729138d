"""The command that puts a result on the Hugging Face hub: python -m models.hub_push FOLDER USER/NAME

Other commands' `--push` is `add_push_options`, `check_push` before their work and `push` after it.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take their time
    from quant.common.interrupts import end_on_interrupt

    end_on_interrupt()

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.hub_contents import Contents, contents
from quant.common.errors import NibbleError
from quant.common.interrupts import raise_on_interrupt
from quant.common.terminal import exit_code, refuse_empty, run_command, say
from quant.common.words import printable, some

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

_DESCRIPTION = """\
Put an adapter, a checkpoint in the hub's format (merged, or fully fine-tuned) or a converted one on the Hugging Face
hub. The folder is checked first, and sent in one commit: all of it, or nothing. A repository that isn't there is
made, private unless --public is given. Nothing is asked: the token is that of `hf auth login` or of HF_TOKEN."""

_EXAMPLE = """\
example:
  python -m models.hub_push outputs/glm47-qlora/adapter USER/glm47-yaml --dry-run
  python -m models.hub_push outputs/glm47-qlora/adapter USER/glm47-yaml"""

# What a server or a library would load in place of what is sent, or beside it.
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
_SET_UP = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write (https://hf.co/settings/tokens)."


def add_push_options(parser: argparse.ArgumentParser, what: str) -> None:
    """--push and --public, of a command that makes `what`."""
    parser.add_argument("--push", metavar="USER/NAME", help=f"put {what} on the Hugging Face hub at the end")
    parser.add_argument(
        "--public", action="store_true", help="with --push: make a public repository, not a private one"
    )


def check_push(repository: str | None, *, public: bool = False, api: HfApi | None = None) -> None:
    """Find, before long work, what would keep its result from being sent: the name, the token, the connection.

    None asks for nothing. public: whether that was asked for. Raises NibbleError.
    """
    if repository is None:
        if public:
            raise NibbleError("--public is about --push: name a repository with --push USER/NAME.")
        return
    _check_name(repository)
    api = api or _api()
    user = _reach(repository, lambda: api.whoami())
    names = [str(user.get("name")), *(str(one.get("name")) for one in user.get("orgs") or ())]
    owner, role = repository.split("/")[0], ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if owner.lower() not in [name.lower() for name in names]:
        raise NibbleError(
            f"{repository} can't be pushed to: the token is {names[0]}'s, and {owner} is none of their organisations "
            f"({some(names[1:]) or 'they have none'}).\n{_SET_UP}"
        )
    if role == "read":
        raise NibbleError(f"{repository} can't be pushed to: the token may only read.\n{_SET_UP}")


def push(folder: str | Path, repository: str, *, public: bool = False, api: HfApi | None = None) -> str:
    """Send a folder's `contents` in one commit; returns the repository's address.

    public: of a repository that is made here. Raises NibbleError, before anything is sent, where the folder isn't
    whole, where the repository is public and that wasn't asked for, and where it holds other weights, which would be
    loaded in place of these.
    """
    from huggingface_hub import CommitOperationAdd

    _check_name(repository)
    found, api = contents(Path(folder)), api or _api()
    there = _reach(repository, lambda: _repository(api, repository))
    if there is None:
        _reach(repository, lambda: api.create_repo(repository, private=not public))
    else:
        _check_repository(there, repository, found, public)
    adds = [CommitOperationAdd(name, str(found.folder / name)) for name in found.sizes]
    _reach(repository, lambda: api.create_commit(repository, adds, commit_message=f"Upload {found.kind}"))
    return f"{api.endpoint}/{repository}"


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.count("/") == 1:
            return
    except HFValidationError:
        pass
    raise NibbleError(f"{printable(repository, 120)!r} is no name of a repository. Wanted: USER/NAME.")


def _api() -> HfApi:
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        raise NibbleError(f"there is no token for the Hugging Face hub, so that nothing can be pushed.\n{_SET_UP}")
    return HfApi(token=token)


def _repository(api: HfApi, repository: str) -> ModelInfo | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repository)
    except RepositoryNotFoundError:
        return None


def _check_repository(there: ModelInfo, repository: str, found: Contents, public: bool) -> None:
    if not there.private and not public:
        raise NibbleError(f"{repository} is public. Give --public to push to it, or name another repository.")
    names = [entry.rfilename for entry in there.siblings or ()]
    others = [name for name in names if name.endswith(_WEIGHTS) and name not in found.sizes]
    if others:
        raise NibbleError(
            f"{repository} holds other weights, which would be loaded in place of these: {some(others, 3)}.\n"
            "Delete them there, or name another repository."
        )


def _reach(repository: str, body: Any) -> Any:
    """body(), which talks to the hub. Raises NibbleError for what goes wrong with it."""
    try:
        return body()
    except NibbleError:
        raise
    except Exception as error:  # the client's HTTP library, and with it the errors, differ between versions
        status = getattr(getattr(error, "response", None), "status_code", None)
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        why = " ".join(line.strip() for line in lines[:2]) or "no reason given"
        advice = f"\n{_SET_UP}" if status in (401, 403) else ""
        raise NibbleError(
            f"{repository} can't be pushed to: {type(error).__name__}: {printable(why, 300)}{advice}"
        ) from error


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="python -m models.hub_push",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = arguments.add_argument
    add("folder", metavar="FOLDER", help="an adapter, a checkpoint in the hub's format, or a converted one")
    add("repository", metavar="USER/NAME", help="where to; made if it isn't there")
    add("--public", action="store_true", help="make a public repository, or push to one (default: private)")
    add("--dry-run", action="store_true", help="only check the folder and list what would be sent; no connection")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""
    arguments = parser().parse_args(argv)

    def body() -> int:
        refuse_empty(arguments)
        _check_name(arguments.repository)
        found = contents(Path(arguments.folder))
        raise_on_interrupt()
        say(found.text(), sys.stdout)
        if arguments.dry_run:
            visible = "public" if arguments.public else "private"
            say(f"nothing was sent; a new repository {arguments.repository} would be {visible}", sys.stdout)
            return 0
        check_push(arguments.repository, public=arguments.public)
        say(push(found.folder, arguments.repository, public=arguments.public), sys.stdout)
        return 0

    return exit_code(body, "interrupted; nothing is on the hub, and the same command sends it again")


def push_and_say(folder: str | Path, repository: str | None, *, public: bool) -> None:
    """`push`, if there is somewhere to push to, and say where it is now, to standard error."""
    if repository is not None:
        say(f"pushed {folder} to {push(folder, repository, public=public)}", sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
