"""Weights of files: how often each row is learnt."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from tests.text_helpers import save_checkpoint_texts, write_lines
from train.config.load import parse_config
from train.data.load import Data, load_data
from train.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mixture")
    save_checkpoint_texts(made / "model")
    for name, count in (("a", 20), ("b", 40), ("c", 7)):
        write_lines(made / f"{name}.jsonl", *({"text": f"{name} {i}"} for i in range(count)), {"text": ""})
    return made


def load(folder: Path, train: str, *overrides: str) -> tuple[Data, list[str]]:
    text = (
        f"model: {{path: {folder / 'model'}}}\n"
        f"data: {{train: {train.replace('@', f'{folder}/')}, format: text, eval_fraction: null}}\n"
        f"output: {{dir: {folder}}}\n"
    )
    notes: list[str] = []
    config = parse_config(text, [override.replace("@", f"{folder}/") for override in overrides])
    data = load_data(config, folder / "model", folder / "skipped.jsonl", notes.append, datetime(2025, 1, 1))
    return data, notes


def counts(data: Data, folder: Path) -> Counter[str]:
    """How often each text is trained on."""
    tokenizer = load_tokenizer(folder / "model")
    return Counter(tokenizer.decode(data.examples[i][0]).removesuffix("</s>") for i in range(len(data.examples)))


def test_whole_and_broken_weights(folder: Path) -> None:
    data, _ = load(folder, "[{path: @a.jsonl, weight: 2.0}, {path: @b.jsonl, weight: 0.25}, @c.jsonl]")
    found = counts(data, folder)
    assert all(found[f"a {i}"] == 2 for i in range(20))
    assert all(found[f"c {i}"] == 1 for i in range(7))
    drawn = [text for text in found if text.startswith("b ")]
    assert len(drawn) == 10
    assert all(found[text] == 1 for text in drawn)
    assert drawn != [f"b {i}" for i in range(10)]
    assert len(data.examples) == 40 + 10 + 7
    assert len(data.reports[0].skipped_rows) == 3
    assert data.reports[0].file_rows == [21, 41, 8]

    again, _ = load(folder, "[{path: @a.jsonl, weight: 2.0}, {path: @b.jsonl, weight: 0.25}, @c.jsonl]")
    assert again.examples.fingerprint() == data.examples.fingerprint()
    other, _ = load(folder, "[{path: @a.jsonl, weight: 2.0}, {path: @b.jsonl, weight: 0.25}, @c.jsonl]", "train.seed=1")
    assert {text for text in counts(other, folder) if text.startswith("b ")} != set(drawn)

    half, _ = load(folder, "[{path: @a.jsonl, weight: 1.5}, {path: @c.jsonl, weight: 0.001}]")
    found = counts(half, folder)
    assert sorted(Counter(found[f"a {i}"] for i in range(20)).items()) == [(1, 10), (2, 10)]
    assert sum(found[f"c {i}"] for i in range(7)) == 1, "at least one"


def test_held_out_rows_are_not_repeated_nor_trained_on(folder: Path) -> None:
    data, _ = load(folder, "[{path: @a.jsonl, weight: 3}, {path: @b.jsonl, weight: 0.5}]", "data.eval_fraction=0.25")
    assert data.held_out is not None
    assert data.held_out_rows == 10, "of the 20 + 20 rows that are learnt"
    assert data.examples.total_rows == 30
    found = counts(data, folder)
    assert {found[text] for text in found if text.startswith("a ")} == {3}
    whole, _ = load(folder, "[{path: @a.jsonl, weight: 3}, {path: @b.jsonl, weight: 0.5}]")
    held_out = set(np.unique(whole.examples.rows)) - set(data.examples.rows.tolist())
    assert len(held_out) == 10


def test_files_without_weights_are_one_file(folder: Path) -> None:
    (folder / "ab.jsonl").write_text((folder / "a.jsonl").read_text() + (folder / "b.jsonl").read_text())
    one, _ = load(folder, "@ab.jsonl", "data.eval_fraction=0.1")
    for files in ("[@a.jsonl, @b.jsonl]", "'@[ab].jsonl'", "[{path: @a.jsonl}, {path: @b.jsonl, weight: 1.0}]"):
        several, _ = load(folder, files, "data.eval_fraction=0.1")
        assert several.examples.fingerprint() == one.examples.fingerprint()
        assert several.held_out_rows == one.held_out_rows
    evaluated, _ = load(folder, "@c.jsonl", "data.eval=[@a.jsonl, {path: @b.jsonl, weight: 0.5}]")
    assert evaluated.held_out_rows == 40


def test_a_file_without_rows_among_others_is_told(folder: Path) -> None:
    (folder / "none.jsonl").write_text("\n")
    data, notes = load(folder, "[@none.jsonl, @c.jsonl]")
    assert len(data.examples) == 7
    assert f"data.train: {folder}/none.jsonl holds no rows." in notes
