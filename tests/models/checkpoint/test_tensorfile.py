"""Safetensors files: written in pieces, and headers that are checked before they are believed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.checkpoint.tensorfile import TensorWriter, read_header
from quant.common.errors import NibbleError


def test_writer_in_pieces_equals_the_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "packed": torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8),
        "scale": torch.randn(3, 5),
        "offset": torch.tensor(0.5),
        "bf16": torch.randn(4, 3).bfloat16(),
        "empty": torch.empty(0, 3),
    }
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    writer = TensorWriter(tmp_path / "x.safetensors", shapes, hashed=True)
    for expert in (2, 0, 1):
        writer.write("packed", tensors["packed"][expert : expert + 1], expert)
        writer.write("scale", tensors["scale"][expert : expert + 1], expert)
    with pytest.raises(ValueError, match=r"bf16 is not fully written"):
        writer.finish()
    assert not (tmp_path / "x.safetensors").exists()
    for name in ("offset", "bf16", "empty"):
        writer.write(name, tensors[name])
    with pytest.raises(ValueError, match=r"the bytes at [\d,]+ are written twice"):
        writer.write("packed", tensors["packed"][:1], 0)
    digest = writer.finish()
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert not list(tmp_path.glob("*.partial"))
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    header = read_header(tmp_path / "x.safetensors")
    assert all(info.begin % tensors[name].dtype.itemsize == 0 for name, info in header.items())


@pytest.mark.parametrize("order", ["as they lie", "by expert", "backwards"])
def test_a_file_is_hashed_while_it_is_written(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written as it lies, nothing is read again; expert by expert, as conversions do, only what is small."""
    read: list[int] = []
    pread = os.pread

    def counted(file: int, count: int, offset: int) -> bytes:
        read.append(count)
        return pread(file, count, offset)

    monkeypatch.setattr("models.checkpoint.tensorfile.os.pread", counted)
    monkeypatch.setattr("models.checkpoint.tensorfile._READ_AT_ONCE", 1000)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{matrix}.{name}": torch.randint(0, 256, (4, 64, width), dtype=torch.uint8, generator=generator)
        for matrix in ("gate_up", "down")
        for name, width in (("packed", 32), ("absmax", 1))
    }
    writer = TensorWriter(
        tmp_path / "x.safetensors", {name: ((4, 64, t.shape[2]), t.dtype) for name, t in tensors.items()}, hashed=True
    )
    rows = [(name, expert) for name in tensors for expert in range(4)]
    if order == "by expert":
        rows.sort(key=lambda row: (not row[0].startswith("gate_up"), row[1]))
    for name, expert in rows[::-1] if order == "backwards" else rows:
        writer.write(name, tensors[name][expert : expert + 1], expert)
    assert writer.finish() == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()
    assert sum(read) == {"as they lie": 0, "by expert": 2 * 3 * 64, "backwards": 2 * 4 * 64 * 33 - 64 * 32}[order]


def header(path: Path, entries: dict[str, object], data: int = 0) -> str:
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    with pytest.raises(NibbleError) as caught:
        read_header(path)
    return str(caught.value).splitlines()[0]


def entry(begin: object, end: object, shape: object = None, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, "'b' and the tensor before it share bytes at "),
        ({"a": entry(0, 4), "b": entry(6, 10)}, "'b' and the tensor before it leave a gap at "),
        ({"a": entry(4, 0)}, "'a' has -4 bytes, U8 [4] needs 4"),
        ({"a": entry(0, 8)}, "'a' has 8 bytes, U8 [4] needs 4"),
        ({"a": entry(0, 4, [2**40, 2**40])}, "'a' has 4 bytes, U8 [1099511627776, 1099511627776] needs"),
        ({"a": entry(-4, 0)}, "'a' needs a dtype, a shape and two data_offsets of whole numbers"),
        ({"a": entry(0.0, 4.0)}, "'a' needs a dtype, a shape and two data_offsets of whole numbers"),
        ({"a": entry(0, True, [1])}, "'a' needs a dtype, a shape and two data_offsets of whole numbers"),
        ({"a": entry(0, 4, [-2, -2])}, "'a' needs a dtype, a shape and two data_offsets of whole numbers"),
        ({"a": entry(0, 4, "4")}, "'a' needs a dtype, a shape and two data_offsets of whole numbers"),
        ({"a": entry(0, 4, dtype=["U8"])}, "'a' needs a dtype, a shape and two data_offsets of whole numbers"),
        ({"a": 1}, "'a' is a number"),
        ({"a": entry(0, 2**52, [2**52])}, "is cut short: "),
        ({"\u001b[2J": 1}, "'\\x1b[2J' is a number"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path: Path, entries: dict[str, object], expected: str) -> None:
    assert expected in header(tmp_path / "x.safetensors", entries, 10)


def test_whole_headers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for text in (b"[]", b"1", b'{"a": ', b"\xff\xff", b"[" * 5000, b'{"a": 1, "a": 2}'):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(NibbleError, match="is not a safetensors file: its header can't be read"):
            read_header(path)
    path.write_bytes((2**63).to_bytes(8, "little"))
    with pytest.raises(NibbleError, match=r"is not a safetensors file \(8 bytes\)"):
        read_header(path)
