"""Text while tokens come, against the tokenizers' own decoding of all tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.text_helpers import CORPUS, save_checkpoint_texts, sentencepiece_model
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.generate.stream import TextStream

TEXT = "naïve café, 数学 👩‍🚀 is 2 + 3? \n\n#### 72 <think>\ufffd é"


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "byte_level":
        save_checkpoint_texts(folder)
    else:
        sentencepiece_model(folder / "tokenizer.model")
    return load_tokenizer(folder)


def decoder(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    return lambda ids: tokenizer.decode(ids, skip_special=True)


def fed(tokenizer: Tokenizer, ids: list[int], *stops: str) -> tuple[TextStream, list[str]]:
    stream = TextStream(decoder(tokenizer), stops)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    return stream, [*pieces, stream.finish()]


@pytest.mark.parametrize("text", [TEXT, *CORPUS])
def test_the_pieces_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    stream, pieces = fed(tokenizer, ids)
    assert "".join(pieces) == stream.text == decoder(tokenizer)(ids)
    assert stream.tokens_of_text() == ids
    # Nothing waits longer than it must: every word is there with its last token.
    assert len([piece for piece in pieces if piece]) > len(text.split())


def test_no_piece_has_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("数 é 👩‍🚀 数")
    assert len(ids) > 8  # several tokens for most characters
    _, pieces = fed(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """Whatever a model may say, the pieces are what the tokenizers library makes of the whole."""
    tokenizer = load_tokenizer(save_checkpoint_texts(tmp_path))
    draw = random.Random(0)
    bare = [tokenizer.encode(char)[0] for char in "數é👩"]  # the first bytes of characters
    for _ in range(200):
        ids = [draw.choice(bare) if draw.random() < 0.3 else draw.randrange(400) for _ in range(30)]
        stream, pieces = fed(tokenizer, ids)
        assert "".join(pieces) == stream.text == decoder(tokenizer)(ids)


@pytest.mark.parametrize("stop", ["lazy", "azy d", " dog", "o", "jumps over the lazy dog", "The", ". "])
def test_a_stop_text_is_found_wherever_it_begins(tokenizer: Tokenizer, stop: str) -> None:
    ids = tokenizer.encode(CORPUS[0] * 2)
    whole = decoder(tokenizer)(ids)
    stream, pieces = fed(tokenizer, ids, "never said", stop, "dog. The")
    assert stream.stopped
    assert "".join(pieces) == stream.text == whole[: whole.index(stop)]
    # The tokens say the text, and perhaps the beginning of a token that the stop text is a part of.
    kept = decoder(tokenizer)(stream.tokens_of_text())
    assert kept.startswith(stream.text)
    fewer = decoder(tokenizer)(stream.tokens_of_text()[:-1])
    assert not stream.text or len(fewer) < len(stream.text)


def test_of_several_stop_texts_the_first_to_begin_counts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abcdef")
    stream, _ = fed(tokenizer, ids, "cd", "bc", "abcdefg")
    assert stream.text == "a"


def test_what_only_began_like_a_stop_text_is_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("User: hello there, User")
    stream, pieces = fed(tokenizer, ids, "User:\n", "there!")
    assert not stream.stopped
    assert "".join(pieces) == decoder(tokenizer)(ids)


def test_special_tokens_say_nothing(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("hello"), *sorted(tokenizer.special_ids)[:2], *tokenizer.encode(" there")]
    stream, pieces = fed(tokenizer, ids)
    assert "".join(pieces) == stream.text == decoder(tokenizer)(ids)
    assert "<" not in stream.text
