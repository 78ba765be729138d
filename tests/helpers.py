"""What several tests share: tiny reference models, and comparisons that can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.blocks.factory import Factory
from models.checkpoint.keymap import KeyMap, key_map_of
from quant.storage import StorageSpec

# Every matrix that may be quantised has an input dimension that is a multiple of the block size, 64.
TINY_GLM: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "max_position_embeddings": 512,
    # Larger than the default 0.02, so that every part of the model has a visible effect on the logits.
    "initializer_range": 0.15,
    # With a padding token, transformers gives its embedding no gradient; here every row of the embedding is compared.
    "pad_token_id": None,
}


def tiny_glm(seed: int = 0, **changes: Any) -> Any:
    """A random float32 Glm4MoeLiteForCausalLM of transformers, with norms, biases and router biases not trivial."""
    from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

    torch.manual_seed(seed)
    model = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**{**TINY_GLM, **changes})).float().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name:
                tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
            elif name.endswith(("e_score_correction_bias", ".bias")):
                tensor.copy_(0.2 * torch.randn_like(tensor))
    return model


def save_tiny_glm(directory: Path, seed: int = 0, **changes: Any) -> Any:
    """Saves :func:`tiny_glm` as transformers does, and returns the model."""
    model = tiny_glm(seed, **changes)
    model.save_pretrained(directory)
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference relative to the largest expected value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = expected.abs().max().item()
    assert scale > 0, "the expected tensor is all zeros: the comparison could not fail"
    return (actual.double() - expected.double()).abs().max().item() / scale


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def random_tokens(shape: tuple[int, ...], vocabulary: int = 128, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def key_map_for(build: Any, config: Any, storage: Any = "none", dtype: torch.dtype = torch.bfloat16) -> KeyMap:
    """The key map of an architecture's parsed config; build: of its model file."""
    return key_map_of(build(config, Factory(StorageSpec(storage), dtype, "meta")))
