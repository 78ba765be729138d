"""README.md of what a run made: a model card, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from models.adapters.lora import adapted
from models.adapters.servers import TITLES, short_name, unserved
from models.checkpoint.hub_id import looks_like_hub_id
from models.checkpoint.keymap import key_map_of
from models.decoder import CausalLM
from models.hub_contents import README
from quant.common.files import disk_errors, write_atomically
from quant.common.words import printable
from train.config.load import Config
from train.config.sections import AdapterConfig, WeightedFile

_SIGNATURE = re.compile(r"<!-- nibble's model card, sha256 ([0-9a-f]{64})\. Changed, it is kept as it is\. -->\n")


@dataclass(frozen=True)
class Trained:
    """step: of the result. total: of the run. losses: held out, (when, nats per labelled token). vision_language: the
    class whose names the result has. unserved: a sentence for what a server makes of an adapter, where it isn't all.
    extension: of an extended run, what happened to the learning rate.
    """

    base: str
    step: int
    total: int
    losses: Sequence[tuple[str, float]] = ()
    vision_language: bool = False
    unserved: Sequence[str] = ()
    extension: str | None = None


def model_card(config: Config, trained: Trained) -> str:
    """The card of what a run of `config` made, an adapter or a checkpoint: Markdown, without its signature."""
    lora, is_id, base = config.adapter.kind == "lora", looks_like_hub_id(trained.base), Path(trained.base)
    # A run's checkpoint is in a folder `model` of the run's own.
    name = _code(f"{base.parent.name}/{base.name}" if base.name == "model" else base.name)
    title = base.name if is_id else name
    known = f"[{trained.base}](https://huggingface.co/{trained.base})" if is_id else name
    lines = [
        "---",
        *([f"base_model: {json.dumps(trained.base)}"] if is_id else []),
        f"library_name: {'peft' if lora else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags:",
        *(["- lora"] if lora else []),
        *(["- qlora"] if config.model.storage in ("nf4", "fp4") else []),
        "- mixture-of-experts",
        "- nibble",
        "---",
        "",
        f"# LoRA adapter of {title}" if lora else f"# {title}, fully fine-tuned",
        "",
        f"Base model: {known}. Step {trained.step:,} of {trained.total:,}, trained with nibble.",
        "",
    ]
    if trained.losses:
        lines += ["| held-out loss, nats per labelled token | |", "|---|---|"]
        lines += [*(f"| {when} | {loss:.4f} |" for when, loss in trained.losses), ""]
    lines += ["## Training", "", "| | |", "|---|---|"]
    settings = [*_settings(config), *([("learning rate, then", trained.extension)] if trained.extension else [])]
    lines += [*(f"| {what} | {value} |" for what, value in settings), ""]
    return "\n".join([*lines, *(_use_of_adapter(trained, is_id) if lora else _use_of_checkpoint(trained))]) + "\n"


def _settings(config: Config) -> list[tuple[str, str]]:
    model, adapter, data, train = config.model, config.adapter, config.data, config.train
    stored = f"{model.storage}{', double quantisation' if model.double_quant else ''}"
    batch = f"{train.micro_batch_size * train.gradient_accumulation} sequences of {data.sequence_length:,} tokens"
    held_out = _files(data.eval) if data.eval is not None else f"{data.eval_fraction or 0:.0%} of the training rows"
    return [
        ("training rows", f"{_files(data.train)} ({data.format})"),
        ("held-out rows", held_out),
        *(_adapter_settings(adapter) if adapter.kind == "lora" else [("adapted", "nothing: all weights are trained")]),
        ("base weights in training", f"{stored}; the rest {model.dtype}" if adapter.kind == "lora" else model.dtype),
        ("optimiser", f"{train.optimizer}, weight decay {train.weight_decay:g}"),
        ("learning rate", f"{train.learning_rate:g}, {train.schedule}, warm-up {train.warmup_ratio:.0%} of the steps"),
        ("batch", batch + (", packed" if data.packing else "")),
        ("seed", str(train.seed)),
        ("versions", f"nibble {version('nibble')}, torch {torch.__version__.partition('+')[0]}"),
    ]


def _adapter_settings(adapter: AdapterConfig) -> list[tuple[str, str]]:
    return [
        *([("started from", _code(Path(adapter.init_from).name))] if adapter.init_from is not None else []),
        ("adapted", ", ".join(map(_code, adapter.targets))),
        ("layers", "all" if adapter.layers is None else ", ".join(map(str, adapter.layers))),
        ("rank", _per_group(adapter.rank)),
        ("alpha", _per_group(adapter.alpha) + (" (rsLoRA)" if adapter.rslora else "")),
    ]


def _loader(trained: Trained) -> str:
    return "AutoModelForImageTextToText" if trained.vision_language else "AutoModelForCausalLM"


def _use_of_checkpoint(trained: Trained) -> list[str]:
    loader = _loader(trained)
    return [
        *("## Use", "", "`MODEL` is this folder, a checkpoint in the hub's format.", ""),
        *("With transformers 5, or any server that reads the base:", "", "```python"),
        f"from transformers import {loader}",
        "",
        f'model = {loader}.from_pretrained("MODEL")',
        *("```", "", "With nibble:", "", "```"),
        "python -m train.generate MODEL",
        "python -m models.convert MODEL OUT --storage nf4",
        "```",
    ]


def _use_of_adapter(trained: Trained, is_id: bool) -> list[str]:
    given, loader = trained.base if is_id else "BASE", _loader(trained)
    lines = ["## Use", ""]
    if not is_id:
        lines += ["`BASE` is the folder of the base model, ADAPTER this one.", ""]
    else:
        lines += ["`ADAPTER` is this folder.", ""]
    lines += [
        "With transformers 5 and PEFT 0.19.1 or newer:",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {loader}",
        "",
        f'model = PeftModel.from_pretrained({loader}.from_pretrained({json.dumps(given)}), "ADAPTER")',
        "```",
        "",
        "With nibble, whose commands these are:",
        "",
        "```",
        f"python -m train.generate {given} --adapter ADAPTER",
        "```",
        "",
        "For vLLM, SGLang or llama.cpp, written as the server reads it, or merged into the base:",
        "",
        "```",
        "python -m models.export ADAPTER OUT --for vllm        # or sglang, llamacpp",
        f"python -m models.merge {given} ADAPTER OUT",
        "```",
    ]
    if trained.unserved:
        lines += ["", *(f"- {sentence}" for sentence in trained.unserved)]
    return lines


def unserved_of(model: CausalLM) -> list[str]:
    """A sentence for each rule of models/adapters/servers.py that the adapter of `model` breaks."""
    keys = [key for key, _ in adapted(model, key_map_of(model))]
    sentences = []
    for server, title in TITLES.items():
        for rule, broken in unserved(server, model.model_type, keys):
            names = ", ".join(f"`{name}`" for name in dict.fromkeys(map(short_name, broken)))
            ways = "Merge the adapter for it" + (f", or {rule.way}" if rule.way else "")
            sentences.append(f"{title} {rule.does} {names}: {rule.why}. {ways}.")
    return sentences


def _files(value: Any) -> str:
    """The names of row files, without their folders."""
    entries = value if isinstance(value, tuple) else (value,)
    return ", ".join(
        f"{_code(Path(entry.path).name)} × {entry.weight:g}"
        if isinstance(entry, WeightedFile)
        else _code(Path(entry).name)
        for entry in entries
    )


def _per_group(value: Any) -> str:
    return ", ".join(f"{group} {n:g}" for group, n in value.items()) if isinstance(value, dict) else f"{value:g}"


def _code(text: str) -> str:
    """A name as Markdown shows it, inside a table too."""
    return (
        f"`{printable(text, 120)}`".replace("|", "\\|") if "`" not in text else printable(text, 120).replace("|", "\\|")
    )


def write_card(folder: Path, text: str, report: Callable[[str], None], before: Path | None = None) -> None:
    """Write README.md, unless there is one that somebody else wrote or changed: that stays, and `report` says so.

    before: the folder whose place `folder` will take.
    """
    earlier = (before or folder) / README
    with disk_errors(folder / README):
        if earlier.exists() and not _is_ours(earlier):
            report(f"{earlier} was not written here, or was changed: it stays, and no model card is written")
            if before is not None:
                shutil.copyfile(earlier, folder / README)
            return
        signature = f"\n<!-- nibble's model card, sha256 {_digest(text)}. Changed, it is kept as it is. -->\n"
        write_atomically(folder / README, (text + signature).encode())


def _is_ours(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    found = list(_SIGNATURE.finditer(text))
    return bool(found) and found[-1].end() == len(text) and _digest(text[: found[-1].start() - 1]) == found[-1][1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
