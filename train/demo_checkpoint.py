"""The checkpoint that the demo starts from: a small one of GLM-4.7-Flash's architecture, in the format of the hub.

Per-expert tensors in several safetensors shards with their index, config.json, tokenizer, chat template. The weights
are random; nothing here depends on anything but the seed and, for the tokenizer, the texts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>"),
)
VOCABULARY = 512
# Written as in the hub's 4.x files: rope_theta at the top level, first_k_dense_replace.
CONFIG: dict[str, Any] = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "float32",
    "eos_token_id": [0, 7, 9],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    # Wider than the 0.02 of large models: the matrices here are narrow, and the base has a minute to learn.
    "initializer_range": 0.09,
    "intermediate_size": 256,
    "kv_lora_rank": 64,
    "max_position_embeddings": 1024,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 32,
    "vocab_size": VOCABULARY,
}
# In the manner of GLM's own: a turn ends where the next begins, and reasoning is kept behind the last question only.
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
        "model_max_length": CONFIG["max_position_embeddings"],
    }
    write_if_changed(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_if_changed(folder / "tokenizer_config.json", _json(described))
    write_if_changed(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())


def write_checkpoint(folder: Path, seed: int) -> None:
    """Random weights under the hub's keys: per-expert matrices, sharded safetensors and their index, config.json."""
    import torch
    from safetensors.torch import save

    from models.registry import architecture_for

    architecture = architecture_for(CONFIG, str(folder))
    keys = architecture.key_map(architecture.parse_config(CONFIG, str(folder))).keys
    shapes: dict[str, tuple[int, ...]] = {}
    for key in keys:
        # A stack of experts [E, out, in] is one matrix [out / parts, in] for each expert and part.
        shape = (key.shape[1] // len(key.parts), key.shape[2]) if key.parts else key.shape
        shapes |= dict.fromkeys(key.hub_keys(), shape)
    shapes |= _prediction_layer(shapes)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.zeros(shape)
        elif len(shape) == 1:
            tensors[name] = torch.ones(shape)  # norms
        else:
            tensors[name] = torch.randn(shape, generator=generator) * CONFIG["initializer_range"]
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
    write_if_changed(
        folder / "generation_config.json", _json({"eos_token_id": CONFIG["eos_token_id"], "pad_token_id": 0})
    )
    write_if_changed(folder / "config.json", _json(CONFIG))


def _prediction_layer(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The layer for multi-token prediction that the hub's files have behind the last one; nothing computes it."""
    hidden, last = CONFIG["hidden_size"], CONFIG["num_hidden_layers"] - 1
    before, extra = f"model.layers.{last}.", f"model.layers.{last + 1}."
    layer = {name.replace(before, extra): shape for name, shape in shapes.items() if name.startswith(before)}
    layer |= {f"{extra}{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "shared_head.norm")}
    return {**layer, f"{extra}eh_proj.weight": (hidden, 2 * hidden)}


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def write_if_changed(path: Path, data: bytes) -> None:
    """Write a file unless it has this content already, so that repeating a command touches nothing."""
    from models.tensorfile import write_atomically

    if path.is_file() and path.read_bytes() == data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
