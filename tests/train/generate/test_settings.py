"""How tokens are chosen: the options, for the rest generation_config.json; ranges; the line that says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.generation.sampling import Sampling
from quant.common.errors import NibbleError
from tests.text_helpers import save_checkpoint_texts
from train.data.tokenizer import load_tokenizer
from train.generate.settings import Settings, read_settings

GIVEN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint_texts(tmp_path_factory.mktemp("model"), "qwen")


def read(
    checkpoint: Path, tmp_path: Path, file: dict[str, Any] | None, stops: tuple[str, ...] = (), seed: int | None = None,
    **given: Any,
) -> tuple[Settings, list[str]]:  # fmt: skip
    tokenizer = load_tokenizer(checkpoint)
    if file is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(file))
    options = {**dict.fromkeys(GIVEN), **given}
    return read_settings(options, tmp_path, tokenizer, stop_texts=stops, seed=seed)


@pytest.mark.parametrize(
    ("file", "given", "expected", "said"),
    [
        (None, {}, Sampling(), "greedy, at most 512 new tokens"),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {}, Sampling(), "greedy (FILE), "),
        ({"temperature": 0.7}, {}, Sampling(0.7), "temperature 0.7 (FILE), "),
        (
            {"do_sample": True, "top_k": 20, "top_p": 0.95},
            {},
            Sampling(1.0, 20, 0.95),
            "temperature 1 (FILE), top-k 20 (FILE), top-p 0.95 (FILE), at most 512 new tokens",
        ),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "max_new_tokens": 40, "repetition_penalty": 1.1},
            {"temperature": 0.3, "top_k": 0, "min_p": 0.1},
            Sampling(0.3, None, None, 0.1, 1.1),
            "temperature 0.3, min-p 0.1, repetition-penalty 1.1 (FILE), at most 40 new tokens (FILE), ",
        ),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20}, {"temperature": 0.0}, Sampling(), "greedy, at most"),
        # What transformers writes for "off".
        ({"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": None}, {}, Sampling(1.0), "temperature 1 (FILE), at"),
        (
            {"do_sample": False},
            {"temperature": 2.0, "top_p": 1.0, "max_new_tokens": 1},
            Sampling(2.0),
            "temperature 2, at most 1 new token, ",
        ),
    ],
)  # fmt: skip
def test_what_is_not_given_is_the_checkpoints(
    checkpoint: Path, tmp_path: Path, file: dict[str, Any] | None, given: dict[str, Any], expected: Sampling, said: str
) -> None:
    settings, warnings = read(checkpoint, tmp_path, file, **given)
    assert settings.sampling == expected
    assert settings.said.startswith(said.replace("FILE", "generation_config.json"))
    assert settings.said.endswith("stops at </s>, <|im_end|>") and "\n" not in settings.said
    assert not warnings


def test_every_known_end_stops(checkpoint: Path, tmp_path: Path) -> None:
    """Of the tokenizer, generation_config.json and config.json."""
    tokenizer = load_tokenizer(checkpoint)
    settings, _ = read(checkpoint, tmp_path, None, stops=("\nUser:",), seed=3)
    assert {tokenizer.token(index) for index in settings.stop_ids} == {"</s>", "<|im_end|>"}
    assert settings.stop_texts == ("\nUser:",) and settings.seed == 3
    assert settings.said.endswith(r"<|im_end|>, '\nUser:'")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, "--temperature must be 0 "),
        ({"temperature": float("nan")}, "--temperature must be 0 "),
        ({"top_k": -3}, "--top-k must be an integer of at least 1, got -3."),
        ({"top_p": 1.5}, "--top-p must be above 0 and at most 1, got 1.5."),
        ({"top_p": 0.0}, "--top-p must be above 0"),
        ({"min_p": -0.1}, "--min-p must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty must be above 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be an integer from 1 to 16,777,216, got 0."),
        ({"max_new_tokens": 10**11}, "--max-new-tokens must be an integer from 1 to 16,777,216, got 100000000000."),
        ({"seed": -1}, "--seed must be"),
        ({"stops": ("x", "")}, "--stop is empty"),
        # Given with nothing to draw, it would have no effect.
        ({"top_p": 0.9}, "--top-p is about what is drawn"),
        ({"temperature": 0.0, "min_p": 0.1}, "--min-p is about what is drawn"),
    ],
)
def test_values_out_of_range_name_the_option(
    checkpoint: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(NibbleError) as raised:
        read(checkpoint, tmp_path, None, **given)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", "warm"), ("top_k", 2.5), ("top_p", 7), ("do_sample", "yes"), ("max_new_tokens", -1)],
)
def test_values_of_the_file_name_the_file(checkpoint: Path, tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(NibbleError, match=rf"generation_config\.json: {key} must be "):
        read(checkpoint, tmp_path, {key: value})


def test_what_is_not_computed_is_said(checkpoint: Path, tmp_path: Path) -> None:
    _, warnings = read(checkpoint, tmp_path, {"no_repeat_ngram_size": 3, "num_beams": 1, "typical_p": None})
    assert [warning.partition(": ")[2] for warning in warnings] == [
        "no_repeat_ngram_size is 3, which isn't computed here: answers differ from transformers'"
    ]


def test_settings_that_are_off_bring_no_warning(checkpoint: Path, tmp_path: Path) -> None:
    off = {"bad_words_ids": [], "min_new_tokens": 0, "guidance_scale": 1.0, "sequence_bias": {}, "penalty_alpha": 0.0}
    assert read(checkpoint, tmp_path, off | {"typical_p": 0.5})[1] == []  # greedy: nothing is drawn
    assert len(read(checkpoint, tmp_path, off | {"typical_p": 0.5, "do_sample": True, "min_new_tokens": 1})[1]) == 2


def test_a_length_that_counts_the_prompt(checkpoint: Path, tmp_path: Path) -> None:
    """As transformers: where max_new_tokens isn't given."""
    settings, _ = read(checkpoint, tmp_path, {"max_length": 40})
    assert (settings.max_length, settings.max_new_tokens) == (40, 40)
    assert settings.said.startswith("greedy, at most 40 tokens with the prompt (generation_config.json), ")
    for file, given in (({"max_length": 40, "max_new_tokens": 9}, {}), ({"max_length": 40}, {"max_new_tokens": 9})):
        settings, _ = read(checkpoint, tmp_path, file, **given)
        assert (settings.max_length, settings.max_new_tokens) == (None, 9)
    with pytest.raises(NibbleError, match="max_length must be an integer from 1"):
        read(checkpoint, tmp_path, {"max_length": 0})
