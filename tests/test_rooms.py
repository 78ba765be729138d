"""The rooms of the four packages: imports go one way, and docs/architecture.md names every file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("quant", "models", "parallel", "train")
# From bottom to top, the order of docs/architecture.md. A room is a folder, less the files named on their own.
ORDER: tuple[tuple[str, ...], ...] = (
    ("quant/common",),
    ("quant/kernels",),
    ("quant",),
    ("models/kernels",),
    ("models/blocks",),
    ("models/experts",),
    ("models/attention",),
    ("models/generation",),
    ("models",),
    ("models/checkpoint",),
    ("models/adapters",),
    ("models/hub_contents",),
    ("models/hub_push",),
    (
        "models/load",
        "models/use_kernels",
        "models/convert",
        "models/merge",
        "models/export",
        "models/inspect",
        "models/adapter_names",
        "models/__init__",
    ),
    ("parallel",),
    ("train/config",),
    ("train/rows",),
    ("train/data",),
    ("train/loss", "train/schedule", "train/blockwise", "train/optim", "train/signals", "train/model"),
    ("train/output",),
    ("train/state",),
    ("train",),
    ("train/evaluate",),
    ("train/generate",),
    ("train/demo",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(ORDER) for name in names}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_FILES = 14  # more have a second subject


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def floor_of(name: str) -> int:
    """Of a file, `models/blocks/linear`, or a package, `models/blocks`."""
    if name in FLOOR_OF and not (ROOT / name).is_dir():
        return FLOOR_OF[name]
    return FLOOR_OF[name if (ROOT / name).is_dir() else name.rpartition("/")[0]]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and file (or package) of every import of ours, also of those for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            files = [name for name in inside if (ROOT / f"{name.replace('.', '/')}.py").is_file()]
            names = files or [node.module or ""]
        else:
            continue
        for name in names:
            if name.split(".")[0] in PACKAGES:
                yield node.lineno, name.replace(".", "/")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    here = floor_of(name_of(path))
    for line, name in imported(path):
        assert floor_of(name) <= here, f"{name_of(path)}:{line} imports {name}, which lies above it"


def test_no_files_import_each_other() -> None:
    """Not inside a room either, over any number of files."""
    graph = {name_of(path): {name for _, name in imported(path)} for path in SOURCES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    "room", sorted({path.parent for path in SOURCES}), ids=lambda room: str(room.relative_to(ROOT))
)
def test_a_room_says_what_it_is_and_is_no_hall(room: Path) -> None:
    files = {path.stem for path in room.glob("*.py")} - {"__init__"}
    assert len(files) <= MOST_FILES
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))


def test_the_map_names_every_file() -> None:
    """But those of rooms that it describes by their subjects."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.split("## The folders\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    for path in SOURCES:
        room = path.parent.relative_to(ROOT).as_posix()
        if path.stem != "__init__" and room not in ("train/config", "train/output", "train/state", "train/demo"):
            assert path.stem in named, f"docs/architecture.md doesn't name {name_of(path)}"
    assert {"quant/common", "models/blocks"} <= FLOOR_OF.keys()
