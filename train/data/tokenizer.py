"""Text to tokens and back, from the tokenizer files of a checkpoint folder.

`tokenizer.json` is read by the tokenizers library; a folder that has only `tokenizer.model` is read by
sentencepiece. Either way special tokens written in the text (`<|user|>`, `</s>`) become their own ids, no
BOS or EOS is added, and every token knows the characters it covers: labels are made from those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from models.blocks.configjson import text_section
from quant.common.errors import NibbleError
from quant.common.jsonfile import LARGEST, flag, integer, mapping, read_json, text
from quant.common.words import shown
from train.data.token_backends import AddedTokenEntry, Backend, Encoded, SentencePiece, load_tokenizers

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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
                f"{self.where}: {name} is {shown(token)}, which the tokenizer doesn't know. "
                "tokenizer_config.json and the tokenizer don't belong together."
            )
        return index

    def _check(self, ids: Iterable[int]) -> None:
        worst = max(ids, default=-1)
        if worst >= self.vocab_size:
            raise NibbleError(
                f"{self.where}: the tokenizer gives id {worst} ({shown(self._backend.token_of(worst))}), but the "
                f"model's vocabulary has {self.vocab_size} rows.\n"
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
    Raises NibbleError when the folder has no tokenizer, files that contradict each other, or values of a wrong type.
    """
    folder = Path(folder)
    named = {**_named_tokens(folder / "special_tokens_map.json"), **_named_tokens(folder / "tokenizer_config.json")}
    special_tokens = {name: token for name, token in named.items() if token is not None}
    added = _added_tokens(folder / "tokenizer_config.json")

    backend: Backend
    if (folder / "tokenizer.json").is_file():
        backend = load_tokenizers(folder / "tokenizer.json", added)
    elif (folder / "tokenizer.model").is_file():
        added = {**_older_added_tokens(folder / "added_tokens.json"), **added}
        bos = special_tokens.get("bos_token", "<s>") if _adds_bos(folder / "tokenizer_config.json") else None
        model = SentencePiece(folder / "tokenizer.model", added, bos)
        for name, index in (("bos_token", model.bos), ("eos_token", model.eos)):
            if index >= 0:
                special_tokens.setdefault(name, model.token_of(index))
        backend = model
    else:
        raise NibbleError(
            f"{folder}: no tokenizer: neither tokenizer.json nor tokenizer.model is there.\n"
            "It comes with the checkpoint: copy it from there (hf download <id> --include 'token*')."
        )

    config = _read(folder / "config.json")
    where = str(folder / "config.json")
    section = text_section(config, where)
    if vocab_size is None and section.get("vocab_size") is not None:
        vocab_size = integer(section, "vocab_size", 1, where)
    return Tokenizer(
        backend,
        where=str(folder),
        special_tokens=special_tokens,
        generation_eos=[
            *_eos_ids(_read(folder / "generation_config.json"), str(folder / "generation_config.json")),
            *_eos_ids(section, where),
            *_eos_ids(config, where),
        ],
        vocab_size=vocab_size,
    )


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, dict) if path.is_file() else {}


def _named_tokens(path: Path) -> dict[str, str | None]:
    config = _read(path)
    named: dict[str, str | None] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):  # an AddedToken written out
            named[name] = text({"content": None, **value}, "content", "absent", f"{path}: {name}")
        elif name in config:
            named[name] = None if value is None else text(config, name, "absent", str(path))
    return named


def _adds_bos(path: Path) -> bool:
    config = _read(path)
    return config.get("add_bos_token", True) is not None and flag(config, "add_bos_token", True, str(path))


def _eos_ids(config: dict[str, Any], where: str) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < LARGEST for i in ids):
        raise NibbleError(f"{where}: eos_token_id must be the id of a token or a list of ids, got {shown(value)}.")
    return ids


def _added_tokens(path: Path) -> dict[int, AddedTokenEntry]:
    """Of added_tokens_decoder, {"151643": {"content": "<|endoftext|>", "special": true}}, by id."""
    where = f"{path}: added_tokens_decoder"
    decoder = mapping(_read(path), "added_tokens_decoder", str(path))
    found: dict[int, AddedTokenEntry] = {}
    for index in decoder:
        if not (index.isascii() and index.isdecimal() and len(index) < 10):
            raise NibbleError(f"{where}: {shown(index)} is not the id of a token.")
        if int(index) in found:
            raise NibbleError(f"{where} has two tokens with the id {int(index)}.")
        entry = mapping(decoder, index, where)
        flags = {name: flag(entry, name, False, f"{where}: {index}") for name in AddedTokenEntry._fields[1:]}
        found[int(index)] = AddedTokenEntry(
            text({"content": None, **entry}, "content", "absent", f"{where}: {index}"), **flags
        )
    return dict(sorted(found.items()))


def _older_added_tokens(path: Path) -> dict[int, AddedTokenEntry]:
    """Of added_tokens.json, {"<|endoftext|>": 151643}, by id."""
    config = _read(path)
    found: dict[int, AddedTokenEntry] = {}
    for token in config:
        index = integer(config, token, 0, str(path), least=0)
        if index in found:
            raise NibbleError(f"{path}: {shown(found[index].content)} and {shown(token)} have the same id {index}.")
        found[index] = AddedTokenEntry(token, special=False)
    return found
