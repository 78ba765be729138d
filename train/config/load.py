"""A whole config: its sections together, read from YAML and `--set`, checked, and written out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from quant.common.errors import NibbleError
from quant.common.words import shown
from train.config import schema, yaml_text
from train.config.errors import LOOKED_AT, SHOWN, problems_of
from train.config.row_paths import row_files
from train.config.rules import combination_problems
from train.config.sections import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OutputConfig,
    ParallelConfig,
    Section,
    TrainConfig,
)
from train.config.yaml_text import Document, Place, Problem, dotted


class Config(Section):
    """Config of a nibble training run"""

    model: ModelConfig
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    output: OutputConfig

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        found = list(combination_problems(self.model, self.adapter, self.data, self.train, self.parallel))
        if found:
            # The context takes the keys to `problems_of`, which knows the lines that they stand on.
            raise PydanticCustomError("combination", "{text}", {"text": "\n".join(t for _, t in found), "found": found})
        return self


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the config, as `--print-schema` writes it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Config of a YAML file with `KEY=VALUE` overrides laid over it.

    NibbleError with one line for each mistake: its file and line or its --set, the key, and what would be right.
    """
    try:
        # utf-8-sig: editors on Windows put a byte order mark at the start.
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(yaml_text.MAX_BYTES + 1)  # which is too long; a device has no end
    except FileNotFoundError as error:
        near = schema.nearest(str(path), sorted(str(found) for found in Path(path).parent.glob("*.yaml")))
        raise NibbleError(f"{path}: no such file." + (f" Did you mean {near}?" if near else "")) from error
    except UnicodeDecodeError as error:
        raise NibbleError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise NibbleError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return parse_config(text, overrides, str(path))


def parse_config(text: str, overrides: Sequence[str] = (), name: str = "config") -> Config:
    """Like `load_config`, from YAML text; `name` stands for the file in messages."""
    document = yaml_text.read_text(text, name)
    described = config_schema()
    if document.values is None:
        document.values = {}
    if not isinstance(document.values, dict):
        names = ", ".join(Config.model_fields)
        raise NibbleError(f"{name}: got {schema.got(document.values)}, wanted sections: {names}")
    for section in Config.model_fields:
        # A section whose keys are all commented out reads as null.
        if section in document.values and document.values[section] is None:
            document.values[section] = {}
    found = list(document.problems)
    for number, override in enumerate(overrides):
        found += _override(document, override, number, described)
    beyond = 0  # errors that aren't looked at
    try:
        config = Config.model_validate(document.values)
        if not found:
            return config
    except ValidationError as error:
        found += problems_of(error, document, described)
        beyond = error.error_count() - LOOKED_AT
    problems = [str(problem) for problem in sorted(set(found))]
    left = len(problems) - SHOWN + max(beyond, 0)
    more = [f"… and {left:,} more"] if left > 0 else []
    raise NibbleError("\n".join(problems[:SHOWN] + more))


def dump_config(config: Config) -> str:
    """The config as YAML with every key written out; `parse_config` gives the same config back."""
    return yaml_text.write_text(config.model_dump(mode="json"))


def _impossible(path: str) -> str | None:
    """Why no file can have this name, leaving room for those that a run makes in a folder of it; None where one can."""
    if "\0" in path:
        return "has a NUL character in it"
    if any(len(part.encode()) > 255 for part in path.split("/")):
        return "has a part of more than 255 bytes, more than a file's name may have"
    if len(os.path.abspath(path).encode()) > 3800:
        return "is longer than a path may be"
    return None


def _override(document: Document, text: str, number: int, described: dict[str, Any]) -> list[Problem]:
    """Lay one `KEY=VALUE` over the document; returns what is wrong with it."""
    place = Place(1, number, f"--set {text}")
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key:
        return [Problem(place, "expected KEY=VALUE, as in --set train.max_steps=3")]
    path = tuple(key.split("."))
    if len(path) == 1 and key in Config.model_fields:
        first = next(iter(schema.sections(described)[key]["properties"]))
        return [Problem(place, f"'{key}' is a section; set one of its keys, as in --set {key}.{first}=…")]
    entry = schema.keys(described).get(".".join(path[:2]))
    if entry is None or len(path) > (3 if schema.takes_mapping(entry) else 2):
        return [Problem(place, f"unknown key '{key}'. {schema.suggest_key(key, described)}")]
    try:
        given = yaml_text.read_text(value_text, "")
    except NibbleError as error:
        return [Problem(place, str(error).removeprefix(":1").removeprefix(": "))]
    if given.problems:
        return [Problem(place, problem.text) for problem in given.problems]
    section = document.values.setdefault(path[0], {})
    if not isinstance(section, dict):
        return []  # `train: 5` in the file is an error of its own
    if len(path) == 3 and not isinstance(section.get(path[1]) or {}, dict):
        whole = dotted(path[:2])
        return [Problem(place, f"{whole} is not a mapping here; set it whole: --set '{whole}={{{path[2]}: …}}'")]
    document.override(path, given.values, place)
    return []


def check_files(config: Config, rows: bool = True) -> None:
    """NibbleError for each local file that the config names and that isn't there, and for names that no file can have.
    (Whether model.path is there is the loader's.)

    rows: whether this process reads data.train and data.eval; of several only the first does.
    """
    here = f"Relative paths start at the current directory ({Path.cwd()})."
    missing = []
    for key, value in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if rows and value is not None:
            try:
                row_files(value, key)
            except NibbleError as error:
                missing.append(str(error))
    folders = {"adapter.init_from": config.adapter.init_from}
    if config.train.resume not in ("auto", "never"):
        folders["train.resume"] = config.train.resume
    for key, value in {"model.path": config.model.path, **folders, "output.dir": config.output.dir}.items():
        reason = None if value is None else _impossible(value)
        if reason is not None:
            missing.append(f"{key}: {shown(value)} {reason}.")
        elif key in folders and value is not None and not Path(value).is_dir():
            missing.append(f"{key}: {value}: no such folder. {here}")
    output = Path(config.output.dir)
    above = next((path for path in (output, *output.parents) if _impossible(str(path)) is None and path.exists()), None)
    if above is not None and not above.is_dir():
        missing.append(f"output.dir: {output} can't be written to: {above} is a file.")
    if missing:
        raise NibbleError("\n".join(missing))
