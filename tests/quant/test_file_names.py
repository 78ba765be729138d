"""Names out of other people's files, paths of other users, and files that options name."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.common.errors import NibbleError
from quant.common.files import check_outputs, is_file_name, user_path


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


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"--a": "rows"}, "--a: rows would replace .*/rows, which this command reads"),
        ({"--a": "link"}, "--a: link would replace"),
        ({"--a": "behind"}, "--a: behind would replace"),
        ({"--a": "being"}, "--a: being would replace .*/being.partial"),
        ({"--a": "model/weights"}, "--a: model/weights is in a folder that this command reads"),
        ({"--a": "new", "--b": "./new"}, "--a and --b can't both be new"),
        ({"--a": "new", "--b": "new.partial"}, "--a and --b can't both be new.partial"),
        ({"--a": "model"}, "--a: model is a folder"),
        ({"--a": "no/new"}, "--a: no/new is in a folder that is not there"),
        ({"--a": "/dev/null"}, "--a: /dev/null is no regular file"),
        ({"--a": "/proc/new"}, "/proc/new can't be written: "),
        ({"--a": "n" * 250}, "n can't be written: File name too long"),
    ],
)
def test_files_that_options_name(
    outputs: dict[str, str | None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("rows", "model/weights", "behind", "being.partial", "mine"):
        (tmp_path / name).write_text("kept")
    (tmp_path / "link").symlink_to("behind")
    before = sorted(tmp_path.rglob("*"))
    inputs = ["rows", "link", "being.partial", "model", "a/hub-id", None]
    with pytest.raises(NibbleError, match=message):
        check_outputs(outputs, inputs)
    check_outputs({"--a": "mine", "--b": "model/new", "--c": None}, inputs)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "mine").read_text() == "kept"
