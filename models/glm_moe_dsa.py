"""GLM-5 (`glm_moe_dsa`): latent attention to the keys that an indexer selects, sigmoid-routed experts with shared ones.

Sizes of GLM-5: 78 layers (3 dense), hidden 6144, 64 heads, 256 experts of width 2048 of which 8 are chosen, one shared
expert, 2048 selected keys; 744 billion parameters, 40 billion of them active for a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.attention.cache import Continued
from models.attention.continued import selected_latent_attention
from models.attention.indexer import Indexer, IndexerConfig, Part, parts_by_length, selected_attention
from models.attention.mla import LatentAttention, LatentAttentionConfig
from models.attention.rope import RopeConfig, parse_rope
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.blocks.norm import RMSNorm
from models.decoder import CausalLM, Decoder, HubForm, Run
from models.glm_moe import GlmConfig, glm_mlp
from quant.common.errors import NibbleError
from quant.common.jsonfile import flag, integer
from quant.common.words import shown

DEFAULTS = {
    "vocab_size": 154880,
    "hidden_size": 6144,
    "num_hidden_layers": 78,
    "first_k_dense_replace": 3,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
}


@dataclass(frozen=True)
class GlmMoeDsaConfig(GlmConfig):
    attention: LatentAttentionConfig
    indexer: IndexerConfig
    selects: tuple[bool, ...]  # per layer: has an indexer; else it uses the selection of the last layer that has one
    rope: RopeConfig

    @staticmethod
    def parse(config: dict[str, Any], where: str) -> GlmMoeDsaConfig:
        """Reads config.json; absent keys have the defaults of GLM-5."""
        for key in ("rope_interleave", "indexer_rope_interleave"):
            if not flag(config, key, True, where):
                raise NibbleError(
                    f"{where}: {key} is false; glm_moe_dsa always rotates interleaved pairs.\nSet it to true."
                )
        rope = parse_rope(config, integer(config, "qk_rope_head_dim", 64, where), where)
        attention = LatentAttentionConfig.parse(config, where, DEFAULTS, rope)
        common = GlmConfig.common(config, where, DEFAULTS)
        return GlmMoeDsaConfig(
            **vars(common),
            attention=attention,
            indexer=_indexer(config, attention, where),
            selects=_selecting_layers(config, common.layers, where),
            rope=rope,
        )


def _indexer(config: dict[str, Any], attention: LatentAttentionConfig, where: str) -> IndexerConfig:
    if attention.query_rank is None:
        raise NibbleError(
            f"{where}: q_lora_rank is null, but the indexer reads the compressed queries.\n"
            "Set it to their number of dimensions; a model without them is not a glm_moe_dsa."
        )
    dim = integer(config, "index_head_dim", 128, where)
    if dim < attention.rope_dim:
        raise NibbleError(
            f"{where}: index_head_dim {dim} is less than qk_rope_head_dim {attention.rope_dim}, the dimensions that "
            "the indexer rotates.\nMake it at least as large."
        )
    return IndexerConfig(
        hidden=attention.hidden,
        query_rank=attention.query_rank,
        heads=integer(config, "index_n_heads", 32, where),
        dim=dim,
        rope_dim=attention.rope_dim,
        topk=integer(config, "index_topk", 2048, where),
    )


def _selecting_layers(config: dict[str, Any], layers: int, where: str) -> tuple[bool, ...]:
    """A list of types goes before a pattern ("FSSF", or a list), and a pattern before a frequency with an offset.

    Types after the last layer (of prediction layers) don't count.
    """
    key = next((key for key in ("indexer_types", "index_topk_pattern") if config.get(key) is not None), None)
    if key is None:
        key = "index_topk_freq"
        every = max(integer(config, key, 1, where, least=0), 1)
        offset = integer(config, "index_skip_topk_offset", 2, where, least=0)
        types: Any = ["shared" if max(index - offset + 1, 0) % every else "full" for index in range(layers)]
    else:
        types = config[key]
    if key == "index_topk_pattern" and isinstance(types, str):
        types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in types]
    if not isinstance(types, list) or not {"full", "shared"}.issuperset(map(str, types)):
        letters = ", or a string of 'F' and 'S'" if key == "index_topk_pattern" else ""
        raise NibbleError(f"{where}: {key} must be a list of 'full' and 'shared'{letters}, got {shown(config[key])}.")
    if len(types) < layers:
        raise NibbleError(f"{where}: {key} names {len(types)} layers, num_hidden_layers is {layers}; make them agree.")
    if types[0] == "shared":
        raise NibbleError(
            f"{where}: by {key}, the first layer shares the selection of a layer before it, and there is none.\n"
            + ("Set index_skip_topk_offset to 1 or more." if key == "index_topk_freq" else "Begin with a full layer.")
        )
    return tuple(kind == "full" for kind in types[:layers])


class SelectingAttention(LatentAttention):
    """Latent attention to selected keys; has an indexer unless it shares the selection of a layer before."""

    def __init__(self, config: GlmMoeDsaConfig, index: int, factory: Factory) -> None:
        super().__init__(config.attention, factory)
        self.indexer: Indexer | None = None
        if config.selects[index]:
            self.indexer = Indexer(config.indexer, factory)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        documents: Documents,
        parts: tuple[Part, ...],
        tables: tuple[Tensor, Tensor],
        selected: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [N, H]; selected int32 [M, topk], of the layer to share with: [N, H], and the selection used.

        parts: of the documents; none where they are continued ones.
        """
        query, compressed, narrow = self.projected(x, tables)
        if isinstance(documents, Continued):
            if self.indexer is not None:
                selected = self.indexer.continued(x, compressed, documents, tables)
            out = self.continued(query, self.kept(narrow, tables), documents, selected)
        else:
            if self.indexer is not None:
                selected = self.indexer(x, compressed, parts, tables)
            out = selected_attention(query, *self.keys_and_values(narrow, tables), parts, selected, self.config.scale)
        return self.o_proj(out.flatten(1)), selected

    def continued(self, query: Tensor, kept: Tensor, documents: Continued, selected: Tensor | None = None) -> Tensor:
        """As LatentAttention's; selected int32 [N, K]: what each token sees, None where it sees everything."""
        if selected is None:
            return super().continued(query, kept, documents)
        history = documents.cache.history(self, "latent", kept)
        documents.store(history, kept)
        scale = self.config.scale
        return self.absorbed(query, lambda q: selected_latent_attention(q, history, selected, documents, scale))


