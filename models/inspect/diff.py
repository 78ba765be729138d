"""In what two checkpoints, or two adapters, differ: configs, files beside the weights, and every tensor's bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoint.tensorfile import TensorInfo
from quant.common.errors import NibbleError
from quant.common.words import shown

_AT_ONCE = 4 * 2**20  # bytes


@dataclass(frozen=True)
class Difference:
    """what: config, tensor, file …; name: which; here, there: its two values, None where a side has none."""

    what: str
    name: str
    here: Any
    there: Any

    def __str__(self) -> str:
        here, there = map(_text, (self.here, self.there))
        return f"{self.what:<8} {self.name}: {here} | {there}"


def _text(value: Any) -> str:
    if value is None:
        return "absent"
    return f"{value:.9g}" if isinstance(value, float) else shown(value, 60)


@dataclass(frozen=True)
class Compared:
    """One side. values: what is compared by what it is called, then by name. places: of every tensor, the file in
    `path` and where in it. files: others, to be compared as they are.
    """

    path: Path
    values: Mapping[str, Mapping[str, Any]]
    places: Mapping[str, tuple[str, TensorInfo]]
    files: tuple[str, ...] = ()


def differences(
    here: Compared, there: Compared, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Difference]:
    """All of them, in the order of `values`, then tensors, then files. progress(done, total): bytes of tensors."""
    for what in here.values:
        yield from _values(what, here.values[what], there.values[what])
    yield from _tensors(here, there, progress)
    for name in dict.fromkeys((*here.files, *there.files)):
        if name not in there.files or name not in here.files:
            yield Difference("file", name, *(_there(name in side.files) for side in (here, there)))
        elif not _same_bytes(here.path / name, there.path / name):
            yield Difference("file", name, *(f"{(side.path / name).stat().st_size:,} bytes" for side in (here, there)))


def _values(what: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[Difference]:
    absent = object()
    for name in dict.fromkeys((*here, *there)):
        mine, other = here.get(name, absent), there.get(name, absent)
        # Of JSON's true and 1 only one is a number; repr tells them apart inside lists too.
        if mine != other or repr(mine) != repr(other):
            yield Difference(what, name, *(_value(value, absent) for value in (mine, other)))


def _value(value: Any, absent: object) -> Any:
    return None if value is absent else "null" if value is None else value


def _there(present: bool) -> str | None:
    return "present" if present else None


def _tensors(here: Compared, there: Compared, progress: Callable[[int, int], None]) -> Iterator[Difference]:
    total, done = sum(info.end - info.begin for _, info in here.places.values()), 0
    for name in dict.fromkeys((*here.places, *there.places)):
        if name not in there.places or name not in here.places:
            kinds = (_kind(side.places[name][1]) if name in side.places else None for side in (here, there))
            yield Difference("tensor", name, *kinds)
            continue
        (mine, info), (other, info_there) = here.places[name], there.places[name]
        if _kind(info) != _kind(info_there):
            yield Difference("tensor", name, _kind(info), _kind(info_there))
        elif not _same_bytes(here.path / mine, there.path / other, info, info_there):
            yield Difference("tensor", name, _kind(info), "other values")
        done += info.end - info.begin
        progress(done, total)


def _kind(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def _same_bytes(here: Path, there: Path, info: TensorInfo | None = None, info_there: TensorInfo | None = None) -> bool:
    """Whether two files, or two parts of them of the same length, hold the same bytes."""
    try:
        with here.open("rb", 0) as one, there.open("rb", 0) as two:
            begin, other = (part.begin if part else 0 for part in (info, info_there))
            end = info.end if info else os.fstat(one.fileno()).st_size
            if os.path.sameopenfile(one.fileno(), two.fileno()) and begin == other:
                return True
            if info is None and end != os.fstat(two.fileno()).st_size:
                return False
            return all(
                os.pread(one.fileno(), min(_AT_ONCE, end - at), at)
                == os.pread(two.fileno(), min(_AT_ONCE, end - at), at - begin + other)
                for at in range(begin, end, _AT_ONCE)
            )
    except OSError as error:
        raise NibbleError(f"{error.filename or here} can't be read: {error.strerror}.") from error
