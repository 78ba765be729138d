"""Reading a hub folder: what is in it, and every way in which it can be damaged."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint import fingerprint
from models.checkpoint.hub import (
    INDEX,
    SINGLE,
    HubCheckpoint,
    check_counts,
    local_folder,
    looks_like_hub_id,
    resolve_model,
    side_files,
)
from models.checkpoint.tensorfile import TensorWriter, read_header
from quant.common.errors import NibbleError


def write_checkpoint(folder: Path, shards: int = 2) -> dict[str, torch.Tensor]:
    """A little folder in the hub's layout; not a model."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tensors = {f"layer.{index}.weight": torch.randn(6, 4, 8).bfloat16() for index in range(2 * shards)}
    tensors["layer.0.scale"] = torch.tensor(1.5)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    if shards == 1:
        save_file(tensors, folder / SINGLE)
        return tensors
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def message(folder: Path) -> str:
    with pytest.raises(NibbleError) as caught:
        HubCheckpoint(folder)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 2])
def test_reads_every_tensor_and_single_rows(tmp_path: Path, shards: int) -> None:
    tensors = write_checkpoint(tmp_path, shards)
    with HubCheckpoint(tmp_path) as checkpoint:
        assert set(checkpoint) == set(tensors)
        assert len(checkpoint) == len(tensors)
        assert "layer.0.weight" in checkpoint
        assert checkpoint.config == {"model_type": "tiny"}
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        assert checkpoint.dtype("layer.0.weight") == "BF16"
        for name, tensor in tensors.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert torch.equal(checkpoint.tensor(name), tensor)
        for expert in (0, 3, 5):
            row = checkpoint.row("layer.1.weight", expert)
            assert torch.equal(row, tensors["layer.1.weight"][expert])


def test_missing_folder(tmp_path: Path) -> None:
    assert "nowhere doesn't exist. Wanted: a folder with config.json and *.safetensors" in message(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.touch()
    assert "is a file, not a folder" in message(file)


def test_missing_config(tmp_path: Path) -> None:
    assert "there is no config.json, so this isn't a checkpoint folder.\nIt is empty." in message(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "It holds: notes.txt." in message(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{not json", "config.json is not valid JSON: Expecting property name"),
        ("[1]", "config.json holds a list, expected an object"),
    ],
)
def test_broken_config(tmp_path: Path, text: str, expected: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert expected in message(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    folder = tmp_path / "GLM-4.7-Flash"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    text = message(folder)
    assert "there are no weights (model.safetensors, or model.safetensors.index.json and its shards)" in text
    assert f"hf download zai-org/GLM-4.7-Flash --local-dir {folder}" in text


def test_shards_without_their_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX).unlink()
    text = message(tmp_path)
    assert "model.safetensors.index.json is missing; without it model-00001-of-00002.safetensors" in text
    assert f"hf download ORGANISATION/{tmp_path.name} model.safetensors.index.json" in text


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04")
    text = message(tmp_path)
    assert f"the weights are pickle files ({name})" in text
    assert "can run any code that is in it, so only safetensors are read" in text
    assert "fetch those: hf download" in text
    assert "save_pretrained writes safetensors" in text


def test_index_of_pickle_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001.bin"}}))
    assert "the weights are pickle files (pytorch_model-00001.bin)" in message(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", " is not valid JSON: Expecting property name"),
        ("[]", " holds a list, expected an object"),
        ("{}", ": weight_map should name a shard for every key"),
        ('{"weight_map": [1]}', ": weight_map must be an object, got [1]"),
        ('{"weight_map": {"a": 1}}', ": weight_map should name a shard for every key"),
        ('{"weight_map": {"a": "x", "a": "y"}}', " is not valid JSON: the key 'a' stands twice in one object"),
    ],
)
def test_broken_index(tmp_path: Path, text: str, expected: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(text)
    assert f"{INDEX}{expected}" in message(tmp_path)


def test_index_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))
    assert "names a file outside the folder: '../other/model.safetensors'" in message(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    folder = tmp_path / "GLM-4.7-Flash"
    write_checkpoint(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert message(folder) == (
        f"{folder}: shard model-00002-of-00002.safetensors is missing (the index names it for 2 tensors).\n"
        "Fetch it again: hf download zai-org/GLM-4.7-Flash model-00002-of-00002.safetensors "
        f"--local-dir {folder}"
    )
    (folder / "model-00001-of-00002.safetensors").unlink()
    text = message(folder)
    assert "model-00001-of-00002.safetensors is missing (the index names it for 3 tensors). 1 more are missing" in text
    assert f"hf download zai-org/GLM-4.7-Flash --local-dir {folder}" in text


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (-100, "is cut short: "),
        (20, "is cut short: 20 bytes, its header alone has "),
        (3, "is not a safetensors file (3 bytes)"),
        (0, "is not a safetensors file (0 bytes)"),
    ],
)
def test_truncated_shard(tmp_path: Path, keep: int, expected: str) -> None:
    write_checkpoint(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    text = message(tmp_path)
    assert f"{shard} {expected}" in text
    assert f"hf download ORGANISATION/{tmp_path.name} {shard.name} --local-dir {tmp_path}" in text


def test_corrupt_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:8] + b"[" + whole[9:])
    assert "is not a safetensors file: its header can't be read" in message(tmp_path)
    shard.write_bytes(whole + b"more")
    assert "is longer than it should be" in message(tmp_path)
    shard.write_bytes(b"<html>404 not found</html>" * 10)
    assert "is not a safetensors file" in message(tmp_path)


