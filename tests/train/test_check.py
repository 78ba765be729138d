"""`--check` checks what it says, and says what it doesn't."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import LIMIT
from tests.run_helpers import ROOT, World, error_of, make_world, settings
from train.__main__ import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


# Attention of GLM-4.7-Flash is among the targets.
UNSERVED = (
    "warning: vLLM can't serve LoRA on kv_b_proj; llama.cpp can't serve LoRA on q_a_proj, q_b_proj, "
    "kv_a_proj_with_mqa, kv_b_proj. Merge before serving there, or set adapter.serve_with (docs/serving.md).\n"
)


def test_what_is_checked_and_what_is_not(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = world.model / "model.safetensors"
    moved = weights.rename(tmp_path / "weights")  # nothing of them is needed
    arguments = [*settings(world, tmp_path / "run"), "--check"]
    assert main(arguments) == 0
    moved.rename(weights)
    shown = capsys.readouterr()
    assert shown.err == UNSERVED
    assert shown.out.splitlines() == [
        f"{arguments[1]}: ok",
        "  checked      the keys of the config, and that the files it names are there",
        f"               the first 96 rows of {world.rows} (data.train): data.format, data.fields",
        f"               {world.model / 'config.json'}: the architecture, adapter.targets, adapter.layers and "
        "adapter.rank, data.sequence_length, model.storage",
        "  not checked  weights",
        "               tokens of the rows and the chat template",
        "               memory, and whether the device is there",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter__targets": ["q_proj"]}, "error: adapter.targets: 'q_proj' matches nothing in glm4_moe_lite"),
        ({"adapter__layers": [7]}, "error: adapter.layers: 7 out of range"),
        ({"data__sequence_length": 513}, "error: data.sequence_length: 513 is more than the model is made for"),
        ({"model__path": "./no/such/folder"}, "error: ./no/such/folder doesn't exist. Wanted: a checkpoint folder"),
        ({"data__format": "text"}, "error: data.train: none of the first rows can be used (data.format: text): "),
        (
            {"data__format": "prompt_completion", "data__fields": {"prompt": "question", "completion": "answer"}},
            "error: data.train: none of the first rows can be used (data.format: prompt_completion): ",
        ),
        ({"output__dir": "{rows}/run"}, "error: output.dir: {rows}/run can't be written to: {rows} is a file."),
    ],
)
def test_what_it_finds(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    changes = {key: v.replace("{rows}", str(world.rows)) if isinstance(v, str) else v for key, v in changes.items()}
    message = error_of([*settings(world, tmp_path / "run", **changes), "--check"], capsys)
    assert message.startswith(said.replace("{rows}", str(world.rows)))


def test_a_model_of_another_kind(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(world.model, tmp_path / "model")
    config = json.loads((world.model / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    message = error_of([*settings(world, tmp_path / "run", model__path=str(tmp_path / "model")), "--check"], capsys)
    assert "model_type 'llama' is not supported." in message


def test_rows_of_which_some_are_bad(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": 3}\n' + world.rows.read_text() * 2)
    arguments = [*settings(world, tmp_path / "run", data__train=str(rows)), "--check"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith(
        f"warning: 1 of the first 100 rows of {rows} can't be used and will be skipped: {rows}:1: "
    )
    assert f"the first 100 rows of {rows} (data.train)" in shown.out
    message = error_of([*arguments, "--set", "data.on_bad_row=error"], capsys)
    assert message.startswith(
        f"error: data.train: 1 of the first rows can't be used (data.format: messages): {rows}:1: "
    )
    rows.write_text("")
    assert error_of(arguments, capsys) == f"error: data.train: {rows} holds no rows.\n"


def test_columns(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run would say of them at its end of reading, or stop at."""
    row = {"instruction": "q", "context": "c", "output": "a"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    changes = {"data__train": str(rows), "data__format": "prompt_completion"}
    fields = {"prompt": "instruction", "completion": "output"}
    assert main([*settings(world, tmp_path / "run", **changes, data__fields=fields), "--check"]) == 0
    said = "warning: data.train: columns with content that are not used: context (1 of 1 rows)."
    assert capsys.readouterr().err.startswith(said)
    fields["prompt"] = "{instruction} {nope}"
    message = error_of([*settings(world, tmp_path / "run", **changes, data__fields=fields), "--check"], capsys)
    assert message.startswith(f"error: data.fields.prompt: data.train: {rows}: no field 'nope'; its rows have instruc")


def test_a_hub_id_is_not_downloaded(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "nobody/no-such-model"
    assert main([*settings(world, tmp_path / "run", model__path=name), "--check"]) == 0
    assert (
        f"  not checked  model.path: {name} is not on this machine yet; a run downloads it." in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "changes", [{"data__format": "text"}, {"data__sequence_length": 513}, {"model__path": "./no/such/folder"}]
)
def test_what_needs_no_torch_is_checked_before_it_is_imported(
    world: World, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Which takes longer than all the rest."""
    arguments = [*settings(world, tmp_path / "run", **changes), "--check"]
    code = (
        "import runpy, sys\ntry:\n    runpy.run_module('train', run_name='__main__', alter_sys=True)\nfinally:\n"
        "    print('torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr


def test_a_rank_above_the_matrix(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a run too. The smaller side is that of the file: of the router [experts, hidden] 4."""
    shape = json.loads((world.model / "config.json").read_text())
    assert (shape["n_routed_experts"], shape["hidden_size"], shape["num_hidden_layers"]) == (4, 64, 2)
    warning = (
        "warning: adapter.rank is more than the smaller side of 1 of 1 adapted matrices, e.g. 5 for mlp.gate [4, 64]: "
        "a matrix has no higher rank, so that this only costs memory.\n"
    )
    changes = {"adapter__targets": ["router"], "model__storage": "none", "train__max_steps": 1}
    for rank in (4, 5):
        arguments = settings(world, tmp_path / f"run{rank}", **changes, adapter__rank=rank)
        assert main([*arguments, "--check"]) == 0
        assert capsys.readouterr().err == (warning if rank == 5 else "")
        assert main(arguments) == 0
        assert (warning in capsys.readouterr().err) == (rank == 5)


def test_matrices_that_a_server_cannot_serve(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the start of a run too; with adapter.serve_with they aren't trained."""
    adapted = {}
    for server in (None, "vllm", "llamacpp"):
        out = tmp_path / str(server)
        arguments = settings(world, out, adapter__serve_with=server, train__max_steps=1)
        assert main([*arguments, "--check"]) == 0
        assert capsys.readouterr().err == ("" if server else UNSERVED)
        assert main(arguments) == 0
        assert (UNSERVED in capsys.readouterr().err) == (server is None)
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        adapted[server] = set(config["target_modules"])
    latent = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert adapted == {None: latent, "vllm": latent - {"kv_b_proj"}, "llamacpp": {"o_proj"}}
    arguments = settings(world, tmp_path / "named", adapter__serve_with="vllm", adapter__targets=["kv_b_proj"])
    assert error_of(arguments, capsys) == (
        "error: adapter.targets: 'kv_b_proj' with adapter.serve_with: vllm: vLLM can't serve LoRA on it.\n"
        "       Leave it out of adapter.targets, or set adapter.serve_with: null.\n"
    )
