"""The libraries that tokenise: tokenizers, which reads tokenizer.json, and sentencepiece, for tokenizer.model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from quant.common.errors import NibbleError
from quant.common.jsonfile import LARGEST
from quant.common.words import printable, shown


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


@contextmanager
def _failures(path: Path, library: str, what: str) -> Iterator[None]:
    """Around calls of a library whose errors have no type of their own; Rust's panics aren't even of Exception."""
    try:
        yield
    except (NibbleError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = printable(str(error).strip() or type(error).__name__, 300)
        raise NibbleError(
            f"{path}: the {library} library can't {what}: {reason}\n"
            f"The file may be cut off (fetch it again) or newer than the library (pip install -U {library})."
        ) from error


def load_tokenizers(path: Path, added: dict[int, AddedTokenEntry]) -> Backend:
    """The tokenizer of a tokenizer.json. Raises NibbleError naming the file."""
    import tokenizers

    with _failures(path, "tokenizers", "read it"):
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # Tokens that only tokenizer_config.json names; transformers adds them too.
    for index, entry in added.items():
        with _failures(path, "tokenizers", "use it"):
            if tokenizer.token_to_id(entry.content) is None:
                token = tokenizers.AddedToken(
                    entry.content,
                    lstrip=entry.lstrip,
                    rstrip=entry.rstrip,
                    single_word=entry.single_word,
                    normalized=entry.normalized,
                    special=entry.special,
                )
                tokenizer.add_tokens([token])
                place = tokenizer.token_to_id(entry.content)
                if place != index:
                    raise NibbleError(
                        f"{path.parent}: tokenizer_config.json gives {shown(entry.content)} the id {index}, but in "
                        f"tokenizer.json its place would be {place}. Fetch both files again."
                    )
    with _failures(path, "tokenizers", "use it"):
        return _Tokenizers(tokenizer, path)


class _Tokenizers:
    def __init__(self, tokenizer: Any, path: Path):
        self._tokenizer, self._path = tokenizer, path
        # Truncation or padding saved in the file would cut or fill training rows without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # The post-processor adds special tokens, which the template writes here, and may trim white space off the
        # offsets, which would leave tokens that cover nothing. What it would put before a document is kept.
        with_special, plain = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
        self.prefix = tuple(_before(with_special.ids, plain.ids))
        tokenizer.post_processor = None
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        if self.size > LARGEST:
            raise NibbleError(f"{path}: a token has the id {self.size - 1:,}; ids end at {LARGEST:,}.")
        self.special_ids = frozenset(i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token_of(self, index: int) -> str:
        return self._tokenizer.id_to_token(index) or ""

    def encode_batch(self, texts: list[str]) -> list[Encoded]:
        with _failures(self._path, "tokenizers", "use it"):
            batch = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [Encoded(one.ids, one.offsets) for one in batch]

    def decode(self, ids: list[int], skip_special: bool) -> str:
        with _failures(self._path, "tokenizers", "use it"):
            return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special))


def _before(whole: list[int], part: list[int]) -> list[int]:
    """What comes before the first occurrence of `part` in `whole`."""
    for start in range(len(whole) - len(part) + 1):
        if whole[start : start + len(part)] == part:
            return whole[:start]
    return []


class SentencePiece:
    """sentencepiece with the same interface.

    The library doesn't look for special tokens in a text, so the text is split at them first. The space that
    a model puts before a text is put before the first piece only, not after each special token
    (transformers' `legacy=False`).
    """

    def __init__(self, path: Path, added: dict[int, AddedTokenEntry], bos_token: str | None):
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2, sentencepiece_pb2

        proto = sentencepiece_model_pb2.ModelProto()
        self._path = path
        with _failures(path, "sentencepiece", "read it"):
            proto.ParseFromString(path.read_bytes())
            self._first = SentencePieceProcessor(model_proto=proto.SerializeToString())
            proto.normalizer_spec.add_dummy_prefix = False
            self._inner = SentencePieceProcessor(model_proto=proto.SerializeToString())
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
        with _failures(self._path, "sentencepiece", "use it"):
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
