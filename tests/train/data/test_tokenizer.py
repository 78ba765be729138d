"""Tokenizers read from checkpoint folders, against the tokenizers and sentencepiece libraries and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quant.common.errors import NibbleError
from tests.text_helpers import byte_level_tokenizer, save_checkpoint_texts, sentencepiece_model, write_json
from train.data.token_backends import Encoded, _failures
from train.data.tokenizer import load_tokenizer

TEXTS = [
    "The quick brown fox",
    "  two spaces, then\n\nlines \n",
    "naïve café 数学 🙂 done",
    "<|user|>hi<|assistant|><think>5</think>ok</s>",
    "",
]


def covered(text: str, encoded: Encoded) -> None:
    """Offsets cover the text from its first to its last character, without holes, in order."""
    position = 0
    for start, end in encoded.offsets:
        assert start <= position, "characters between two tokens belong to none"
        assert end >= start
        position = max(position, end)
    assert position == len(text)
    assert encoded.offsets == sorted(encoded.offsets)
    assert [end for _, end in encoded.offsets] == sorted(end for _, end in encoded.offsets)


def test_ids_equal_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = save_checkpoint_texts(tmp_path)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == text
        covered(text, ours.encode_batch([text])[0])
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert ours.vocab_size == len(theirs) == 400
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def test_special_tokens_in_text_are_recognised_and_none_is_added(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_checkpoint_texts(tmp_path))
    ids = tokenizer.encode("<|user|>hi</s>")
    assert [tokenizer.token(ids[0]), tokenizer.token(ids[-1])] == ["<|user|>", "</s>"]
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode(ids, skip_special=True) == "hi"


def test_saved_truncation_padding_and_trimmed_offsets_are_undone(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = byte_level_tokenizer()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "The quick  brown\n\n fox "
    encoded = load_tokenizer(tmp_path).encode_batch([text])[0]
    assert "".join(text[a:b] for a, b in encoded.offsets) == text


def test_eos_is_a_list_from_every_file_that_names_one(tmp_path: Path) -> None:
    folder = save_checkpoint_texts(tmp_path, "glm")
    write_json(folder / "config.json", {"eos_token_id": 2, "vocab_size": 512})
    tokenizer = load_tokenizer(folder)
    assert sorted(map(tokenizer.token, tokenizer.eos_ids)) == ["</s>", "<pad>", "<|observation|>", "<|user|>"]
    assert tokenizer.token(tokenizer.eos_id or 0) == "</s>"
    assert tokenizer.vocab_size == 512


def test_eos_of_the_model_when_the_tokenizer_names_none(tmp_path: Path) -> None:
    folder = save_checkpoint_texts(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    write_json(folder / "generation_config.json", {"eos_token_id": [10, 1]})
    assert load_tokenizer(folder).eos_id == 10
    (folder / "generation_config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id is None
    assert tokenizer.eos_ids == frozenset()


def test_named_tokens_come_from_special_tokens_map_too(tmp_path: Path) -> None:
    folder = save_checkpoint_texts(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "bos_token": "<s>"}


def test_tokens_that_only_tokenizer_config_names_are_added(tmp_path: Path) -> None:
    folder = save_checkpoint_texts(tmp_path)
    write_json(
        folder / "tokenizer_config.json", {"added_tokens_decoder": {"400": {"content": "<new>", "special": True}}}
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<new>") == [400]
    assert 400 in tokenizer.special_ids
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": {"420": {"content": "<new>"}}})
    with pytest.raises(NibbleError, match=r"gives '<new>' the id 420, but in tokenizer.json its place would be 400"):
        load_tokenizer(folder)


def test_document_prefix_is_what_the_tokenizer_itself_adds(tmp_path: Path) -> None:
    from tokenizers import processors

    assert load_tokenizer(save_checkpoint_texts(tmp_path / "none")).document_prefix == ()
    tokenizer = byte_level_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A </s>", special_tokens=[("[gMASK]", 3), ("<sop>", 4), ("</s>", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.document_prefix == (3, 4)
    assert loaded.encode("hello") == byte_level_tokenizer().encode("hello").ids


def test_sentencepiece_where_that_is_all_there_is(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    sentencepiece_model(tmp_path / "tokenizer.model")
    write_json(
        tmp_path / "tokenizer_config.json",
        {"added_tokens_decoder": {"420": {"content": "<|user|>", "special": True}, "421": {"content": "<tool>"}}},
    )
    library = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == 422
    assert (ours.bos_id, ours.eos_id) == (library.bos_id(), library.eos_id())
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert ours.document_prefix == (library.bos_id(),)
    for text in (*TEXTS[:3], "\n", " "):
        assert ours.encode(text) == library.encode(text)
        covered(text, ours.encode_batch([text])[0])
        assert ours.decode(ours.encode(text)) == text

    text = "hello<|user|>café 数</s><tool> x"
    encoded = ours.encode_batch([text])[0]
    special = {ours.token(i): text[a:b] for i, (a, b) in zip(*encoded, strict=True) if i in (420, 421, ours.eos_id)}
    assert special == {"<|user|>": "<|user|>", "</s>": "</s>", "<tool>": "<tool>"}
    covered(text, encoded)
    assert ours.decode(encoded.ids) == text, "no space is put after a special token"
    assert ours.decode(encoded.ids, skip_special=True) == "hellocafé 数<tool> x"


def test_sentencepiece_bytes_of_one_character_share_its_range(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    encoded = tokenizer.encode_batch(["a🙂b"])[0]
    ranges = [span for i, span in zip(*encoded, strict=True) if tokenizer.token(i).startswith("<0x")]
    assert ranges == [(1, 2)] * 4
    assert encoded.offsets[0][0] == 0
    assert encoded.offsets[-1] == (2, 3)


def test_sentencepiece_without_bos(tmp_path: Path) -> None:
    sentencepiece_model(tmp_path / "tokenizer.model")
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    assert load_tokenizer(tmp_path).document_prefix == ()


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        NibbleError, match=r"no tokenizer: neither tokenizer.json nor tokenizer.model is there.\nIt comes"
    ):
        load_tokenizer(tmp_path)


CUT = r".*\nThe file may be cut off"


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(NibbleError, match=r"tokenizer.json: the tokenizers library can't read it: " + CUT):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(NibbleError, match=r"tokenizer.model: the sentencepiece library can't read it: " + CUT):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(NibbleError, match=r"tokenizer_config.json is not valid JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(NibbleError, match=r"tokenizer_config.json holds a list, expected an object"):
        load_tokenizer(tmp_path)


# What the tokenizers library accepts and then fails on, or ends with a panic of Rust, and when.
FAULTY: dict[str, tuple[dict[str, Any], str]] = {
    "prefix longer than a merge": (
        {
            "model": {
                "type": "BPE",
                "continuing_subword_prefix": "####",
                "vocab": {"a": 0, "b": 1},
                "merges": [["a", "b"]],
            }
        },
        "read",
    ),
    "no character map": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "read"),
    "unknown token in the template": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
        "use",
    ),
    "chunks of nothing": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "use"),
    "no unknown token": ({"model": {"type": "Unigram", "unk_id": None, "vocab": []}}, "use"),
    "fails at a text": ({"model": {"type": "WordLevel", "unk_token": "[U]", "vocab": {"a": 0}}}, "encode"),
    "panics at a text": ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}}, "use"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_failures_and_panics_of_the_library_name_the_file(tmp_path: Path, name: str) -> None:
    changes, when = FAULTY[name]
    path = tmp_path / "tokenizer.json"
    write_json(path, {**json.loads(byte_level_tokenizer().to_str()), **changes, "added_tokens": []})
    what = "use" if when == "encode" else when
    message = rf"^{path}: the tokenizers library can't {what} it: " + CUT
    if when == "encode":
        tokenizer = load_tokenizer(tmp_path)
        with pytest.raises(NibbleError, match=message):
            tokenizer.encode("naïve café")
    else:
        with pytest.raises(NibbleError, match=message):
            load_tokenizer(tmp_path)


def test_an_interrupt_is_none_of_them(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), _failures(tmp_path, "tokenizers", "read it"):
        raise KeyboardInterrupt


def test_ids_beyond_any_vocabulary(tmp_path: Path) -> None:
    tokenizer = json.loads(byte_level_tokenizer().to_str())
    tokenizer["model"]["vocab"]["far"] = 4_000_000_000
    write_json(tmp_path / "tokenizer.json", tokenizer)
    with pytest.raises(NibbleError, match=r"tokenizer.json: a token has the id 4,000,000,000; ids end at"):
        load_tokenizer(tmp_path)


IDS = r"eos_token_id must be the id of a token or a list of ids, got "
DECODER = "added_tokens_decoder"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    *(
        (name, {"eos_token_id": value}, rf"{IDS}{shown}")
        for name in ("generation_config.json", "config.json")
        for value, shown in (
            ("abc", "'abc'"),
            ([[1]], r"\[\[1\]\]"),
            (-1, "-1"),
            (True, "True"),
            (1.0, "1.0"),
            ({}, r"\{"),
        )
    ),
    ("config.json", {"text_config": {"eos_token_id": [1, None]}}, rf"{IDS}\[1, None\]"),
    ("generation_config.json", {"eos_token_id": 10**30}, IDS),
    *(
        ("config.json", {"vocab_size": value}, r"vocab_size must be a positive integer")
        for value in ("x", 0, True, [1])
    ),
    ("config.json", {"vocab_size": 10**12}, r"vocab_size is 1000000000000; more than"),
    ("tokenizer_config.json", {"eos_token": 3}, r"eos_token must be text, got 3"),
    ("tokenizer_config.json", {"eos_token": ["</s>"]}, r"eos_token must be text, got \['</s>'\]"),
    ("tokenizer_config.json", {"eos_token": {"id": 3}}, r"eos_token: content must be text, got None"),
    ("special_tokens_map.json", {"bos_token": {"content": 3}}, r"bos_token: content must be text, got 3"),
    ("special_tokens_map.json", {"pad_token": False}, r"pad_token must be text, got False"),
    ("tokenizer_config.json", {DECODER: [1]}, r"added_tokens_decoder must be an object, got \[1\]"),
    ("tokenizer_config.json", {DECODER: {"x": {}}}, r"added_tokens_decoder: 'x' is not the id of a token"),
    ("tokenizer_config.json", {DECODER: {"-1": {}}}, r"added_tokens_decoder: '-1' is not the id of a token"),
    ("tokenizer_config.json", {DECODER: {"²": {}}}, r"added_tokens_decoder: '²' is not the id of a token"),
    ("tokenizer_config.json", {DECODER: {"9" * 5000: {}}}, r"added_tokens_decoder: '9.*' is not the id of a token"),
    ("tokenizer_config.json", {DECODER: {"1": "x"}}, r"added_tokens_decoder: 1 must be an object, got 'x'"),
    ("tokenizer_config.json", {DECODER: {"1": {}}}, r"added_tokens_decoder: 1: content must be text, got None"),
    (
        "tokenizer_config.json",
        {DECODER: {"1": {"content": 1}}},
        r"added_tokens_decoder: 1: content must be text, got 1",
    ),
    (
        "tokenizer_config.json",
        {DECODER: {"1": {"content": "x", "special": 1}}},
        r"special must be true or false, got 1",
    ),
    (
        "tokenizer_config.json",
        {DECODER: {"7": {"content": "x"}, "07": {"content": "y"}}},
        r"added_tokens_decoder has two tokens with the id 7",
    ),
    *(
        ("added_tokens.json", {"<x>": value}, r"<x> must be an integer of at least 0")
        for value in ("5", -1, True, [1], None)
    ),
    ("added_tokens.json", {"<x>": 500, "<y>": 500}, r"'<x>' and '<y>' have the same id 500"),
    ("tokenizer_config.json", {"add_bos_token": "yes"}, r"add_bos_token must be true or false, got 'yes'"),
]


@pytest.mark.parametrize(("name", "values", "message"), WRONG, ids=range(len(WRONG)))
def test_values_of_a_wrong_type_name_file_and_key(
    tmp_path: Path, name: str, values: dict[str, Any], message: str
) -> None:
    sentencepiece_model(tmp_path / "tokenizer.model")
    write_json(tmp_path / name, values)
    with pytest.raises(NibbleError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert len(str(caught.value)) < len(str(tmp_path)) + 300


def test_ids_beyond_the_models_vocabulary(tmp_path: Path) -> None:
    folder = save_checkpoint_texts(tmp_path)
    tokenizer = load_tokenizer(folder, vocab_size=397)
    tokenizer.encode("hello")
    with pytest.raises(NibbleError, match=r"gives id 397 \('</think>'\), but the model's vocabulary has 397 rows"):
        tokenizer.encode("hello</think>")
    with pytest.raises(NibbleError, match=r"gives id 2 \('<pad>'\)|gives id 1 \('</s>'\)"):
        load_tokenizer(folder, vocab_size=1)


def test_named_token_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    folder = save_checkpoint_texts(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**config, "eos_token": "<|endoftext|>"})
    with pytest.raises(NibbleError, match=r"eos_token is '<\|endoftext\|>', which the tokenizer doesn't know"):
        load_tokenizer(folder)
