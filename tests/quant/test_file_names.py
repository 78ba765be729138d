"""Names out of other people's files, and paths of other users."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.common.errors import NibbleError
from quant.common.files import is_file_name, user_path


@pytest.mark.parametrize("name", ["a", "a/b", ".a", "..a", "ä" * 127, "/".join(["a" * 255] * 4)])
def test_names_that_a_file_can_have(name: str, tmp_path: Path) -> None:
    assert is_file_name(name)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/a", "a/", "a//b", "a/../b", "a\0b", "\ud800", "a" * 256, "ä" * 128, "/".join(["a"] * 2000)],
)
def test_names_that_a_file_below_a_folder_can_not_have(name: str) -> None:
    assert not is_file_name(name)


def test_a_users_folder() -> None:
    assert user_path("~/x") == Path.home() / "x"
    assert user_path("a/~b") == Path("a/~b")
    with pytest.raises(
        NibbleError, match=r"^~nosuchuser: this machine has no user nosuchuser, whose folder ~ means\.$"
    ):
        user_path(Path("~nosuchuser"))
