"""What is read, from what, and what may come of it.

A target opens one input. It may return, or raise NibbleError with a message that a person can read; anything else is a
fault. Where another library reads the same thing, what is accepted here must mean the same there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open

from models.adapters.files import load_adapter, save_adapter
from models.adapters.lora import add_lora
from models.adapters.targets import AdapterSpec
from models.checkpoint.conversion import convert
from models.checkpoint.hub import INDEX, HubCheckpoint, check_counts
from models.checkpoint.keymap import key_map_of
from models.checkpoint.native import MANIFEST, Manifest
from models.checkpoint.side_files import CONFIG
from models.checkpoint.stream import HubReader
from models.checkpoint.tensorfile import read_header
from models.decoder import CausalLM
from models.registry import architecture_for
from quant.common.errors import NibbleError
from quant.common.jsonfile import JsonError, parse_json
from quant.storage import StorageSpec
from tests.fuzz.mutations import bytes_near, json_near, text_of
from tests.fuzz.texts import text_inputs
from tests.helpers import save_tiny_glm
from tests.tiny import TINY


@dataclass(frozen=True)
class Target:
    """inputs: what is drawn. open: reads one of it, in a folder of its own."""

    name: str
    inputs: st.SearchStrategy[Any]
    open: Callable[[Any], None]


@functools.cache
def folder() -> Path:
    """For this process's files. Removed with it."""
    made = tempfile.TemporaryDirectory(prefix="fuzz-")
    _KEPT.append(made)
    return Path(made.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@contextlib.contextmanager
def readable_messages() -> Iterator[None]:
    """Lets a NibbleError pass as an answer, if it is one."""
    try:
        yield
    except NibbleError as error:
        text = str(error)
        assert text.strip() and len(text.splitlines()) <= 60, text
        assert "Traceback" not in text, text


# --- JSON and safetensors


def _open_json(data: bytes) -> None:
    try:
        value = parse_json(data)
    except JsonError:
        return
    assert value == json.loads(data.decode("utf-8-sig"))


def _header(entries: dict[str, Any], size: int) -> bytes:
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(range(256)) * (size // 256 + 1)


_ENTRIES = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "U8", "shape": [], "data_offsets": [32, 33]},
}
_WHOLE = _header(_ENTRIES, 0)[: len(_header(_ENTRIES, 0)) - 256 + 33]
_HEADERS = st.one_of(
    bytes_near(_WHOLE),
    json_near(_ENTRIES).map(lambda entries: _header(entries, 0)[: -256 + 33]),
)


def _open_header(data: bytes) -> None:
    path = folder() / "x.safetensors"
    path.write_bytes(data)
    with readable_messages():
        ours = read_header(path)
        with safe_open(path, framework="pt") as theirs:  # what is accepted here opens there, and is the same
            assert set(theirs.keys()) == set(ours)
            for name, info in ours.items():
                assert tuple(theirs.get_slice(name).get_shape()) == info.shape


# --- checkpoints


def _open_config(drawn: tuple[str, Any]) -> None:
    model_type, config = drawn
    with readable_messages():
        if not isinstance(config, dict):
            return
        architecture = architecture_for(config, "config.json")
        parsed = architecture.parse_config(config, "config.json")
        check_counts(_tiny_shapes(model_type), parsed.layers, parsed.experts, "config.json")
        key_map_of(architecture.build(parsed, StorageSpec("nf4"), torch.bfloat16, "meta"))


@functools.cache
def _tiny_shapes(model_type: str) -> dict[str, tuple[int, ...]]:
    return {key.hub: key.shape for key in key_map_of(_tiny(model_type)).keys}


def _tiny(model_type: str) -> CausalLM:
    config = _published(model_type)
    architecture = architecture_for(config, "config.json")
    return architecture.build(architecture.parse_config(config, ""), StorageSpec(), torch.float32, "meta")


def _published(model_type: str) -> dict[str, Any]:
    text = {**TINY[model_type], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    if model_type == "qwen3_5_moe":
        return {"model_type": model_type, "text_config": text}
    return {**text, "model_type": model_type}


_CONFIGS = st.sampled_from(sorted(TINY)).flatmap(lambda name: st.tuples(st.just(name), json_near(_published(name))))


@functools.cache
def _hub() -> Path:
    path = folder() / "hub"
    save_tiny_glm(path).save_pretrained(path, max_shard_size="300KB")
    (path / "model.safetensors").unlink(missing_ok=True)
    return path


def _open_checkpoint(data: bytes) -> None:
    changed, path = folder() / "changed", _hub()
    changed.mkdir(exist_ok=True)
    for file in path.iterdir():
        if not (changed / file.name).exists():
            (changed / file.name).symlink_to(file)
    (changed / INDEX).unlink(missing_ok=True)
    (changed / INDEX).write_bytes(data)
    with readable_messages():
        HubReader(HubCheckpoint(changed), key_map_of(_glm()))


@functools.cache
def _glm() -> CausalLM:
    config = json.loads((_hub() / CONFIG).read_text())
    architecture = architecture_for(config, "")
    return architecture.build(architecture.parse_config(config, ""), StorageSpec(), torch.float32, "meta")


def _open_manifest(data: bytes) -> None:
    path = folder() / "native"
    path.mkdir(exist_ok=True)
    (path / MANIFEST).write_bytes(data)
    with readable_messages():
        Manifest.load(path)


@functools.cache
def _manifest() -> Any:
    convert(_hub(), folder() / "converted", StorageSpec("nf4"), torch.float32)
    return json.loads((folder() / "converted" / MANIFEST).read_text())


# --- adapters


@functools.cache
def _adapter() -> Path:
    path, model = folder() / "adapter", _fresh_glm("cpu")
    add_lora(model, AdapterSpec(("experts", "attention"), {"experts": 2, "attention": 3}, 4.0))
    save_adapter(model, path, "org/base")
    return path


def _fresh_glm(device: str) -> CausalLM:
    config = json.loads((_hub() / CONFIG).read_text())
    architecture = architecture_for(config, "")
    return architecture.build(architecture.parse_config(config, ""), StorageSpec(), torch.float32, device)


def _open_adapter(data: bytes) -> None:
    path = folder() / "changed-adapter"
    path.mkdir(exist_ok=True)
    if not (path / "adapter_model.safetensors").exists():
        (path / "adapter_model.safetensors").symlink_to(_adapter() / "adapter_model.safetensors")
    (path / "adapter_config.json").write_bytes(data)
    with readable_messages():
        load_adapter(_fresh_glm("cpu"), path)


def _adapter_config() -> Any:
    config = json.loads((_adapter() / "adapter_config.json").read_text())
    return {**config, "exclude_modules": ["x"], "layers_to_transform": [0, 1, 2], "rank_pattern": {"o_proj": 3},
            "lora_B_layout": "rank_major"}  # fmt: skip


def targets() -> list[Target]:
    """All of them; making the files that they start from takes some seconds."""
    return [
        Target("json", st.one_of(st.binary(), text_of(_ENTRIES)), _open_json),
        Target("headers", _HEADERS, _open_header),
        Target("configs", _CONFIGS, _open_config),
        Target("indexes", text_of(json.loads((_hub() / INDEX).read_text())), _open_checkpoint),
        Target("manifests", text_of(_manifest()), _open_manifest),
        Target("adapters", text_of(_adapter_config()), _open_adapter),
        *(Target(*of_text) for of_text in text_inputs(folder(), readable_messages)),
    ]
