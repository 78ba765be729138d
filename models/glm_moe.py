"""What GLM-4.5 to GLM-5 share: the feed-forward half of their layers, and most of config.json. Attention differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.blocks.configjson import MAX_LAYERS, refuse_unread
from models.blocks.factory import Factory
from models.blocks.mlp import SwiGLU
from models.blocks.router import RoutingRule
from models.decoder import HubForm, prediction_layers
from models.experts.moe import SharedExpertsMoE
from quant.common.errors import NibbleError
from quant.common.jsonfile import LARGEST, flag, integer, number
from quant.common.words import shown


@dataclass(frozen=True)
class GlmConfig:
    vocabulary: int
    hidden: int
    predicting_layers: int  # after the last layer in the checkpoint, for multi-token prediction; not computed here
    eps: float
    tied: bool
    dense: tuple[bool, ...]  # per layer: a dense MLP instead of experts
    dense_width: int
    expert_width: int
    experts: int
    shared_experts: int
    routing: RoutingRule

    @staticmethod
    def common(config: dict[str, Any], where: str, defaults: dict[str, Any]) -> GlmConfig:
        """What all of GLM's files have, from config.json of either generation (transformers 4 or 5).

        defaults: the architecture's values for absent keys, by their names in the file.
        """
        refuse_unread(config, where, scoring_func="sigmoid", topk_method="noaux_tc")

        def count(key: str, *, most: int = LARGEST) -> int:
            return integer(config, key, defaults[key], where, most=most)

        experts, layers = count("n_routed_experts"), count("num_hidden_layers", most=MAX_LAYERS)
        rule = RoutingRule(
            chosen=count("num_experts_per_tok"),
            groups=integer(config, "n_group", 1, where),
            chosen_groups=integer(config, "topk_group", 1, where),
            normalise=flag(config, "norm_topk_prob", True, where),
            scale=number(config, "routed_scaling_factor", defaults["routed_scaling_factor"], where),
        )
        _check_rule(rule, experts, where)
        return GlmConfig(
            vocabulary=count("vocab_size"),
            hidden=count("hidden_size"),
            predicting_layers=integer(config, "num_nextn_predict_layers", 1, where, least=0),
            eps=number(config, "rms_norm_eps", 1e-5, where),
            tied=flag(config, "tie_word_embeddings", False, where),
            dense=_dense_layers(config, layers, defaults["first_k_dense_replace"], where),
            dense_width=count("intermediate_size"),
            expert_width=count("moe_intermediate_size"),
            experts=experts,
            shared_experts=integer(config, "n_shared_experts", 1, where),
            routing=rule,
        )

    @property
    def layers(self) -> int:
        return len(self.dense)

    @property
    def hub(self) -> HubForm:
        return HubForm(carried=prediction_layers(self.layers, self.predicting_layers))


def _dense_layers(config: dict[str, Any], layers: int, leading: int, where: str) -> tuple[bool, ...]:
    """5.x files name every layer's type, 4.x files count the leading dense ones.

    Types after the last layer (of prediction layers) don't count.
    """
    types = config.get("mlp_layer_types")
    if types is None:
        leading = integer(config, "first_k_dense_replace", leading, where, least=0)
        return tuple(index < leading for index in range(layers))
    if not isinstance(types, list) or not {"dense", "sparse"}.issuperset(map(str, types)):
        raise NibbleError(f"{where}: mlp_layer_types must be a list of 'dense' and 'sparse', got {shown(types)}.")
    if len(types) < layers:
        raise NibbleError(
            f"{where}: mlp_layer_types names {len(types)} layers, num_hidden_layers is {layers}; make them agree."
        )
    return tuple(kind == "dense" for kind in types[:layers])


def _check_rule(rule: RoutingRule, experts: int, where: str) -> None:
    if experts % rule.groups or (rule.groups > 1 and experts < 2 * rule.groups):
        raise NibbleError(
            f"{where}: n_group {rule.groups} doesn't divide n_routed_experts {experts} into groups of two or more.\n"
            "Choose a divisor; 1 is no grouping."
        )
    if rule.chosen_groups > rule.groups:
        raise NibbleError(
            f"{where}: topk_group {rule.chosen_groups} is more than n_group {rule.groups}; choose at most that many."
        )
    open_experts = experts // rule.groups * rule.chosen_groups
    if rule.chosen > open_experts:
        raise NibbleError(
            f"{where}: num_experts_per_tok is {rule.chosen}, but n_routed_experts {experts}, n_group {rule.groups} and "
            f"topk_group {rule.chosen_groups} leave {open_experts} to choose from.\n"
            f"Set num_experts_per_tok to at most {open_experts}, or raise topk_group."
        )


def glm_mlp(config: GlmConfig, layer: int, factory: Factory) -> SwiGLU | SharedExpertsMoE:
    """What layer number `layer` has: a dense MLP in the leading layers, experts in the others."""
    c = config
    if c.dense[layer]:
        return SwiGLU(c.hidden, c.dense_width, "dense_mlp", factory)
    shared_width = c.expert_width * c.shared_experts
    return SharedExpertsMoE(c.experts, c.hidden, c.expert_width, shared_width, c.routing, factory)
