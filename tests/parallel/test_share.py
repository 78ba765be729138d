"""Rows that one process reads and all have, and what is computed of them together: load, balance, held-out loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.blocks.balance import AuxiliaryLoss, BiasUpdate
from models.load import load_model
from parallel.shards import Shards
from tests.dist_workers.share import CPU, RATE, configured, described, read
from tests.helpers import assert_close
from tests.processes import run_processes
from tests.run_helpers import messages, questions, write_tokenizer
from tests.tiny import save_tiny
from train.held_out import held_out_loss
from train.loop import training_step

SIGMOID, SOFTMAX = "glm4_moe_lite", "qwen3_5_moe_text"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("share")
    pairs = questions(80, seed=0)
    for name, changes in (
        (SIGMOID, {"num_hidden_layers": 2}),
        (SOFTMAX, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}),
    ):
        (made / name).mkdir()
        save_tiny(made / name, name, vocab_size=write_tokenizer(made / name, [q + a for q, a in pairs]), **changes)
    (made / "rows.jsonl").write_text(messages(pairs) + "not JSON\n")
    (made / "other.jsonl").write_text(messages(questions(30, seed=1)))
    return made


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    paths = [folder / SIGMOID, folder / SOFTMAX, folder / "rows.jsonl", folder / "other.jsonl", folder]
    made: list[dict[str, Any]] = run_processes(2, "tests.dist_workers.share:everything", *map(str, paths))
    return made


@pytest.mark.parametrize("held_out", ["fraction", "given"])
def test_every_process_has_its_share_of_the_rows_of_one(
    folder: Path, results: list[dict[str, Any]], held_out: str, tmp_path: Path
) -> None:
    weighted = f"data.eval=[{{path: {folder / 'other.jsonl'}, weight: 0.5}}]"
    given = () if held_out == "fraction" else ("data.eval_fraction=null", weighted)
    config = configured(str(folder / SIGMOID), str(folder / "rows.jsonl"), tmp_path, *given)
    alone, (first, second) = described(read(config, tmp_path), steps=3), (result[held_out] for result in results)
    for key in ("state", "fingerprint", "rows"):
        assert first[key] == second[key] == alone[key], key
    for ours, theirs, both in zip(first["train"], second["train"], alone["train"], strict=True):
        assert len(ours) == len(theirs) == 2
        dealt = [batch for turn in zip(ours, theirs, strict=True) for batch in turn]
        assert dealt == [*both, []]
    assert [len(rows) for rows in (first["held_out"], second["held_out"])] == [-(-len(alone["held_out"]) // 2)] * 2
    dealt = [batch for turn in zip(first["held_out"], second["held_out"], strict=True) for batch in turn]
    assert [batch for batch in dealt if batch] == alone["held_out"]


def test_one_process_reports_and_writes(results: list[dict[str, Any]]) -> None:
    first, second = results
    assert (first["fraction"]["reports"], first["given"]["reports"]) == ([81], [81, 30])
    assert (first["given"]["skipped"], first["files"]) == (1, ["log-0", "log-1", "skipped.jsonl"])
    assert second["fraction"]["reports"] == second["given"]["reports"] == []
    assert (second["given"]["skipped"], second["files"]) == (0, first["files"])


@pytest.mark.parametrize(
    ("name", "model_type", "method", "accumulation"),
    [("bias", SIGMOID, BiasUpdate, 3), ("auxiliary", SOFTMAX, AuxiliaryLoss, 4)],
)
def test_steps_with_balance_are_those_of_one_process(
    folder: Path,
    results: list[dict[str, Any]],
    tmp_path: Path,
    name: str,
    model_type: str,
    method: type[BiasUpdate | AuxiliaryLoss],
    accumulation: int,
) -> None:
    overrides = f"train.gradient_accumulation={accumulation}"
    data = read(configured(str(folder / SIGMOID), str(folder / "rows.jsonl"), tmp_path, overrides), tmp_path)
    model = load_model(folder / model_type, storage="none", dtype=torch.float32).requires_grad_(True).train()
    model.balance = method(model, 0.05)
    shards = Shards(model)
    optimizer, measured = torch.optim.SGD([parameter for _, parameter in shards.parameters], lr=RATE), []
    for step in (1, 2):
        batches = next(data.train)
        assert len(batches) == accumulation
        made = training_step(shards, optimizer, batches, step=step, max_grad_norm=None, device=CPU)
        measured += [made.loss, *made.balance.values()]

    first, second = (result[name] for result in results)
    assert first == second  # weights and biases bit for bit
    assert first["measured"] == pytest.approx(measured, rel=1e-5)
    found = load_file(folder / f"{name}.safetensors")
    for key, tensor in model.state_dict().items():
        assert_close(found[key], tensor, what=key)
    assert data.held_out is not None
    assert first["held_out"] == pytest.approx(held_out_loss(model, data.held_out, CPU), rel=1e-5)


def test_processes_leave_an_evaluation_together(results: list[dict[str, Any]]) -> None:
    assert [result["stopped"][:2] for result in results] == [[None, [0]]] * 2
    assert results[0]["stopped"][2] > 1
    said = "the held-out rows have no token to learn, so there is no loss to measure.\nSee data.eval."
    assert [result["unlabelled"] for result in results] == [[said, results[0]["stopped"][2]]] * 2  # no pass left out
