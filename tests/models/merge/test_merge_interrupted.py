"""Merges that are stopped, that find the disk full, or that are refused: nothing half-written has the final name."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint.conversion import Interrupted
from models.merge import __main__ as command
from models.merge.folder import STATE
from models.merge.merging import merge
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.convert_helpers import contents
from tests.hub_forms import save_form
from tests.merge_helpers import random_adapter, shard

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hub`, in four shards, `adapter`, and `expected`, the two merged."""
    folder = tmp_path_factory.mktemp("glm")
    save_form(folder / "hub", "glm4_moe_lite", torch.bfloat16, num_hidden_layers=2)
    shard(folder / "hub", 4)
    random_adapter(folder / "hub", folder / "adapter")
    merge(folder / "hub", folder / "adapter", folder / "expected")
    return folder


class Stop:
    """A progress that stops the merge, as Ctrl-C does, when so many shards are finished."""

    def __init__(self, after: int) -> None:
        self.after, self.begun = after, 0

    def __call__(self, done: int, total: int, what: str) -> None:
        self.begun += 1  # called before and after each shard
        if self.begun > 2 * self.after:
            raise KeyboardInterrupt


def test_goes_on_where_it_stopped(glm: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(Interrupted, match=r"finished are kept\.\nThe same command goes on where it stopped"):
        merge(glm / "hub", glm / "adapter", out, progress=Stop(2))
    assert not out.exists()
    kept = {path: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert len(kept) == 2
    # What a process that is killed leaves of a shard, and of a file beside.
    (partial / "model-00003-of-00004.safetensors.partial").write_bytes(b"half")
    (partial / "config.json.partial").write_bytes(b"{")
    result = merge(glm / "hub", glm / "adapter", out)
    assert contents(out) == contents(glm / "expected")
    assert not partial.exists()
    assert {(out / path.name).stat().st_ino for path in kept} == set(kept.values()), "not written again"
    shutil.rmtree(out)
    assert result.errors == merge(glm / "hub", glm / "adapter", out).errors, "measured in the first run too"


# Merges in a child process that dies by SIGKILL when it opens, makes, renames or removes its k-th file, for every sixth
# k until the merge gets through; then merges again.
KILLS = """
import itertools, os, signal, sys
from pathlib import Path
from models.merge.merging import merge

hub, adapter, folder = map(Path, sys.argv[1:])
merge(hub, adapter, folder / "warm")  # imports open files too

def die_at(k):
    seen = itertools.count()
    events = {"open", "os.mkdir", "os.rename", "os.remove"}
    def hook(event, arguments):
        if event in events and str(folder) in str(arguments[0]) and next(seen) == k:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for k in itertools.count(0, 6):
    out = folder / str(k)
    if (child := os.fork()) == 0:
        die_at(k)
        merge(hub, adapter, out)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(k, out.exists(), flush=True)
    if killed:
        merge(hub, adapter, out)
    if not killed:
        break
"""


def test_killed_at_any_point(glm: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLS, *map(str, (glm / "hub", glm / "adapter", tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    whole = [line.split()[1] == "True" for line in done.stdout.splitlines()]
    assert len(whole) > 5 and sorted(whole) == whole and not all(whole), "there only once it is whole"
    expected = contents(glm / "expected")
    for k in range(0, 6 * len(whole), 6):
        assert contents(tmp_path / str(k)) == expected
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_there_already_stays(glm: Path, tmp_path: Path) -> None:
    """A folder that happens to hold a file of the name of a merge's state."""
    for state in ("{}", '{"identity": "x", "finished": []}', "mine"):
        shutil.copytree(glm / "expected", tmp_path / "out")
        (tmp_path / "out" / STATE).write_text(state)
        with pytest.raises(NibbleError, match=r"out exists already\. Name a folder that doesn't\."):
            merge(glm / "hub", glm / "adapter", tmp_path / "out")
        assert (tmp_path / "out" / STATE).read_text() == state
        shutil.rmtree(tmp_path / "out")


def test_another_merge_is_unfinished_there(glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(Interrupted):
        merge(glm / "hub", glm / "adapter", out, progress=Stop(1))
    shutil.copytree(glm / "adapter", tmp_path / "adapter")
    for changes in ({"onto": "dequantised", "trained": "nf4"}, {"trained": "int8"}, {"adapter": tmp_path / "adapter"}):
        options: dict[str, Any] = {"adapter": glm / "adapter", **changes}
        with pytest.raises(NibbleError) as error:
            merge(glm / "hub", options.pop("adapter"), out, **options)
        assert str(error.value) == (
            f"{partial} is an unfinished merge of other files, or with other options.\n"
            "Name another folder, or add --force to begin anew."
        )
    # What is thrown away is all that a merge writes, from the beginning to the end.
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", lambda *_: {}["killed before the last step"])
        with pytest.raises(KeyError):
            merge(glm / "hub", glm / "adapter", out)
    assert (partial / "config.json").exists() and (partial / STATE).exists()
    merge(glm / "hub", tmp_path / "adapter", out, force=True)
    assert contents(out) == contents(glm / "expected")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(NibbleError, match=r"no merge has begun there \(it holds notes\.txt\)\. Move it away\."):
            merge(glm / "hub", glm / "adapter", tmp_path / "new", force=force)
    (partial := tmp_path / "damaged.partial").mkdir()
    for state in ('{"identity": 1}', "{", '{"identity": "x", "finished": 3}'):
        (partial / STATE).write_text(state)
        with pytest.raises(NibbleError):
            merge(glm / "hub", glm / "adapter", tmp_path / "damaged")
    merge(glm / "hub", glm / "adapter", tmp_path / "damaged", force=True)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing past so many bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("storage", [None, StorageSpec("nf4")])
def test_a_full_disk(glm: Path, tmp_path: Path, storage: StorageSpec | None) -> None:
    out = tmp_path / "out"
    with largest_file(60_000), pytest.raises(NibbleError, match=r"the disk is full: .*can't be written"):
        merge(glm / "hub", glm / "adapter", out, storage=storage)
    assert not list(tmp_path.glob("*/*.partial")), "nothing that would keep the disk full"
    assert out.exists() == (storage is not None)  # a conversion, which nibble.json says isn't finished
    merge(glm / "hub", glm / "adapter", out, storage=storage)
    if storage is None:
        assert contents(out) == contents(glm / "expected")


def test_too_little_room(glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NibbleError, match=r"out\.partial: 0\.0 GiB more are needed, 0\.0 GiB are free there"):
        merge(glm / "hub", glm / "adapter", tmp_path / "out")


# --- refused


@pytest.mark.parametrize("case", ["lacks", "spare", "other model", "expert too few", "converted", "no adapter"])
def test_refused_before_anything_is_written(glm: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(glm / "adapter", tmp_path / "adapter")
    tensors: dict[str, Tensor] = load_file(tmp_path / "adapter" / WEIGHTS)
    name, hub = "base_model.model.model.layers.1.mlp.experts.lora_B.weight", glm / "hub"
    expected = ""
    if case == "lacks":
        del tensors[name]
        expected = f"{WEIGHTS} lacks {name}, which adapter_config.json names for this model."
    elif case == "spare":
        tensors["base_model.model.model.layers.2.mlp.experts.lora_B.weight"] = torch.zeros(64, 24)
        expected = "model.layers.2.mlp.experts.lora_B.weight in adapter_model.safetensors, which"
    elif case == "expert too few":
        tensors[name] = tensors[name][:, :-3].clone()
        expected = f"{name} is [64, 21]; this model and the rank make it [64, 24]."
    elif case == "other model":
        save_form(tmp_path / "other", "afmoe")
        hub, expected = tmp_path / "other", "doesn't name."
    elif case == "converted":
        merge(hub, tmp_path / "adapter", tmp_path / "nf4", storage=StorageSpec("nf4"))
        hub, expected = tmp_path / "nf4", "is a converted checkpoint; an adapter is merged into the hub's format."
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    if case == "no adapter":
        (tmp_path / "adapter" / "adapter_config.json").unlink()
        expected = "is no adapter: it has no adapter_config.json."
    for storage in (None, StorageSpec("nf4")):
        with pytest.raises(NibbleError) as error:
            merge(hub, tmp_path / "adapter", tmp_path / "out", storage=storage)
        assert expected in str(error.value)
        assert not list(tmp_path.glob("out*"))


def test_two_shards_hold_a_tensor_differently(glm: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    shutil.copytree(glm / "hub", hub)
    index = json.loads((hub / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.self_attn.o_proj.weight"
    other = next(path for path in sorted(hub.glob("*.safetensors")) if path.name != index[name])
    save_file({**load_file(other), name: torch.zeros(2, 2)}, other)
    with pytest.raises(NibbleError, match=f"two shards hold {name}, in different shapes or dtypes"):
        merge(hub, glm / "adapter", tmp_path / "out")


# --- the command


def test_the_command(glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(glm / "hub"), str(glm / "adapter"), str(tmp_path / "out")]
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{tmp_path / 'out'}: 41 tensors merged, 436\.38 KiB \(as the base\), [\d.]+ s", lines[0])
    assert len(lines) == 4
    assert command.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'} exists already. Name a folder that doesn't.\n"
    assert command.main([*arguments[:2], str(tmp_path / "nf4"), "--storage", "nf4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stored"] == "nf4 with double quantisation, bfloat16" and found["destination"] == str(tmp_path / "nf4")
    assert {(row["layer"], row["group"]) for row in found["errors"]} >= {(0, "attention"), (1, "experts")}
    assert command.main([*arguments, "--single-quant"]) == 2
    assert capsys.readouterr().err.startswith("error: --single-quant is about 4-bit results: add --storage nf4")


def test_ctrl_c_in_the_command(
    glm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant.common.progress.Bar.update", lambda self, *progress: Stop(0)(*progress))
    assert command.main([str(glm / "hub"), str(glm / "adapter"), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.startswith("interrupted: the shards that are finished are kept.\n")
