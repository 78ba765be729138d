"""The native GLM-4.7-Flash against transformers, on tiny random checkpoints that transformers saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import load_model
from models.documents import Documents
from models.glm4_moe_lite import Glm4MoeLiteConfig, build, key_map
from models.lora import add_lora, trainable_parameters
from models.registry import architecture_for
from models.targets import AdapterSpec
from quant.errors import NibbleError
from quant.storage import Storage, StorageSpec
from tests.helpers import assert_close, random_tokens, relative_error, save_tiny_glm

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "groups": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "n_shared_experts": 2},
    "direct-queries": {
        "q_lora_rank": None,
        "mlp_layer_types": ["dense", "dense", "sparse"],
        "attention_bias": True,
    },
    "yarn-tied": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
    },
    "not-interleaved": {"rope_interleave": False},
    "bias-of-compressed-queries": {"attention_bias": True},
}


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def native_tensor(model: torch.nn.Module, native: str) -> Tensor:
    """The Parameter behind a key map's native name."""
    *path, leaf = native.split(".")
    owner = model.get_submodule(".".join(path))
    found = getattr(owner, leaf)
    return found.value if isinstance(found, Storage) else found


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_all_gradients_equal_transformers(tmp_path: Path, variant: str) -> None:
    reference = save_tiny_glm(tmp_path, **VARIANTS[variant])
    model = load_model(tmp_path, storage="none", dtype=torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tokens = random_tokens((2, 48))

    expected = reference(input_ids=tokens).logits
    logits = model(tokens)
    assert_close(logits, expected, what="logits")
    expected_loss, loss = cross_entropy(expected, tokens), cross_entropy(logits, tokens)
    assert_close(loss, expected_loss, what="loss")

    expected_loss.backward()
    loss.backward()
    theirs = dict(reference.named_parameters())
    compared = set()
    for key in key_map(model.config).keys:
        if key.hub.endswith("e_score_correction_bias"):
            continue
        compared.add(key.hub)
        ours = native_tensor(model, key.native).grad
        assert ours is not None, key.native
        gradient = theirs[key.hub].grad
        assert_close(ours, gradient, what=key.native)
    assert compared == set(theirs), "every parameter of the reference is compared"


@pytest.mark.parametrize(
    ("storage", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]
)
def test_quantised_model_equals_transformers_with_dequantised_weights(
    tmp_path: Path, storage: str, double_quant: bool
) -> None:
    reference = save_tiny_glm(tmp_path, n_shared_experts=2)
    model = load_model(tmp_path, storage=storage, dtype=torch.float32, double_quant=double_quant)
    parameters = dict(reference.named_parameters())
    quantised = 0
    with torch.no_grad():
        for key in key_map(model.config).keys:
            if key.stored != "storage":
                continue
            quantised += 1
            stack = parameters[key.hub].data
            for matrix in stack if stack.dim() == 3 else [stack]:
                matrix.copy_(bitsandbytes_round_trip(matrix, storage, double_quant))
    assert quantised > 20
    tokens = random_tokens((2, 48))
    logits = reference(input_ids=tokens).logits
    assert_close(model(tokens), logits, what=storage)
    unquantised = load_model(tmp_path, storage="none", dtype=torch.float32)
    assert relative_error(unquantised(tokens), logits) > 1e-3, "quantisation has an effect that the comparison sees"


def bitsandbytes_round_trip(matrix: Tensor, storage: str, double_quant: bool) -> Tensor:
    import bitsandbytes.functional as bnb

    if storage == "int8":
        rows, scales, _ = bnb.int8_vectorwise_quant(matrix)
        return bnb.int8_vectorwise_dequant(rows, scales)
    packed, state = bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=double_quant, quant_type=storage)
    return bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_packed_documents_equal_documents_alone(tmp_path: Path, storage: str) -> None:
    save_tiny_glm(tmp_path)
    lengths = [5, 33, 1, 17]
    tokens = random_tokens((sum(lengths),))
    pieces = tokens.split(lengths)

    def adapted() -> Any:
        model = load_model(tmp_path, storage=storage, dtype=torch.float32)
        add_lora(model, AdapterSpec(("attention", "experts", "router"), rank=4, alpha=8.0))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in trainable_parameters(model):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    packed, alone = adapted(), adapted()
    hidden = packed.hidden(tokens, Documents.from_lengths(lengths))
    separate = torch.cat([alone.hidden(piece, Documents.from_lengths([len(piece)])) for piece in pieces])
    assert_close(hidden, separate, what="hidden states")
    last = torch.tensor(lengths).cumsum(0) - 1
    labels = tokens.roll(-1).index_fill(0, last, -100)  # the next token of the same document
    losses = [
        torch.nn.functional.cross_entropy(model.lm_head(states), labels, reduction="sum")
        for model, states in ((packed, hidden), (alone, separate))
    ]
    assert_close(losses[0], losses[1], what="loss")
    for loss in losses:
        loss.backward()
    for (name, ours), (_, theirs) in zip(trainable_parameters(packed), trainable_parameters(alone), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert_close(ours.grad, theirs.grad, what=name)
    together = packed.hidden(tokens, Documents.from_lengths([len(tokens)]))
    assert relative_error(together, hidden.detach()) > 1e-2, "crossing documents would be seen"


def test_activation_checkpointing_changes_nothing_and_skips_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import models.experts as experts

    save_tiny_glm(tmp_path)
    model = load_model(tmp_path, storage="nf4", dtype=torch.float32)
    add_lora(model, AdapterSpec(("attention", "experts"), rank=4, alpha=8.0))
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(0.05)
    tokens = random_tokens((1, 32))
    calls = []
    forward = experts._forward
    monkeypatch.setattr(experts, "_forward", lambda *args: (calls.append(1), forward(*args))[1])

    def gradients(recompute: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        model.activation_checkpointing = recompute
        loss = cross_entropy(model(tokens), tokens)
        loss.backward()
        return loss, {name: parameter.grad.clone() for name, parameter in trainable_parameters(model)}  # type: ignore[union-attr]

    loss, kept = gradients(False)
    assert len(calls) == 2, "one call for each of the two sparse layers"
    again, recomputed = gradients(True)
    assert len(calls) == 4, "the recomputation stops before the experts' products"
    assert torch.equal(loss, again)
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_casting_the_model_leaves_the_routers_in_float32(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path)
    model = load_model(tmp_path, storage="nf4", dtype=torch.float32)
    gate = model.get_submodule("model.layers.1.mlp.gate")
    before = [tensor.clone() for tensor in (*gate.parameters(), *gate.buffers())]
    model.bfloat16()
    assert model.get_submodule("model.norm").weight.dtype == torch.bfloat16
    for tensor, kept in zip((*gate.parameters(), *gate.buffers()), before, strict=True):
        assert torch.equal(tensor, kept)
        assert tensor.dtype == torch.float32


def test_both_generations_of_config_json_read_alike(tmp_path: Path) -> None:
    save_tiny_glm(tmp_path, mlp_layer_types=["dense", "dense", "sparse"], rope_parameters={
        "rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    })  # fmt: skip
    new = json.loads((tmp_path / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("mlp_layer_types", "rope_parameters", "dtype")}
    old |= {
        "first_k_dense_replace": 2,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "torch_dtype": "float32",
        "eos_token_id": [1, 2],
    }
    parsed = Glm4MoeLiteConfig.parse(new, "new")
    assert Glm4MoeLiteConfig.parse(old, "old") == parsed
    # What real files say besides: a null that stands for nothing, a factor of one, a type for the prediction layer.
    plain = {"rope_scaling": None, "rope_theta": 1000000, "partial_rotary_factor": 1.0, "eos_token_id": 2}
    assert Glm4MoeLiteConfig.parse(plain, "").rope == Glm4MoeLiteConfig.parse({"rope_theta": 1e6}, "").rope
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_scaling": old["rope_scaling"]}
    assert Glm4MoeLiteConfig.parse(both, "").rope == Glm4MoeLiteConfig.parse(both | {"rope_parameters": None}, "").rope
    longer = new | {"mlp_layer_types": [*new["mlp_layer_types"], "sparse"]}
    assert Glm4MoeLiteConfig.parse(longer, "longer") == parsed


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    config = Glm4MoeLiteConfig.parse({"model_type": "glm4_moe_lite"}, "defaults")
    model = build(config, spec=StorageSpec("nf4"), dtype=torch.bfloat16, device="meta")
    keys = [key for key in key_map(config).keys if not key.is_buffer]
    assert sum(torch.Size(key.shape).numel() for key in keys) == 29_943_390_976
    size = sum(tensor.nbytes for tensor in model.parameters())
    assert size / 2**30 == pytest.approx(15.283, abs=0.001)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "where: model_type 'mamba' is not supported. Supported: .*glm4_moe_lite"),
        ({"hidden_size": "wide"}, "where: hidden_size must be a positive integer, got 'wide'"),
        ({"attention_dropout": 0.1}, "where: attention_dropout is 0.1; dropout is not implemented.*\n.*Set it to 0.0"),
        ({"hidden_act": "gelu"}, "where: hidden_act is 'gelu'; only 'silu' is implemented"),
        ({"rope_scaling": {"type": "llama3"}}, "where: rope_type 'llama3' is not supported; 'default' and 'yarn' are"),
        ({"rope_scaling": ["yarn"]}, r"where: rope_parameters \(or rope_scaling\) must be an object, got \['yarn'\]"),
        ({"rope_theta": "big"}, "where: rope_theta must be a positive number, got 'big'"),
        ({"rope_scaling": {"type": "yarn", "factor": "four"}}, "where: factor must be a positive number, got 'four'"),
        ({"partial_rotary_factor": 0.5}, r"where: partial_rotary_factor is 0\.5; .* qk_rope_head_dim \(64\)\.\nSet it"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r"where: partial_rotary_factor is 0\.5; latent attention",
        ),
        ({"qk_rope_head_dim": 7}, "where: 7 rotary dimensions of a head can't be paired; the number must be even"),
        ({"rms_norm_eps": None}, "where: rms_norm_eps must be a positive number, got None"),
        ({"attention_bias": "no"}, "where: attention_bias must be true or false, got 'no'"),
        (
            {"num_nextn_predict_layers": None},
            "where: num_nextn_predict_layers must be an integer of at least 0, got None",
        ),
        ({"n_shared_experts": 0}, "where: n_shared_experts must be a positive integer, got 0"),
        (
            {"mlp_layer_types": ["dense", "moe"]},
            r"where: mlp_layer_types must be a list of 'dense' and 'sparse', got \[",
        ),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types names 1 layers, num_hidden_layers is 47; make them agree"),
        (
            {"n_group": 3},
            "where: n_group 3 doesn't divide n_routed_experts 64 into groups of two or more.\nChoose a divisor",
        ),
        ({"n_group": 64}, "where: n_group 64 doesn't divide n_routed_experts 64 into groups of two or more"),
        ({"topk_group": 2}, "where: topk_group 2 is more than n_group 1; choose at most that many"),
        (
            {"n_group": 32, "topk_group": 1},
            "num_experts_per_tok is 4, but n_routed_experts 64, n_group 32 and topk_group 1 leave 2 to choose from.\n"
            "Set num_experts_per_tok to at most 2",
        ),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok is 65, but .* leave 64 to choose from"),
    ],
)
def test_errors_of_config_json(change: dict[str, Any], message: str) -> None:
    config = {"model_type": "glm4_moe_lite", **change}
    with pytest.raises(NibbleError, match=message):
        architecture_for(config, "where").parse_config(config, "where")
