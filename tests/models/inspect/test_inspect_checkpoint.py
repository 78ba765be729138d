"""python -m models.inspect on checkpoints, beside what transformers counts and reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub._local_folder import write_download_metadata

from models.convert import convert
from models.inspect.__main__ import main
from models.inspect.settings import read_settings
from models.registry import architecture_for
from quant.common.errors import NibbleError
from quant.common.files import sha256_file
from tests.convert_helpers import hub_tensors
from tests.inspect_helpers import compared, error_of, inspected
from tests.tiny import TINY, save_tiny

Made = dict[str, tuple[Path, Path, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """By model_type: a hub folder, a conversion of it, and the model of transformers."""
    found = {}
    for model_type in TINY:
        folder = tmp_path_factory.mktemp(model_type)
        model = save_tiny(folder / "hub", model_type)
        convert(folder / "hub", folder / "nf4")
        found[model_type] = folder / "hub", folder / "nf4", model
    return found


@pytest.mark.parametrize("model_type", TINY)
def test_parameters_and_bytes(made: Made, model_type: str, capsys: pytest.CaptureFixture[str]) -> None:
    hub, converted, model = made[model_type]
    count = sum(tensor.numel() for name, tensor in model.named_parameters() if "visual." not in name)
    experts = sum(tensor.numel() for name, tensor in model.named_parameters() if ".experts." in name)
    for folder, storage, dtype in ((hub, "none", "float32"), (converted, "nf4", "bfloat16")):
        report = inspected(capsys, folder)
        assert (report["model_type"], report["storage"], report["dtype"]) == (model_type, storage, dtype)
        assert report["parameters"] == sum(group["parameters"] for group in report["groups"]) == count
        assert next(g["parameters"] for g in report["groups"] if g["group"] == "experts") == experts
        carried = set(report["carried"]["tensors"])
        assert bool(carried) == (model_type == "qwen3_5_moe")
        computed = {name: tensor for name, tensor in hub_tensors(folder).items() if name not in carried}
        assert sum(g["bytes"] for g in report["groups"]) == sum(tensor.nbytes for tensor in computed.values())
        assert sum(g["tensors"] for g in report["groups"]) == len(computed)
        assert report["bytes"] == sum(tensor.nbytes for tensor in hub_tensors(folder).values())
        assert {f["name"]: f["bytes"] for f in report["files"]} == {
            path.name: path.stat().st_size for path in folder.iterdir() if path.name != "nibble.json"
        }
    manifest = json.loads((converted / "nibble.json").read_text())
    assert inspected(capsys, hub)["fingerprint"] == manifest["source"]["fingerprint"] == report["fingerprint"]


@pytest.mark.parametrize("model_type", TINY)
def test_values_that_are_not_read_change_nothing(made: Made, model_type: str) -> None:
    path = made[model_type][0] / "config.json"
    config = json.loads(path.read_text())
    _, parsed, settings = read_settings(config, "here")
    assert settings["unread"].keys().isdisjoint(settings["read"])
    others = json.loads(path.read_text())
    for name in settings["unread"]:
        section, keys = others, name.split(".")
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = "something else"
    assert architecture_for(others, "here").parse_config(others, "here") == parsed
    wide = next(key for key in settings["read"] if key.endswith("hidden_size"))
    assert settings["read"][wide] == 64
    # Written out, the defaults are what was read.
    for name, value in settings["defaults"].items():
        section, keys = config, name.split(".")
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value
    again = read_settings(config, "here")
    assert again[1] == parsed and not again[2]["defaults"]


def test_the_text(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    hub, converted, model = made["glm4_moe_lite"]
    assert main([str(converted)]) == 0
    text = capsys.readouterr().out
    count = f"{sum(tensor.numel() for tensor in model.parameters()):,}"
    assert f"{converted}: converted checkpoint (nf4 with double quantisation), glm4_moe_lite, bfloat16, {count}" in text
    assert "checksums 5 of 5 files of weights match\n" in text
    assert "n_routed_experts: 8," in text and "absent    num_nextn_predict_layers: 1" in text
    assert main([str(hub), "--quick"]) == 0
    text = capsys.readouterr().out
    assert "checksums none compared" in text and "fingerprint" not in text
    assert main([str(made["qwen3_5_moe"][0])]) == 0
    assert "carried   not computed with: model.visual.* (" in capsys.readouterr().out


def test_a_damaged_conversion(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(made["glm4_moe_lite"][1], folder)
    (folder / "generation_config.json").write_text("{}")
    files = {file["name"]: file["checksum"] for file in inspected(capsys, folder)["files"]}
    assert files.pop("generation_config.json") == "changed" and set(files.values()) == {"matches"}
    flip_last(folder / "rest.safetensors")
    assert "1 file missing or changed since it was written: rest.safetensors." in error_of(capsys, folder)
    assert (
        inspected(capsys, folder, "--quick")["parameters"] == inspected(capsys, made["glm4_moe_lite"][0])["parameters"]
    )


@pytest.mark.parametrize("kept", ["beside", "cache"])
def test_checksums_that_came_with_a_download(
    made: Made, tmp_path: Path, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / "0"
    shutil.copytree(made["glm4_moe_lite"][0], folder)
    weights = folder / "model.safetensors"
    checksum = sha256_file(weights)
    if kept == "beside":
        write_download_metadata(folder, weights.name, "0" * 40, checksum)
        write_download_metadata(folder, "config.json", "0" * 40, "1" * 40)  # a small file's is git's own
    else:
        store = folder.parent.parent / "blobs" / checksum
        store.parent.mkdir()
        weights.rename(store)
        weights.symlink_to(store)
    files = {file["name"]: file["checksum"] for file in inspected(capsys, folder)["files"]}
    assert files == {"model.safetensors": "matches", "config.json": None, "generation_config.json": None}
    flip_last(weights)
    assert "model.safetensors: not what the hub's checksum says.\n" in error_of(capsys, folder)


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_errors(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = made["glm4_moe_lite"][0]
    assert error_of(capsys, hub, "--png", tmp_path / "x.png") == f"error: --png is about an adapter; {hub} is none.\n"
    assert "there is no config.json" in error_of(capsys, tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(hub, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    assert "shapes differ from what config.json says" in error_of(capsys, folder)
    with pytest.raises(NibbleError, match="model_type 'llama' is not supported"):
        read_settings(config | {"model_type": "llama"}, "here")


@pytest.mark.parametrize("which", [0, 1])
def test_differences(made: Made, tmp_path: Path, which: int, capsys: pytest.CaptureFixture[str]) -> None:
    here, there = made["glm4_moe_lite"][which], tmp_path / "copy"
    shutil.copytree(here, there)
    assert compared(capsys, here, there) == []
    assert main([str(here), "--diff", str(there)]) == 0
    assert capsys.readouterr().out == f"{here} and {there} are equal\n"
    weights = there / ("model.safetensors", "rest.safetensors")[which]
    flip_last(weights)
    (there / "generation_config.json").unlink()
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5, "new": None}))
    if which:  # a converted folder, whose manifest has it too
        manifest = json.loads((there / "nibble.json").read_text())
        manifest["config"] |= {"rms_norm_eps": 0.5, "new": None}
        (there / "nibble.json").write_text(json.dumps(manifest))
    found = compared(capsys, here, there)
    assert found[:2] == [("config", "rms_norm_eps", 1e-5, 0.5), ("config", "new", None, "null")]
    changed = [name for name, tensor in hub_tensors(here).items() if not torch.equal(tensor, hub_tensors(there)[name])]
    assert [line[:2] for line in found[2:]] == [("tensor", *changed), ("file", "generation_config.json")]
    assert found[2][3] == "other values" and found[3][2:] == ("present", None)
    assert main([str(here), "--diff", str(there)]) == 1
    assert capsys.readouterr().out.endswith("\n4 differences\n")


def test_other_tensors_differ_too(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    hub, converted, _ = made["glm4_moe_lite"]
    found = compared(capsys, hub, converted)
    assert ("stored", "format", "hub", "converted") in found
    assert ("tensor", "model.embed_tokens.weight", "F32 [128, 64]", "BF16 [128, 64]") in found
    assert ("tensor", "model.layers.0.self_attn.o_proj.weight.packed", None, "U8 [64, 64]") in found
