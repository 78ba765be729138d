"""What config.json says of the text model, in a section of its own where the model is a vision-language one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.blocks.configjson import text_section
from models.load import ModelFolder
from quant.common.errors import NibbleError
from tests.text_helpers import save_checkpoint_texts, write_json
from tests.tiny import TINY
from train.config.load import Config
from train.data.tokenizer import load_tokenizer
from train.model import check_model


def test_section_is_all_of_the_file_where_it_has_none() -> None:
    assert text_section({"hidden_size": 64}, "") == {"hidden_size": 64}
    assert text_section({"hidden_size": 8, "text_config": {"hidden_size": 64}}, "") == {"hidden_size": 64}
    assert text_section({"text_config": None}, "") == {"text_config": None}
    with pytest.raises(NibbleError, match=r"^file: text_config must be an object, got \[\]\.$"):
        text_section({"text_config": []}, "file")


def test_tokenizer_takes_the_text_models_stop_tokens_and_vocabulary(tmp_path: Path) -> None:
    folder = save_checkpoint_texts(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink(missing_ok=True)
    outer: dict[str, Any] = {"vocab_size": 7, "eos_token_id": None}
    write_json(folder / "config.json", {**outer, "text_config": {"eos_token_id": 10, "vocab_size": 512}})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (10, 512)
    # Every section that names stop tokens counts; the first of generation_config.json is the one to append.
    write_json(folder / "config.json", {"eos_token_id": [3, 1], "text_config": {"eos_token_id": 10}})
    assert load_tokenizer(folder).eos_ids == {1, 3, 10}
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 10]})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (1, {1, 3, 10})


@pytest.mark.parametrize("nested", [True, False])
def test_sequence_length_is_held_against_the_text_models(tmp_path: Path, nested: bool) -> None:
    text = {**TINY["qwen3_5_moe"], "model_type": "qwen3_5_moe_text"}
    config = {"model_type": "qwen3_5_moe", "text_config": text} if nested else text
    source = ModelFolder(tmp_path, "tiny", config, None)

    def check(length: int) -> None:
        values: dict[str, Any] = {
            "model": {"path": str(tmp_path)},
            "data": {"train": "rows.jsonl", "sequence_length": length},
            "output": {"dir": str(tmp_path / "out")},
        }
        check_model(Config.model_validate(values), source, torch.device("cpu"))

    check(512)
    with pytest.raises(NibbleError, match=r"^data\.sequence_length: 513 is more .*: max_position_embeddings is 512 in"):
        check(513)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}
    text["rope_parameters"] = yarn
    check(2048)
    with pytest.raises(NibbleError, match="2049 is more than"):
        check(2049)
    text["max_position_embeddings"] = "x"
    with pytest.raises(NibbleError, match=r"max_position_embeddings must be a positive (integer|number), got 'x'\.$"):
        check(8)
    text["rope_parameters"] = {}
    with pytest.raises(NibbleError, match=r"max_position_embeddings must be a positive integer, got 'x'\.$"):
        check(8)
