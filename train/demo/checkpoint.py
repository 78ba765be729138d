"""The checkpoint that the demo starts from: a small one of any architecture, in the format of the hub.

Several safetensors shards with their index, config.json, tokenizer, chat template. The weights are random; nothing here
depends on anything but the architecture, the seed and, for the tokenizer, which is the same for all, the texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from train.demo.models import POSITIONS, VOCABULARY, demo_model

if TYPE_CHECKING:
    import torch

    from models.checkpoint.keymap import Key
    from models.decoder import CausalLM

SPECIAL_TOKENS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>"),
)
# In the manner of GLM's own: a turn ends where the next begins, and reasoning is kept after the last question only.
CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- set last = namespace(user=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- if message.reasoning_content and loop.index0 > last.user %}
            {{- '<think>' + message.reasoning_content.strip() }}
        {%- endif %}
        {{- '</think>' + message.content.strip() }}
    {%- elif message.role in ('system', 'user') %}
        {{- '<|' + message.role + '|>' + message.content }}
    {%- else %}
        {{- raise_exception('roles are system, user and assistant, not ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' + ('<think>' if enable_thinking is defined and enable_thinking else '</think>') }}
{%- endif %}
"""
SHARDS = 3


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE tokenizer learnt from `texts`, with GLM's special tokens and way of splitting text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytelevel])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = SPECIAL_TOKENS[0]
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": POSITIONS,
    }
    write_if_changed(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_if_changed(folder / "tokenizer_config.json", _json(described))
    write_if_changed(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())


def write_checkpoint(folder: Path, model_type: str, seed: int) -> None:
    """Random weights under the hub's keys, sharded safetensors and their index, config.json.

    Raises NibbleError for an architecture that the demo doesn't have.
    """
    from safetensors.torch import save

    demo = demo_model(model_type)
    tensors = _random_weights(folder, model_type, seed)
    names = list(tensors)
    per_shard = -(-len(names) // SHARDS)
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        held = {name: tensors[name] for name in names[shard * per_shard : (shard + 1) * per_shard]}
        write_if_changed(folder / file, save(held, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(held, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_if_changed(
        folder / "model.safetensors.index.json", _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    generation = {key: demo.config[key] for key in ("eos_token_id", "pad_token_id")}
    write_if_changed(folder / "generation_config.json", _json(generation))
    write_if_changed(folder / "config.json", _json(demo.config))


def _random_weights(folder: Path, model_type: str, seed: int) -> dict[str, torch.Tensor]:
    """The hub's tensors by name: those that the model computes with, then those that are carried."""
    import torch

    from models.checkpoint.keymap import key_map_of
    from models.registry import architecture_for
    from quant.storage import StorageSpec

    demo = demo_model(model_type)
    architecture = architecture_for(demo.config, str(folder))
    config = architecture.parse_config(demo.config, str(folder))
    model = architecture.build(config, StorageSpec("none"), torch.float32, "meta")
    spread = demo.config.get("text_config", demo.config)["initializer_range"]
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key in key_map_of(model).keys:
        value = initial_value(model, key, spread, generator)
        # A stack of experts [E, out, in] is one matrix [out / parts, in] for each expert and part.
        split = [block for expert in value for block in expert.chunk(len(key.parts))] if key.parts else [value]
        separate = dict(zip(key.part_keys(), split, strict=True))
        shapes |= {name: tuple(tensor.shape) for name, tensor in separate.items()}
        tensors |= {key.hub: value} if key.fused else separate
    for name, shape in demo.carried(shapes).items():
        tensors[name] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * spread
    return tensors


def initial_value(model: CausalLM, key: Key, spread: float, generator: torch.Generator) -> torch.Tensor:
    """What training from scratch starts with: norms pass on, biases add nothing, matrices have deviation `spread`.

    A convolution keeps the size of its input. A DeltaNet head decays by exp(-A·dt) per token, with A from 1 to 16 and
    dt from 0.001 to 0.1 as in Mamba-2 (arXiv:2405.21060), so that some heads remember a whole document.
    """
    import torch

    from models.blocks.norm import ZeroCentredRMSNorm

    owner, _, leaf = key.native.rpartition(".")
    if leaf == "A_log":
        return torch.empty(key.shape).uniform_(1, 16, generator=generator).log()
    if leaf == "dt_bias":
        step = 10 ** torch.empty(key.shape).uniform_(-3, -1, generator=generator)
        return step.expm1().log()  # softplus makes it dt again
    if len(key.shape) == 1:
        zero = leaf.endswith("bias") or isinstance(model.get_submodule(owner), ZeroCentredRMSNorm)
        return torch.zeros(key.shape) if zero else torch.ones(key.shape)
    deviation: float = key.shape[-1] ** -0.5 if owner.endswith("conv1d") else spread
    return torch.randn(key.shape, generator=generator) * deviation


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_if_changed(path: Path, data: bytes) -> None:
    """Write a file unless it has this content already, so that repeating a command touches nothing."""
    from quant.common.files import write_atomically

    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
