"""What servers do with LoRA on some matrices: compute without it, or refuse it. The one table of that.

Found by trial (docs/serving.md has versions and figures), but for SGLang, of which the source was read. What isn't in
the table has its effect, or was not tried.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from models.adapters.targets import adaptable, matches, module_name, within_layer
from models.blocks.groups import TARGET_GROUPS
from models.checkpoint.keymap import Key, KeyMap
from quant.common.errors import NibbleError
from quant.common.words import some

Server = Literal["peft", "vllm", "sglang", "llamacpp"]
TITLES: dict[Server, str] = {"peft": "PEFT", "vllm": "vLLM", "sglang": "SGLang", "llamacpp": "llama.cpp"}

_LATENT = ("glm4_moe_lite", "glm_moe_dsa")
_QWEN3_5 = ("qwen3_5_moe", "qwen3_5_moe_text")
_WITHOUT = "computes without LoRA on"
_ABSORBED = "its latent attention multiplies that matrix into others when it loads the model"
_KEPT = "its experts keep using the matrix that was there before LoRA"


@dataclass(frozen=True)
class Rule:
    """What `server` does with LoRA on `names` (within a layer) of these architectures.

    why: the clause that ends the sentence. way: a way out that only this case has, as an imperative; or "".
    """

    server: Server
    model_types: tuple[str, ...]
    names: tuple[str, ...]
    does: str
    why: str
    way: str = ""


_DISABLE_MLA = "start vLLM with VLLM_MLA_DISABLE=1 and export with --keep kv_b_proj"
RULES = (
    Rule("vllm", _LATENT, ("self_attn.kv_b_proj",), _WITHOUT, _ABSORBED, _DISABLE_MLA),
    # GLM-5's router by the source alone.
    Rule("vllm", ("glm_moe_dsa", "qwen3_moe", *_QWEN3_5), ("mlp.gate",), _WITHOUT, _KEPT),
    Rule("vllm", _QWEN3_5, ("mlp.shared_expert_gate",), _WITHOUT, _KEPT),
    Rule("sglang", _LATENT, ("self_attn.kv_b_proj",), _WITHOUT, _ABSORBED),
    Rule(
        "llamacpp",
        _LATENT,
        ("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa"),
        _WITHOUT,
        "its latent attention never applies it",
    ),
    Rule(
        "llamacpp",
        _LATENT,
        ("self_attn.kv_b_proj",),
        "can't convert LoRA on",
        "it cuts that matrix in two and turns one half over",
    ),
)


def matrix_name(key: Key) -> str:
    """The name of a matrix within its layer, in the hub's spelling: self_attn.kv_b_proj."""
    return within_layer(module_name(key.hub))


def short_name(key: Key) -> str:
    """Its last part, kv_b_proj; of a router `mlp.gate`, since `gate` alone says nothing."""
    return matrix_name(key) if key.group == "router" else matrix_name(key).rpartition(".")[2]


def unserved(server: Server, model_type: str, keys: Sequence[Key]) -> list[tuple[Rule, list[Key]]]:
    """The rules of `server` that `keys`, matrices with LoRA, break, and which of them do."""
    rules = [rule for rule in RULES if rule.server == server and model_type in rule.model_types]
    found = [(rule, [key for key in keys if matrix_name(key) in rule.names]) for rule in rules]
    return [(rule, broken) for rule, broken in found if broken]


def serving_note(model_type: str, keys: Sequence[Key]) -> str | None:
    """One line on the servers for which LoRA on `keys` is wasted; None where there are none."""
    clauses = []
    for server in ("vllm", "llamacpp"):
        names = [short_name(key) for _, broken in unserved(server, model_type, keys) for key in broken]
        if names:
            clauses.append(f"{TITLES[server]} can't serve LoRA on {', '.join(dict.fromkeys(names))}")
    if not clauses:
        return None
    return f"{'; '.join(clauses)}. Merge before serving there, or set adapter.serve_with (docs/serving.md)."


def served_targets(targets: Collection[str], server: Server, key_map: KeyMap, model_type: str) -> tuple[str, ...]:
    """`targets`, groups and names, without those matrices of groups that `server` can't serve.

    Raises NibbleError where a name that isn't a group's means such a matrix, and where nothing is left.
    """
    keys, setting = adaptable(key_map), f"adapter.serve_with: {server}"
    left: list[str] = []
    for target in targets:
        found = matches(target, keys)
        lost = {key.native for _, broken in unserved(server, model_type, found) for key in broken}
        if not lost:
            left.append(target)
        elif target in TARGET_GROUPS:
            left += dict.fromkeys(matrix_name(key) for key in found if key.native not in lost)
        else:
            raise NibbleError(
                f"adapter.targets: {target!r} with {setting}: {TITLES[server]} can't serve LoRA on it.\n"
                "Leave it out of adapter.targets, or set adapter.serve_with: null."
            )
    if targets and not left:
        raise NibbleError(
            f"{setting} leaves nothing of adapter.targets ({some(list(targets))}): {TITLES[server]} can't serve LoRA "
            "on that.\nAdd other targets, or set adapter.serve_with: null."
        )
    return tuple(left)
