"""Text to tokens and back, from the tokenizer files of a checkpoint folder.

`tokenizer.json` is read by the tokenizers library; a folder that has only `tokenizer.model` is read by
sentencepiece. Either way special tokens written in the text (`<|user|>`, `</s>`) become their own ids, no
BOS or EOS is added, and every token knows the characters it covers: labels are made from those.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from models.blocks.configjson import text_section
from quant.common.errors import NibbleError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Encoded(NamedTuple):
    """One tokenised text.

    ids: token ids.
    offsets: for each token the characters [start, end) of the text that it covers. Starts and ends never
        decrease; the tokens of one character (byte fallback) share its range.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class AddedTokenEntry(NamedTuple):
    """A token that is matched in the text before the model splits it."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Backend(Protocol):
    """What differs between the two libraries."""

    @property
    def size(self) -> int:
        """One more than the highest id."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids that the tokenizer itself puts before a plain document (Llama's BOS; none for GLM and Qwen)."""

    def id_of(self, token: str) -> int | None: ...
    def token_of(self, index: int) -> str: ...
    def encode_batch(self, texts: list[str]) -> list[Encoded]: ...
    def decode(self, ids: list[int], skip_special: bool) -> str: ...


class Tokenizer:
    """A checkpoint's tokenizer.

    where: the folder it is from.
    bos_id, eos_id, pad_id: ids named by the tokenizer's configuration, None where it names none. `eos_id` is
        the one to append; where the tokenizer names none it is the first of generation_config.json / config.json.
    eos_ids: every id that ends generation (those files may list several).
    special_ids: added tokens marked special, and the eos ids.
    special_tokens: {"bos_token": "<s>", …}, as chat templates expect them.
    document_prefix: ids that begin a document without chat template, because the tokenizer puts them there.
    vocab_size: rows of the model's embedding when known, else one more than the tokenizer's highest id.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        where: str,
        special_tokens: dict[str, str],
        generation_eos: Sequence[int] = (),
        vocab_size: int | None = None,
    ):
        self._backend = backend
        self.where = where
        self.special_tokens = special_tokens
        self.vocab_size = backend.size if vocab_size is None else vocab_size
        self.bos_id = self._named("bos_token")
        self.pad_id = self._named("pad_token")
        named_eos = self._named("eos_token")
        eos = list(dict.fromkeys([*([] if named_eos is None else [named_eos]), *generation_eos]))
        self.eos_id: int | None = eos[0] if eos else None
        self.eos_ids = frozenset(eos)
        self.special_ids = backend.special_ids | self.eos_ids
        self.document_prefix = backend.prefix
        self._check(eos)

    def _named(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        index = self._backend.id_of(token)
        if index is None:
            raise NibbleError(
                f"{self.where}: {name} is {token!r}, which the tokenizer doesn't know. "
                "tokenizer_config.json and the tokenizer don't belong together."
            )
        return index

    def _check(self, ids: Iterable[int]) -> None:
        worst = max(ids, default=-1)
        if worst >= self.vocab_size:
            raise NibbleError(
                f"{self.where}: the tokenizer gives id {worst} ({self._backend.token_of(worst)!r}), but the model's "
                f"vocabulary has {self.vocab_size} rows.\n"
                "They don't belong together, or tokens were added without resizing the model."
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are recognised, none is added."""
        return self.encode_batch([text])[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Ids and character ranges of many texts, in parallel where the library can.

        Raises NibbleError for an id outside the model's vocabulary.
        """
        encoded = self._backend.encode_batch(list(texts))
        for one in encoded:
            self._check(one.ids)
        return encoded

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special)

    def token(self, index: int) -> str:
        """The token's own spelling in the vocabulary ('Ġthe', '<|user|>'); for messages and tests."""
        return self._backend.token_of(index)


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    vocab_size: rows of the model's embedding; None reads it from the folder's config.json if that is there.
    Raises NibbleError when the folder has no tokenizer, or files that contradict each other.
    """
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    model_config = _read_json(folder / "config.json")
    text = text_section(model_config)
    named = _named_tokens({**_read_json(folder / "special_tokens_map.json"), **config})
    added = _added_tokens(config)

    backend: Backend
    if (folder / "tokenizer.json").is_file():
        backend = _load_tokenizers(folder / "tokenizer.json", added)
    elif (folder / "tokenizer.model").is_file():
        for token, index in _read_json(folder / "added_tokens.json").items():
            added.setdefault(int(index), AddedTokenEntry(token, special=False))
        bos = named.get("bos_token", "<s>") if config.get("add_bos_token", True) else None
        backend = _SentencePiece(folder / "tokenizer.model", added, bos)
        for name, index in (("bos_token", backend.bos), ("eos_token", backend.eos)):
            if index >= 0:
                named.setdefault(name, backend.token_of(index))
    else:
        raise NibbleError(
            f"{folder}: no tokenizer: neither tokenizer.json nor tokenizer.model is there.\n"
            "It comes with the checkpoint: copy it from there (hf download <id> --include 'token*')."
        )

    generation = _read_json(folder / "generation_config.json")
    eos: list[int] = []
    for source in (generation, text, model_config):
        value = source.get("eos_token_id")
        eos += value if isinstance(value, list) else [] if value is None else [value]
    return Tokenizer(
        backend,
        where=str(folder),
        special_tokens=named,
        generation_eos=eos,
        vocab_size=text.get("vocab_size") if vocab_size is None else vocab_size,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NibbleError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise NibbleError(f"{path}: expected a JSON object")
    return value


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    named = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):  # an AddedToken written out
            value = value.get("content")
        if isinstance(value, str):
            named[name] = value
    return named


def _added_tokens(config: dict[str, Any]) -> dict[int, AddedTokenEntry]:
    decoder = config.get("added_tokens_decoder")
    if not isinstance(decoder, dict):
        return {}
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return {
        int(index): AddedTokenEntry(entry["content"], **{flag: bool(entry.get(flag, False)) for flag in flags})
        for index, entry in sorted(decoder.items(), key=lambda item: int(item[0]))
    }


def _load_tokenizers(path: Path, added: dict[int, AddedTokenEntry]) -> _Tokenizers:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise NibbleError(
            f"{path}: the tokenizers library can't read it: {error}\n"
            "The file may be cut off (fetch it again) or newer than the library (pip install -U tokenizers)."
        ) from error
    # Tokens that only tokenizer_config.json names; transformers adds them too.
    for index, entry in added.items():
        if tokenizer.token_to_id(entry.content) is not None:
            continue
        token = tokenizers.AddedToken(
            entry.content,
            lstrip=entry.lstrip,
            rstrip=entry.rstrip,
            single_word=entry.single_word,
            normalized=entry.normalized,
            special=entry.special,
        )
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(entry.content) != index:
            raise NibbleError(
                f"{path.parent}: tokenizer_config.json gives {entry.content!r} the id {index}, but in tokenizer.json "
                f"its place would be {tokenizer.token_to_id(entry.content)}. Fetch both files again."
            )
    return _Tokenizers(tokenizer)


class _Tokenizers:
    def __init__(self, tokenizer: Any):
        # Truncation or padding saved in the file would cut or fill training rows without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # The post-processor adds special tokens, which the template writes here, and may trim white space off the
        # offsets, which would leave tokens that cover nothing. What it would put before a document is kept.
        with_special, plain = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
        self.prefix = tuple(_before(with_special.ids, plain.ids))
        tokenizer.post_processor = None
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        self.special_ids = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token_of(self, index: int) -> str:
        return self._tokenizer.id_to_token(index) or ""

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        batch = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [Encoded(one.ids, one.offsets) for one in batch]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)


def _before(whole: list[int], part: list[int]) -> list[int]:
    """What comes before the first occurrence of `part` in `whole`."""
    for start in range(len(whole) - len(part) + 1):
        if whole[start : start + len(part)] == part:
            return whole[:start]
    return []


class _SentencePiece:
    """sentencepiece with the same interface.

    The library doesn't look for special tokens in a text, so the text is split at them first. The space that
    a model puts before a text is put before the first piece only, not after each special token
    (transformers' `legacy=False`).
    """

    def __init__(self, path: Path, added: dict[int, AddedTokenEntry], bos_token: str | None):
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2, sentencepiece_pb2

        proto = sentencepiece_model_pb2.ModelProto()
        try:
            proto.ParseFromString(path.read_bytes())
            self._first = SentencePieceProcessor(model_proto=proto.SerializeToString())
            proto.normalizer_spec.add_dummy_prefix = False
            self._inner = SentencePieceProcessor(model_proto=proto.SerializeToString())
        except Exception as error:  # protobuf's DecodeError or the library's RuntimeError
            raise NibbleError(f"{path}: sentencepiece can't read it: {error}. Fetch the file again.") from error
        self._result = sentencepiece_pb2.SentencePieceText
        pieces = self._first.get_piece_size()
        control = {i: self._first.id_to_piece(i) for i in range(pieces) if self._first.is_control(i)}
        self._by_id = {**control, **{i: entry.content for i, entry in added.items()}}
        self._by_token = {token: i for i, token in self._by_id.items()}
        self._split = re.compile(
            "|".join(re.escape(t) for t in sorted(self._by_token, key=len, reverse=True)) or "(?!)"
        )
        self.size = max([pieces - 1, *self._by_id]) + 1
        self.special_ids = frozenset([*control, *(i for i, entry in added.items() if entry.special)])
        self.bos: int = self._first.bos_id()
        self.eos: int = self._first.eos_id()
        prefix = None if bos_token is None else self.id_of(bos_token)
        self.prefix: tuple[int, ...] = () if prefix is None else (prefix,)

    def id_of(self, token: str) -> int | None:
        if token in self._by_token:
            return self._by_token[token]
        index = self._first.piece_to_id(token)
        return index if self._first.id_to_piece(index) == token else None

    def token_of(self, index: int) -> str:
        return self._by_id[index] if index in self._by_id else self._first.id_to_piece(index)

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> Encoded:
        result = Encoded([], [])
        position = 0
        for match in self._split.finditer(text):
            self._encode_plain(text, position, match.start(), result)
            result.ids.append(self._by_token[match.group()])
            result.offsets.append(match.span())
            position = match.end()
        self._encode_plain(text, position, len(text), result)
        return result

    def _encode_plain(self, text: str, start: int, end: int, result: Encoded) -> None:
        if start == end:
            return
        segment = text[start:end]
        found = self._result()
        found.ParseFromString((self._inner if start else self._first).encode(segment, out_type="serialized_proto"))
        # The library counts bytes. Pieces that cover nothing (the space put in front, all but the last byte of a
        # character spelt in bytes) get the range of the piece that follows them.
        chars = list(range(len(segment) + 1))
        if not segment.isascii():
            chars = [i for i, char in enumerate(segment) for _ in char.encode()] + [len(segment)]
        offsets: list[tuple[int, int]] = []
        following = len(segment)
        for piece in reversed(found.pieces):
            begin, stop = chars[piece.begin], chars[piece.end]
            if begin == stop and offsets:
                stop = following
            offsets.append((start + begin, start + stop))
            following = stop
        result.ids.extend(piece.id for piece in found.pieces)
        result.offsets.extend(reversed(offsets))

    def decode(self, ids: list[int], skip_special: bool) -> str:
        cuts = [-1, *(i for i, index in enumerate(ids) if index in self._by_id), len(ids)]
        text = ""
        for before, after in pairwise(cuts):
            part = ids[before + 1 : after]
            text += (self._inner if before >= 0 else self._first).decode(part) if part else ""
            if after < len(ids) and not (skip_special and ids[after] in self.special_ids):
                text += self._by_id[ids[after]]
        return text
