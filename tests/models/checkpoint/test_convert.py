"""Converting: the bytes, the refusals, and what is left when it is interrupted."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.checkpoint.conversion import Interrupted, convert, count_parameters
from models.checkpoint.hub import HubCheckpoint
from models.checkpoint.native import MANIFEST, Manifest, NativeCheckpoint
from models.checkpoint.stream import HubReader
from models.convert import __main__ as command
from models.glm4_moe_lite import Glm4MoeLiteConfig, build
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.convert_helpers import NF4, contents, hub_tensors, run, write_hub
from tests.helpers import key_map_for
from tests.processes import run_commands


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_expert_is_what_bitsandbytes_makes_of_it(
    hub: Path, tmp_path: Path, kind: str, double_quant: bool
) -> None:
    from bitsandbytes.functional import quantize_4bit

    spec = StorageSpec(kind, double_quant)  # type: ignore[arg-type]
    convert(hub, tmp_path / "x", spec, torch.float32)
    native = load_file(tmp_path / "x" / "layer-00001.safetensors")
    tensors = hub_tensors(hub)
    name = "model.layers.1.mlp.experts"
    for expert in (0, 5):
        gate, up = (tensors[f"{name}.{expert}.{part}_proj.weight"] for part in ("gate", "up"))
        packed, state = quantize_4bit(
            torch.cat((gate, up)), blocksize=64, compress_statistics=double_quant, quant_type=kind
        )
        assert torch.equal(native[f"{name}.gate_up_proj.weight.packed"][expert].flatten(), packed.flatten())
        assert torch.equal(native[f"{name}.gate_up_proj.weight.absmax"][expert].flatten(), state.absmax.flatten())


def test_only_frozen_matrices_are_quantised(hub: Path, tmp_path: Path) -> None:
    convert(hub, tmp_path / "x", NF4, torch.bfloat16)
    native = hub_tensors(tmp_path / "x")
    layer = "model.layers.1"
    assert native[f"{layer}.self_attn.o_proj.weight.packed"].dtype == torch.uint8
    assert native[f"{layer}.mlp.shared_experts.up_proj.weight.packed"].dtype == torch.uint8
    assert native["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert native["lm_head.weight.value"].dtype == torch.bfloat16
    assert native[f"{layer}.input_layernorm.weight"].dtype == torch.bfloat16
    assert native[f"{layer}.mlp.gate.weight.value"].dtype == torch.float32
    bias = native[f"{layer}.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, hub_tensors(hub)[f"{layer}.mlp.gate.e_score_correction_bias"])


def test_twice_gives_identical_bytes_and_the_files_beside_the_weights(hub: Path, tmp_path: Path) -> None:
    convert(hub, tmp_path / "a", NF4)
    convert(hub, tmp_path / "b", NF4)
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert sorted(first) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        *(f"layer-0000{layer}.safetensors" for layer in range(3)),
        MANIFEST,
        "rest.safetensors",
        "tokenizer.json",
    ]
    assert first["tokenizer.json"] == (hub / "tokenizer.json").read_bytes()
    manifest = Manifest.load(tmp_path / "a")
    assert manifest.complete
    assert (manifest.spec, manifest.dtype, manifest.model_type) == (NF4, torch.bfloat16, "glm4_moe_lite")
    assert manifest.config == json.loads((hub / "config.json").read_text())
    assert manifest.files.keys() == first.keys() - {MANIFEST}
    assert set(manifest.files["rest.safetensors"].tensors) == set(load_file(tmp_path / "a" / "rest.safetensors"))


def test_fused_experts_and_other_shards_give_the_same_bytes(hub: Path, tmp_path: Path) -> None:
    tensors = hub_tensors(hub)
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{name}.{expert}.{part}_proj.weight") for expert in range(8)])
            for part in ("gate", "up", "down")
        )
        tensors[f"{name}.gate_up_proj"], tensors[f"{name}.down_proj"] = torch.cat((gate, up), 1), down
    convert(hub, tmp_path / "parts", NF4)
    convert(write_hub(tmp_path / "fused", tensors, hub), tmp_path / "whole", NF4)
    assert contents(tmp_path / "parts", "*.safetensors") == contents(tmp_path / "whole", "*.safetensors")


@pytest.mark.slow
def test_memory_does_not_grow_with_experts_or_layers(tmp_path: Path) -> None:
    result = run("-m", "tests.measure_convert", tmp_path)
    assert result.returncode == 0, result.stderr
    converting, loading, written = (int(word) for word in result.stdout.split())
    assert written > 30 * 2**20
    # A stack of gate_up matrices alone is 10 MiB.
    assert converting < 6 * 2**20, f"peak grew by {converting / 2**20:.1f} MiB"
    assert loading < 6 * 2**20, f"peak grew by {loading / 2**20:.1f} MiB beyond the model"


def test_reading_an_embedding_makes_no_other_tensor_of_its_size(hub: Path) -> None:
    """The real one is as large as half a layer of experts, so a mask of it would be the peak of a conversion."""

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.made: list[torch.Tensor] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            self.made += [tensor for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
            return result

    with HubCheckpoint(hub) as checkpoint:
        keys = key_map_for(build, Glm4MoeLiteConfig.parse(checkpoint.config, ""), dtype=torch.float32)
        reader = HubReader(checkpoint, keys)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            key = next(key for key in keys.keys if key.native == name)
            with Recorder() as recorder:
                (piece,) = reader.read(key)
            (value,) = piece.tensors.values()
            others = [made for made in recorder.made if made.data_ptr() != value.data_ptr()]
            assert others, "the check for inf and NaN was seen"
            assert max(made.nbytes for made in others) < value.numel()


def test_parameters_of_the_real_model() -> None:
    assert count_parameters(key_map_for(build, Glm4MoeLiteConfig.parse({}, "")).keys) == 29_943_390_976


def test_prediction_layer_is_left_out_and_named(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = hub_tensors(hub)
    extra = ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight"]
    source = write_hub(tmp_path / "mtp", tensors | {key: torch.ones(2, 2) for key in extra}, hub)
    assert command.main([str(source), str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "left out, as nothing here computes with them: model.layers.3.* (2 tensors, 32 B)"
    assert Manifest.load(tmp_path / "out").carried == tuple(extra)
    convert(hub, tmp_path / "plain", NF4)
    assert contents(tmp_path / "plain", "*.safetensors") == contents(tmp_path / "out", "*.safetensors")


@pytest.mark.parametrize("calls", [2, 40])
def test_killed_conversion_goes_on_and_gives_the_same_bytes(hub: Path, tmp_path: Path, calls: int) -> None:
    target = tmp_path / "killed"
    (killed,) = run_commands(1, "tests.dist_workers.killed:while_it_converts", str(hub), str(target), calls)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = Manifest.load(target)
    assert not finished.complete
    assert list(target.glob("*.partial"))
    with pytest.raises(NibbleError, match=r"the conversion isn't finished.\nIt goes on where it stopped: python -m"):
        NativeCheckpoint(target)
    dates = {name: (target / name).stat().st_mtime_ns for name in finished.files}
    summary = convert(hub, target, NF4)
    assert summary.kept == len(dates)
    assert (summary.kept > 0) == (calls > 2)
    assert dates == {name: (target / name).stat().st_mtime_ns for name in dates}
    convert(hub, tmp_path / "whole", NF4)
    assert contents(target) == contents(tmp_path / "whole")


def test_damaged_files_are_made_again(hub: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(hub, target, NF4)
    before = contents(target)
    (target / "layer-00001.safetensors").write_bytes(b"short")
    (target / "rest.safetensors").unlink()
    with pytest.raises(NibbleError) as caught:
        NativeCheckpoint(target)
    assert "layer-00001.safetensors has 5 bytes, nibble.json says " in str(caught.value)
    assert "rest.safetensors is missing" in str(caught.value)
    assert f"makes the damaged files again: python -m models.convert {hub} {target} --storage nf4" in str(caught.value)
    assert convert(hub, target, NF4).kept == 2
    assert contents(target) == before


def test_another_conversion_is_not_overwritten_unless_forced(hub: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(hub, target, NF4)
    with pytest.raises(NibbleError) as caught:
        convert(hub, target, StorageSpec("int8", False), torch.float32)
    assert str(caught.value) == (
        f"{target} holds another conversion (of {hub}): "
        "storage nf4 with double quantisation, bfloat16 there, int8, float32 now.\n"
        "Name another folder, or add --force to replace it."
    )
    tensors = hub_tensors(hub)
    tensors["model.norm.weight"] += 1
    other = write_hub(tmp_path / "other", tensors, hub)
    with pytest.raises(NibbleError, match=r"content of the source \(fingerprint\) \w{12} there, \w{12} now"):
        convert(other, target, NF4)
    (target / "mine.txt").write_text("kept")
    convert(other, target, StorageSpec("int8", False), force=True)
    assert (target / "mine.txt").read_text() == "kept"
    assert Manifest.load(target).spec == StorageSpec("int8", False)
    convert(other, tmp_path / "fresh", StorageSpec("int8", False))
    assert contents(target, "*.safetensors") == contents(tmp_path / "fresh", "*.safetensors")


def test_force_replaces_a_damaged_manifest(hub: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(hub, target, NF4)
    before = contents(target)
    (target / MANIFEST).write_text("{")
    with pytest.raises(NibbleError, match=r"nibble\.json is not valid JSON: .*\nDelete .* and convert again"):
        convert(hub, target, NF4)
    convert(hub, target, NF4, force=True)
    assert contents(target) == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 99}, "has format version 99; this version of nibble reads up to 1"),
        ({"format": "other"}, "is not of a converted checkpoint: its format is 'other'."),
        (
            {"files": {"../x": {"size": 1, "sha256": "", "tensors": []}}},
            "files names '../x', which can't be a file in the folder.",
        ),
        ({"dtype": "int3"}, "nibble.json: unknown dtype 'int3': choose one of float32, bfloat16"),
        ({"storage": {"kind": "nf5"}}, "nibble.json: unknown storage 'nf5': choose one of none, nf4, fp4, int8"),
        (
            {"files": {"a": {"size": "x", "sha256": "", "tensors": []}}},
            "files: a: size must be an integer of at",
        ),
        (
            {"files": {"a" * 256: {"size": 1, "sha256": "", "tensors": []}}},
            "aaa', which can't be a file in the folder.",
        ),
        ({"config": [], "carried": 1}, "nibble.json: config must be an object, got []."),
    ],
)
def test_manifest_that_cannot_be_read(hub: Path, tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    target = tmp_path / "out"
    convert(hub, target, NF4)
    data = json.loads((target / MANIFEST).read_text())
    (target / MANIFEST).write_text(json.dumps(data | change))
    with pytest.raises(NibbleError) as caught:
        Manifest.load(target)
    assert expected in str(caught.value)
    with pytest.raises(NibbleError, match=r"there is no nibble\.json, so this isn't a converted checkpoint"):
        Manifest.load(hub)


def test_destinations_that_are_refused(hub: Path, tmp_path: Path) -> None:
    def refused(source: Path, target: Path) -> str:
        with pytest.raises(NibbleError) as caught:
            convert(source, target, NF4)
        return str(caught.value)

    assert "source and destination are the same folder" in refused(hub, hub)
    (tmp_path / "file").touch()
    assert "file is a file. Name a folder" in refused(hub, tmp_path / "file")
    assert "can't be made: Not a directory" in refused(hub, tmp_path / "file" / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "isn't empty and isn't a converted checkpoint (it holds thesis.tex)" in refused(hub, tmp_path / "mine")
    convert(hub, tmp_path / "out", NF4)
    text = refused(tmp_path / "out", tmp_path / "again")
    assert "is a converted checkpoint already; convert from the hub's format" in text


def test_two_conversions_into_one_folder(hub: Path, tmp_path: Path) -> None:
    messages = []

    def second(done: int, total: int, what: str) -> None:
        if not messages:
            with pytest.raises(NibbleError) as caught:
                convert(hub, tmp_path / "out", NF4)
            messages.append(str(caught.value))

    convert(hub, tmp_path / "out", NF4, progress=second)
    assert "another command is writing to" in messages[0]


def test_disk_without_room(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(NibbleError, match=r"0\.0 GiB more are needed, 0\.0 GiB are free there\.\nMake room"):
            convert(hub, tmp_path / "out", NF4)
    # The disk fills up while the second file is written.
    (tmp_path / "out" / "layer-00001.safetensors.partial").symlink_to("/dev/full")
    real = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **_: None if path.is_symlink() else real(path, missing_ok=True))
    with pytest.raises(NibbleError, match=r"the disk is full: .*layer-00001\.safetensors\.partial can't be written"):
        convert(hub, tmp_path / "out", NF4)
    monkeypatch.undo()
    assert convert(hub, tmp_path / "out", NF4).kept == 2


def test_a_destination_that_no_folder_can_be_called(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(NibbleError, match=r"aaa can't be made: File name too long\.$"):
        convert(hub, tmp_path / ("a" * 300), NF4)


def test_verify(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    convert(hub, target, NF4)
    assert command.main(["--verify", str(target)]) == 0
    assert "8 files, " in (out := capsys.readouterr().out)
    assert out.endswith("KiB (nf4 with double quantisation, bfloat16): all checksums match\n")
    data = bytearray((target / "layer-00002.safetensors").read_bytes())
    data[-1] ^= 1
    (target / "layer-00002.safetensors").write_bytes(data)
    assert command.main(["--verify", str(target)]) == 2
    err = capsys.readouterr().err
    assert f"error: {target}: 1 file missing or changed since it was written: layer-00002.safetensors.\n" in err
    assert f"Delete it, then: python -m models.convert {hub} {target} --storage nf4" in err
    (target / "tokenizer.json").unlink()
    assert command.main(["--verify", str(target)]) == 2
    said = "2 files missing or changed since it was written: layer-00002.safetensors, tokenizer.json.\n"
    assert said in capsys.readouterr().err
    assert command.main(["--verify", str(hub)]) == 2
    assert "there is no nibble.json, so this isn't a converted checkpoint" in capsys.readouterr().err


def test_interruption_from_code_is_an_exception(hub: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"interrupted: 0 of 4 files are finished and kept"):
        convert(hub, tmp_path / "out", NF4, progress=stop)


@pytest.mark.parametrize("damaged", [False, True])
def test_force_removes_only_what_a_conversion_wrote(hub: Path, tmp_path: Path, damaged: bool) -> None:
    target = tmp_path / "out"
    convert(hub, target, NF4)
    notes = {name: f"my {name}" for name in ("notes.txt", "layer-notes.safetensors", "x.partial", "model.safetensors")}
    for name, text in notes.items():
        (target / name).write_text(text)
    manifest = json.loads((target / MANIFEST).read_text())
    if damaged:
        (target / MANIFEST).write_text("{")
    else:
        # Somebody's file, in a list that somebody has edited.
        record = {"size": 8, "sha256": "0" * 64, "tensors": []}
        (target / MANIFEST).write_text(json.dumps(manifest | {"files": manifest["files"] | {"notes.txt": record}}))
        with pytest.raises(NibbleError, match=r"notes\.txt is not what a conversion wrote there, so --force doesn't"):
            convert(hub, target, NF4, force=True)
        assert (target / "layer-00000.safetensors").is_file(), "refused before anything was removed"
        (target / MANIFEST).write_text(json.dumps(manifest))
    convert(hub, target, NF4, force=True)
    assert {name: (target / name).read_text() for name in notes} == notes
    assert NativeCheckpoint(target).manifest.complete


def test_a_changed_side_file_is_not_removed(hub: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    convert(hub, target, NF4)
    (target / "chat_template.jinja").write_text("mine")
    with pytest.raises(NibbleError, match=r"chat_template\.jinja is not what a conversion wrote there"):
        convert(hub, target, NF4, force=True)
    assert (target / "chat_template.jinja").read_text() == "mine"
