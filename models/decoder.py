"""The frame that every architecture shares: embed, decoder layers, final norm, head.

Shapes: N tokens of a flat batch, B batch, T sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quant.storage import StorageSpec

from .documents import Documents
from .linear import Linear
from .norm import RMSNorm
from .rope import RopeConfig


class Embedding(nn.Module):
    """Rows of `weight` [V, H], in its dtype, for tokens int64 [N]."""

    def __init__(self, vocabulary: int, hidden: int, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, hidden, dtype=dtype, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)


class Decoder(nn.Module):
    """`model.*` of a hub checkpoint: everything but the head."""

    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        eps: float,
        layers: Sequence[nn.Module],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(vocabulary, hidden, dtype=dtype, device=device)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(hidden, eps, dtype=dtype, device=device)


class CausalLM(nn.Module):
    """A decoder with a head, over documents packed into a flat batch.

    config: the architecture's parsed configuration. model_type: as in config.json. spec, dtype: how the frozen
    matrices are stored, and the dtype of everything else and of activations.
    activation_checkpointing: in training, keep only every layer's input and compute the layer again for its gradients.
    """

    def __init__(
        self,
        config: Any,
        decoder: Decoder,
        rope: RopeConfig,
        *,
        model_type: str,
        tied: bool,
        spec: StorageSpec,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__()
        self.config, self.model_type, self.spec, self.dtype = config, model_type, spec, dtype
        self.rope = rope
        self.activation_checkpointing = False
        self.model = decoder
        vocabulary, hidden = decoder.embed_tokens.weight.shape
        dense = StorageSpec("none")
        self.lm_head = Linear(hidden, vocabulary, spec=dense, dtype=dtype, device=device, name="lm_head")
        if tied:
            self.lm_head.weight.value = decoder.embed_tokens.weight

    @property
    def head(self) -> Linear:
        return self.lm_head

    @property
    def vocabulary(self) -> int:
        return self.lm_head.out_features

    def hidden(self, tokens: Tensor, documents: Documents) -> Tensor:
        """tokens int64 [N] of packed documents: the hidden states [N, H] after the final norm."""
        x = self.model.embed_tokens(tokens)
        tables = self.rope.tables(documents.positions)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.model.layers:
            if recompute:
                # Nothing in a layer is random, so there is no generator state to keep.
                x = checkpoint(layer, x, documents, tables, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, documents, tables)
        return self.model.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [B, T], every row a document of its own: logits [B, T, V] in the model's dtype."""
        batch, length = tokens.shape
        documents = Documents.from_lengths([length] * batch, tokens.device)
        return self.lm_head(self.hidden(tokens.flatten(), documents)).unflatten(0, (batch, length))