class DecoderLayer(nn.Module):
    def __init__(self, config: GlmMoeDsaConfig, index: int, factory: Factory) -> None:
        super().__init__()
        c = config
        self.input_layernorm = RMSNorm(c.hidden, c.eps, factory)
        self.self_attn = SelectingAttention(c, index, factory)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps, factory)
        self.mlp = glm_mlp(c, index, factory)

    def forward(
        self,
        x: Tensor,
        documents: Documents,
        parts: tuple[Part, ...],
        tables: tuple[Tensor, Tensor],
        selected: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        x, normed = self.input_layernorm.after(x)
        attended, selected = self.self_attn(normed, documents, parts, tables, selected)
        x, *copies = self.post_attention_layernorm.after(x, attended, copies=self.mlp.uses)
        return self.mlp(*copies, plus=x), selected


class SelectingDecoder(Decoder):
    """Layers hand on their selection of keys. selects: which of them make one of their own."""

    def __init__(self, config: GlmMoeDsaConfig, layers: Sequence[nn.Module], norm: nn.Module, factory: Factory) -> None:
        super().__init__(config, layers, norm, factory)
        self.selects, self.topk = config.selects, config.indexer.topk

    def forward(self, tokens: Tensor, documents: Documents, run: Run) -> Tensor:
        x = self.embed_tokens(tokens)
        tables = self.rope.tables(documents.positions)
        parts = () if isinstance(documents, Continued) else parts_by_length(documents, self.topk)
        selected: Tensor | None = None
        for layer, selects in zip(self.layers, self.selects, strict=True):
            # Inputs of a layer are kept for its gradients: a selection that it doesn't use would be kept too.
            x, selected = run(layer, x, documents, parts, tables, None if selects else selected)
        return self.norm(x)


def build(config: GlmMoeDsaConfig, factory: Factory) -> CausalLM:
    """The model with empty tensors."""
    c = config
    layers = [DecoderLayer(c, index, factory) for index in range(c.layers)]
    decoder = SelectingDecoder(c, layers, RMSNorm(c.hidden, c.eps, factory), factory)
    # Sharing is set in config.json alone, so a checkpoint may still hold the indexer that is not used.
    unused = (rf"model\.layers\.{index}\.self_attn\.indexer\..*" for index in range(c.layers) if not c.selects[index])
    hub = HubForm(carried=(*c.hub.carried, *unused))
    return CausalLM(c, decoder, factory, model_type="glm_moe_dsa", hub=hub)
