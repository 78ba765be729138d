"""The batches of a file of prompts that are done, kept on disk so that an interrupted command goes on after them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from quant.common.errors import NibbleError
from quant.common.files import disk_errors
from quant.common.jsonfile import JsonError, parse_json
from train.generate.answers import Answer


class Batches:
    """A file of JSON lines: the identity of the work, then each batch with the number that it starts at.

    found: the answers of the batches that are in the file, by that number. The file begins with the first batch.
    Raises NibbleError where the file is of other work.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self._header = path, (json.dumps({"identity": identity}) + "\n").encode()
        self.found: dict[int, list[Answer]] = {}
        with disk_errors(path):
            data = path.read_bytes() if path.exists() else b""
        self._size = 0  # bytes of whole lines; what a killed process wrote of one more is dropped
        if self._header.startswith(data):
            return
        whole = data[: data.rfind(b"\n") + 1]
        if whole.startswith(self._header):
            with contextlib.suppress(JsonError, ValueError, TypeError, KeyError):
                lines = [parse_json(line) for line in whole.splitlines()[1:]]
                self.found = {line["start"]: [Answer(**answer) for answer in line["answers"]] for line in lines}
                self._size = len(whole)
                return
        raise NibbleError(
            f"{path} is there already, and holds no answers to these prompts from this model with these options.\n"
            "Give the command that it is of once more, move the file away, or choose another --out."
        )

    def add(self, start: int, answers: Sequence[Answer]) -> None:
        line = {"start": start, "answers": [asdict(answer) for answer in answers]}
        data = (b"" if self._size else self._header) + json.dumps(line).encode() + b"\n"
        with disk_errors(self.path), self.path.open("r+b" if self._size else "wb") as file:
            file.truncate(self._size)
            file.seek(self._size)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(data)
