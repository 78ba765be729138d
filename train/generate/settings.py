"""How answers are generated: what the command was given, and for the rest the checkpoint's generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from models.generation.sampling import Sampling, check_setting
from quant.common.errors import NibbleError
from quant.common.jsonfile import LARGEST, flag, read_json
from quant.common.words import counted, shown, some
from train.data.tokenizer import Tokenizer

FILE = "generation_config.json"
LONGEST_ANSWER = 512  # tokens, where nothing says otherwise
SAMPLING = tuple(field.name for field in fields(Sampling))
_NAMES = (*SAMPLING, "max_new_tokens")
_OFF = {"top_k": 0, "top_p": 1, "min_p": 0}  # what switches a filter off
_NEUTRAL = {"repetition_penalty": 1}  # what needn't be said
# Settings of transformers that change which tokens are chosen and don't exist here, with their value for "off"; each
# is off, too, as null or an empty list.
_NOT_HERE: dict[str, Any] = {
    "assistant_early_exit": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}
_OF_DRAWING = ("epsilon_cutoff", "eta_cutoff", "top_h", "typical_p")


@dataclass(frozen=True)
class Settings:
    """max_length: of prompt and answer together, where the file has that instead of max_new_tokens. stop_ids,
    stop_texts: what ends an answer. seed: None draws anew every time. said: all of this in one line.
    """

    sampling: Sampling
    max_new_tokens: int
    max_length: int | None
    stop_ids: frozenset[int]
    stop_texts: tuple[str, ...]
    seed: int | None
    said: str


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read_settings(
    given: Mapping[str, Any],
    folder: Path,
    tokenizer: Tokenizer,
    *,
    stop_texts: Sequence[str] = (),
    seed: int | None = None,
) -> tuple[Settings, list[str]]:
    """The settings, and warnings.

    given: the options by the names of Sampling's fields and max_new_tokens; None where the file is to decide.
    Raises NibbleError naming the option, or the file and the key, for a value that can't be used.
    """
    path = folder / FILE
    file = read_json(path, dict) if path.is_file() else {}
    found = _from_file(file, str(path))
    sources = dict.fromkeys(found, f" ({FILE})")
    for name, value in given.items():
        if value is not None:
            _check(name, value, option(name))
            found[name], sources[name] = value, ""
    found = {name: value for name, value in found.items() if name not in _OFF or value != _OFF[name]}
    if found.setdefault("temperature", 0.0) == 0:
        for name in _OFF:
            if found.pop(name, None) is not None and given.get(name) is not None:
                raise NibbleError(
                    f"{option(name)} is about what is drawn, and at temperature 0 nothing is: the most likely token is "
                    f"taken.\nAdd --temperature 1, or leave {option(name)} out."
                )
    if seed is not None and not 0 <= seed < 2**63:
        raise NibbleError(f"--seed must be from 0 to 2⁶³ - 1, got {shown(seed)}.")
    if "" in stop_texts:
        raise NibbleError("--stop is empty: every answer would end before it begins.")
    max_length = None
    if "max_new_tokens" not in found and file.get("max_length") is not None:
        max_length = file["max_length"]
        max_length = min(max_length, LARGEST) if isinstance(max_length, int) else max_length
        _check("max_new_tokens", max_length, f"{path}: max_length")
        found["max_new_tokens"] = max_length
    longest = found.setdefault("max_new_tokens", LONGEST_ANSWER)
    ends = [tokenizer.token(index) for index in sorted(tokenizer.eos_ids)] + [shown(text) for text in stop_texts]
    parts = [
        *(
            f"at most {counted(max_length, 'token')} with the prompt ({FILE})"
            if name == "max_new_tokens" and max_length is not None
            else _in_words(name, found[name]) + sources.get(name, "")
            for name in _NAMES
            if name in found and found[name] != _NEUTRAL.get(name)
        ),
        f"stops at {some(ends, 8)}" if ends else "no stop token is known",
    ]
    warnings = [
        f"{path}: {name} is {shown(file[name])}, which isn't computed here: answers differ from transformers'"
        for name, off in _NOT_HERE.items()
        if file.get(name) not in (None, off, [], {}) and not (found["temperature"] == 0 and name in _OF_DRAWING)
    ]
    sampling = Sampling(**{name: value for name, value in found.items() if name in SAMPLING})
    settings = Settings(sampling, longest, max_length, tokenizer.eos_ids, tuple(stop_texts), seed, ", ".join(parts))
    return settings, warnings


def _check(name: str, value: Any, label: str) -> None:
    if name == "max_new_tokens":
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
            raise NibbleError(f"{label} must be an integer from 1 to {LARGEST:,}, got {shown(value)}.")
    elif name not in _OFF or value != _OFF[name]:
        check_setting(name, value, label)


def _from_file(file: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What generation_config.json says. Without do_sample, a temperature in it means sampling."""
    found = {name: file[name] for name in _NAMES if file.get(name) is not None}
    for name, value in found.items():
        _check(name, value, f"{where}: {name}")
    if file.get("do_sample") is None:
        return found
    if not flag(file, "do_sample", False, where):
        return {**found, "temperature": 0.0}
    return {"temperature": 1.0, **found}  # transformers' own value


def _in_words(name: str, value: float) -> str:
    if name == "max_new_tokens":
        return f"at most {counted(value, 'new token')}"
    return "greedy" if name == "temperature" and value == 0 else f"{name.replace('_', '-')} {value:g}"