def test_header_that_safetensors_itself_refuses(tmp_path: Path) -> None:
    # The header can be read and adds up, but a tensor's bytes don't match its shape.
    write_checkpoint(tmp_path, shards=1)
    file = tmp_path / SINGLE
    file.write_bytes(file.read_bytes().replace(b'"shape":[6,4,8]', b'"shape":[6,4,9]', 1))
    found = message(tmp_path)
    assert "('layer.0.weight' has 384 bytes, BF16 [6, 4, 9] needs 432).\nFetch it again" in found


def test_key_that_the_index_names_and_the_shard_lacks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["layer.9.weight"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    text = message(tmp_path)
    assert "says that model-00001-of-00002.safetensors holds layer.9.weight; it doesn't" in text
    assert "Index and shards are of different versions" in text


def test_keys_that_the_index_forgets_are_not_lost(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["layer.2.weight"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "layer.2.weight" in HubCheckpoint(tmp_path)


def test_fingerprint_follows_content_and_not_the_files_names(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "a", shards=2)
    write_checkpoint(tmp_path / "b", shards=2)
    content = HubCheckpoint(tmp_path / "a").fingerprint()
    assert content.startswith("full:")
    assert HubCheckpoint(tmp_path / "b").fingerprint() == content
    (tmp_path / "b" / INDEX).unlink()
    save_file(tensors, tmp_path / "b" / SINGLE)
    assert HubCheckpoint(tmp_path / "b").fingerprint() == content
    tensors["layer.3.weight"][0, 0, 0] += 1  # same shapes, other values: a fine-tuned model
    save_file(tensors, tmp_path / "b" / SINGLE)
    assert HubCheckpoint(tmp_path / "b").fingerprint() != content


def test_fingerprint_sees_the_last_byte_and_says_when_only_samples_are_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a tensor of 5 MiB an earlier version read 4 KiB at its beginning and 4 KiB at 4 MiB."""
    caplog.set_level("INFO", "nibble")
    tensors = {"embedding": torch.zeros(5, 2**20, dtype=torch.uint8), "scale": torch.ones(3)}
    (tmp_path / "config.json").write_text("{}")

    def saved() -> HubCheckpoint:
        save_file(tensors, tmp_path / SINGLE)
        return HubCheckpoint(tmp_path)

    digest = hashlib.sha256(b"{}")  # as the version before made it
    digest.update(b"\nembedding U8 [5, 1048576]\n\nscale F32 [3]\n")
    digest.update(bytes(2 * 4096) + tensors["scale"].numpy().tobytes())
    sampled = f"sha256:{digest.hexdigest()}"
    content = saved().fingerprint()
    assert saved().has_fingerprint(content, "")
    assert caplog.messages == []
    assert saved().has_fingerprint(sampled, "Do this.")
    assert caplog.messages == [
        f"{tmp_path}: taken for the same by samples of its data, all that an earlier version of nibble recorded; a "
        "small change goes unseen. Do this."
    ]
    tensors["embedding"][-1, -1] = 1
    assert not saved().has_fingerprint(content, "")
    assert saved().has_fingerprint(sampled, "")
    tensors["scale"][1] = 2
    assert not saved().has_fingerprint(sampled, "")


def test_a_change_that_sets_its_date_back_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub"
    write_checkpoint(folder, shards=1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_SMALL", 1)
    (shard,) = folder.glob("*.safetensors")
    os.utime(shard, (0, 0))
    before = HubCheckpoint(folder).fingerprint()
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    os.utime(shard, (0, 0))
    assert HubCheckpoint(folder).fingerprint() != before


def test_a_large_checkpoint_is_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nibble")
    folder, cache = tmp_path / "hub", tmp_path / "cache"
    tensors = write_checkpoint(folder, shards=2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    small = HubCheckpoint(folder).fingerprint()
    assert not cache.exists()
    monkeypatch.setattr(fingerprint, "_SMALL", 1)

    def of_age() -> str:
        for path in folder.glob("*.safetensors"):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10))
        return HubCheckpoint(folder).fingerprint()

    def hashed() -> int:
        return sum("hashed" in message for message in caplog.messages)

    assert HubCheckpoint(folder).fingerprint() == small
    assert hashed() == 1
    assert not cache.exists(), "a file that was written just now may change without another date"
    assert of_age() == small == HubCheckpoint(folder).fingerprint()
    assert hashed() == 2
    assert len(list(cache.rglob("*.json"))) == 1 and not list(folder.glob("*.partial"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {"config.json", INDEX, *(path.name for path in folder.glob("*.safetensors"))}
    )

    # Another value under the same size; then a damaged memory; then one that can't be written.
    tensors["layer.3.weight"][0, 0, 0] += 1
    for shard in folder.glob("*.safetensors"):
        held = load_file(shard)
        save_file({name: tensors[name] for name in held}, shard)
    other = of_age()
    assert other != small and hashed() == 3
    assert HubCheckpoint(folder).fingerprint() == other and hashed() == 3
    next(cache.rglob("*.json")).write_text("{")
    assert HubCheckpoint(folder).fingerprint() == other and hashed() == 4
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert HubCheckpoint(folder).fingerprint() == other
    assert "will be read whole again the next time, as that can't be remembered" in caplog.messages[-1]


def test_resolve_existing_folder_and_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == tmp_path
    for wrong in ("/nowhere/model", "nowhere", "a/b/c", "./x/y"):
        with pytest.raises(NibbleError, match=r"doesn't exist\. Wanted: a checkpoint folder, or a hub id such as"):
            resolve_model(wrong)
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_id("outputs/model")
    (tmp_path / "outputs").mkdir()
    assert not looks_like_hub_id("outputs/model")


def test_folder_of_a_name_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    snapshot = cache / "models--Qwen--Tiny" / "snapshots" / "abc"
    write_checkpoint(snapshot)
    (cache / "models--Qwen--Tiny" / "refs").mkdir()
    (cache / "models--Qwen--Tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    assert local_folder("Qwen/Tiny") == snapshot
    assert local_folder(str(snapshot)) == snapshot
    assert local_folder("Qwen/Other") is None
    assert local_folder("/nowhere/Tiny") is None


def test_hub_id_is_downloaded_without_code_or_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked["name"] = name
        files = ["model-00001-of-00002.safetensors", INDEX, "config.json", "tokenizer.model", "chat_template.jinja"]
        files += ["vocab.json", "merges.txt", "model.safetensors-00001-of-00014.safetensors"]
        files += ["processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"]
        others = ["pytorch_model.bin", "modeling_x.py", "tokenizer_x.py", "README.md", "x.gguf", "onnx/model.json"]
        found = filter_repo_objects(files + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert list(found) == files
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("zai-org/GLM-4.7-Flash") == tmp_path
    assert asked == {"name": "zai-org/GLM-4.7-Flash"}


def test_offline_message_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NibbleError) as caught:
        resolve_model("zai-org/GLM-4.7-Flash")
    assert str(caught.value) == (
        "zai-org/GLM-4.7-Flash is no folder here and could not be fetched from the hub: the hub can't be reached and "
        "the hub cache doesn't hold it.\n"
        "Where there is a connection: hf download zai-org/GLM-4.7-Flash "
        "--local-dir checkpoints/GLM-4.7-Flash\n"
        "Then set model.path (or the argument) to that folder."
    )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("RepositoryNotFoundError", "the hub has no such model, or it is private"),
        ("GatedRepoError", "only to those who accepted its conditions"),
        ("HfHubHTTPError", "HfHubHTTPError: 500 Server Error"),
        ("ConnectionResetError", "ConnectionResetError: reset by peer"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, error: str, expected: str) -> None:
    from huggingface_hub import errors

    def fail(*_: object, **__: object) -> str:
        if error == "ConnectionResetError":
            raise ConnectionResetError("reset by peer")
        raise getattr(errors, error)("500 Server Error", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(NibbleError) as caught:
        resolve_model("someone/model")
    assert expected in str(caught.value)
    assert "hf download someone/model --local-dir checkpoints/model" in str(caught.value)


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


def test_a_single_file_beside_an_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As transformers does, which looks for the single file first."""
    write_checkpoint(tmp_path)
    save_file({"one": torch.ones(2)}, tmp_path / SINGLE)
    assert set(HubCheckpoint(tmp_path)) == {"one"}
    assert caplog.messages == [f"{tmp_path} has {SINGLE} beside {INDEX}; as in transformers, {SINGLE} is read."]


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


@pytest.mark.parametrize(
    ("names", "layers", "experts", "expected"),
    [
        (
            {"model.layers.0.x": (2,), "model.layers.3.x": (2,)},
            5,
            1,
            "num_hidden_layers is 5, but the weights are of 4",
        ),
        (
            {"layers.1.mlp.experts.7.up_proj.weight": (2, 2)},
            2,
            10**6,
            "experts is 1,000,000, but the weights are of 8",
        ),
        ({"a.experts.gate_up_proj": (8, 2, 2)}, 2, 9, "the number of experts is 9, but the weights are of 8."),
    ],
)
def test_more_layers_or_experts_than_there_are(
    names: dict[str, tuple[int, ...]], layers: int, experts: int, expected: str
) -> None:
    with pytest.raises(NibbleError) as caught:
        check_counts(names, layers, experts, "config.json")
    assert expected in str(caught.value)


def test_counts_that_fit_or_are_not_known() -> None:
    check_counts({"model.layers.3.mlp.experts.7.x": (2,)}, 4, 8, "config.json")
    check_counts({"model.layers.9.mlp.experts.gate_up_proj": (8, 2, 2)}, 4, 8, "config.json")
    check_counts({"layers.0.experts.gate_up_proj.weight.packed": ()}, 1, 8, "config.json")


def test_side_files_are_those_of_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "hub", tmp_path / "secret"
    (folder / "additional_chat_templates").mkdir(parents=True)
    outside.write_text("a password")
    (folder / "config.json").write_text("{}")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    (folder / "vocab.json").symlink_to(folder / "config.json")
    assert side_files(folder) == {
        "config.json": b"{}",
        "vocab.json": b"{}",
        "additional_chat_templates/tool_use.jinja": b"x",
    }
    for name in ("chat_template.jinja", "additional_chat_templates/a.jinja"):
        link = folder / name
        link.symlink_to(outside)
        with pytest.raises(NibbleError, match=rf"{name} is a link to .*secret, outside the checkpoint's folder"):
            side_files(folder)
        link.unlink()
    (folder / "merges.txt").symlink_to(tmp_path / "nothing")
    assert "merges.txt" not in side_files(folder)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    model = tmp_path / "models--org--name"
    snapshot, blob = model / "snapshots" / "abc", model / "blobs" / "123"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    assert side_files(snapshot) == {"config.json": b"{}"}
    (snapshot / "vocab.json").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("x")
    with pytest.raises(NibbleError, match="outside the checkpoint's folder"):
        side_files(snapshot)
