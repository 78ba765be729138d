"""The native GLM-5 against transformers, on tiny random checkpoints that transformers saved.

Unless a variant says otherwise, queries of the tiny models see 16 keys, so sequences of 48 are long.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models.attention.indexer as indexer
from models import load_model
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec
from models.blocks.documents import Documents
from models.blocks.factory import Factory
from models.checkpoint.conversion import count_parameters
from models.checkpoint.hub import HubCheckpoint
from models.checkpoint.keymap import key_map_of
from models.checkpoint.stream import HubReader
from models.glm_moe_dsa import GlmMoeDsaConfig, build
from models.registry import architecture_for
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests import architecture_checks as checks
from tests.helpers import assert_close, key_map_for, random_tokens, relative_error
from tests.tiny import save_tiny
from train.config.load import parse_config
from train.model import make_trainable

DSA = "glm_moe_dsa"
GROUPS = ("attention", "experts", "shared_experts", "dense_mlp", "router")
SHARING = {"indexer_types": ["full", "shared", "full", "shared"]}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all-keys-seen": {"index_topk": 48},
    "all-but-one-key-seen": {"index_topk": 47},
    "one-key": {"index_topk": 1},
    "two-keys": {"index_topk": 2},
    "three-keys": {"index_topk": 3},
    "shared-selections": SHARING,
    "one-selection-for-all": {"indexer_types": ["full", "shared", "shared", "shared"], "index_topk": 3},
    "tied": {"tie_word_embeddings": True},
    "another-layer-pattern": {"mlp_layer_types": ["sparse", "dense", "sparse", "dense"]},
    "three-experts": {"num_experts_per_tok": 3, "norm_topk_prob": False},
    "groups": {"n_group": 4, "topk_group": 2},
    "two-shared-experts": {"n_shared_experts": 2},
    "attention-bias": {"attention_bias": True},
    "indexer-all-rotated": {"index_head_dim": 8, "index_n_heads": 1},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_all_gradients_equal_transformers(
    tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexer, "QUERIES_IN_BLOCK", 20)  # blocks of 20, 20 and 8
    reference = save_tiny(tmp_path, DSA, **VARIANTS[variant])
    assert any(buffer.abs().max() > 0.1 for name, buffer in reference.named_buffers() if "correction_bias" in name)
    model = load_model(tmp_path, storage="none", dtype=torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tokens = random_tokens((2, 48))

    expected = reference(input_ids=tokens).logits
    logits = model(tokens)
    assert_close(logits, expected, what="logits")
    expected_loss, loss = checks.cross_entropy(expected, tokens), checks.cross_entropy(logits, tokens)
    assert_close(loss, expected_loss, what="loss")

    expected_loss.backward()
    loss.backward()
    theirs = dict(reference.named_parameters())
    compared = set()
    for key in key_map_of(model).keys:
        if not key.counted:
            continue
        compared.add(key.hub)
        ours, gradient = checks.native_tensor(model, key.native).grad, theirs[key.hub].grad
        if key.group == "indexer":
            assert ours is None and gradient is None, key.native
            continue
        assert ours is not None and gradient is not None, key.native
        if variant == "one-key" and not gradient.any():
            assert not ours.any(), "the only key has the whole weight, whatever its score"
            continue
        assert_close(ours, gradient, what=key.native)
    assert compared == set(theirs), "every parameter of the reference is compared"


def test_what_is_selected_has_an_effect_that_the_comparisons_see(tmp_path: Path) -> None:
    save_tiny(tmp_path, DSA)
    model = load_model(tmp_path, storage="none", dtype=torch.float32)
    tokens = random_tokens((2, 48))
    logits = model(tokens).detach()
    assert torch.equal(model(tokens[:, :16]), load_with(tmp_path, index_topk=48)(tokens[:, :16]))
    assert relative_error(load_with(tmp_path, index_topk=48)(tokens), logits) > 1e-2, "sparse is not full attention"
    with torch.no_grad():
        for layer in model.model.layers:
            weights = layer.self_attn.indexer.weights_proj.weight.value
            weights.copy_(-weights)
    assert relative_error(model(tokens), logits) > 1e-2, "the indexer decides"


def load_with(folder: Path, **changes: Any) -> Any:
    """The checkpoint in `folder` with another config.json, which is put back."""
    path = folder / "config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | changes))
        return load_model(folder, storage="none", dtype=torch.float32)
    finally:
        path.write_text(before)


@pytest.mark.parametrize(("storage", "double_quant"), checks.QUANTISED)
def test_quantised_model_equals_transformers_with_dequantised_weights(
    tmp_path: Path, storage: str, double_quant: bool
) -> None:
    reference = save_tiny(tmp_path, DSA, **SHARING)
    keys = key_map_of(load_model(tmp_path, storage="nf4", dtype=torch.float32)).keys
    assert not any(key.spec == StorageSpec("nf4") for key in keys if key.group == "indexer")
    checks.check_quantised(tmp_path, reference, storage, double_quant)


@pytest.mark.parametrize("storage", ["none", "nf4"])
def test_packed_documents_equal_documents_alone(tmp_path: Path, storage: str) -> None:
    save_tiny(tmp_path, DSA, **SHARING)
    lengths = [5, 33, 1, 16, 17, 20, 3]  # 33, 17 and 20 are long
    checks.check_packing(tmp_path, storage, lengths, GROUPS)


def test_activation_checkpointing_changes_nothing_and_skips_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, DSA, **SHARING)
    calls, calls_recomputed = checks.check_recomputation(tmp_path, GROUPS, monkeypatch)
    assert calls == 3, "one call for each of the three sparse layers"
    assert calls_recomputed == 3, "the recomputation stops before the experts' products"


def test_bfloat16_errs_no_more_than_transformers(tmp_path: Path) -> None:
    # All keys but one, of the last query: enough to have attention go the way of long documents.
    reference = save_tiny(tmp_path, DSA, num_experts_per_tok=8, index_topk=47)
    checks.check_bfloat16_against_transformers(tmp_path, reference)


# --- the indexer's tensors


def test_a_full_fine_tune_trains_all_but_the_indexers(tmp_path: Path) -> None:
    save_tiny(tmp_path, DSA)
    model = load_model(tmp_path, storage="none", dtype=torch.float32)
    make_trainable(model, parse_config("""
        model: {path: unused, storage: none, dtype: float32}
        adapter: {kind: none}
        data: {train: unused.jsonl}
        output: {dir: unused}
    """))  # fmt: skip
    trained = {name for name, _ in trainable_parameters(model)}
    frozen = {name for name, _ in model.named_parameters()} - trained
    assert {name.split("self_attn.")[-1] for name in frozen} == {
        f"indexer.{part}"
        for part in (
            "wq_b.weight.value",
            "wk.weight.value",
            "k_norm.weight",
            "k_norm.bias",
            "weights_proj.weight.value",
        )
    }
    assert len(frozen) == 4 * 5
    tokens = random_tokens((2, 48))
    checks.cross_entropy(model(tokens), tokens).backward()
    assert all(parameter.grad is not None for _, parameter in trainable_parameters(model)), "nothing else is left out"


def test_lora_on_attention_leaves_the_indexers_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path, DSA)
    model = load_model(tmp_path, storage="nf4", dtype=torch.float32)
    add_lora(model, AdapterSpec(("attention",), rank=4, alpha=8.0))
    adapted_parts = {name.split(".lora.")[0].rpartition("self_attn.")[2] for name, _ in trainable_parameters(model)}
    assert adapted_parts == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    with pytest.raises(NibbleError, match=r"'wq_b' can't be adapted: the indexer only chooses which keys"):
        add_lora(model, AdapterSpec(("wq_b",), rank=4, alpha=8.0))


def test_casting_the_model_leaves_the_float32_tensors_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path, DSA)
    model = load_model(tmp_path, storage="nf4", dtype=torch.float32)
    part = model.get_submodule("model.layers.1.self_attn.indexer")
    kept = [*part.k_norm.parameters(), *part.weights_proj.parameters()]
    before = [tensor.clone() for tensor in kept]
    model.bfloat16()
    assert part.wk.weight.value.dtype == torch.bfloat16
    for tensor, old in zip([*part.k_norm.parameters(), *part.weights_proj.parameters()], before, strict=True):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, old)
    loaded = load_model(tmp_path, storage="nf4", dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in loaded.named_parameters() if ".indexer." in name}
    assert dtypes == {name: tensor.dtype for name, tensor in model.named_parameters() if ".indexer." in name}
    assert loaded(random_tokens((1, 48))).isfinite().all()


def test_prediction_layers_and_unused_indexers_are_carried(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path, DSA)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.4.eh_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SHARING))
    checkpoint = HubCheckpoint(tmp_path)
    keys = key_map_for(build, GlmMoeDsaConfig.parse(checkpoint.config, "here"))
    reader = HubReader(checkpoint, keys)
    parts = ("k_norm.bias", "k_norm.weight", "weights_proj.weight", "wk.weight", "wq_b.weight")
    unused = {f"model.layers.{index}.self_attn.indexer.{part}" for index in (1, 3) for part in parts}
    assert set(reader.carried) == unused | {"model.layers.4.eh_proj.weight"}


# --- attention to selected keys


def dense_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """seen bool [N, N]: which keys each query sees, if they are not later."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = scores.masked_fill(~(seen & torch.ones_like(seen).tril()), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


def selection(lengths: list[int], topk: int) -> tuple[Tensor, Tensor]:
    """A random selection int32 [M, topk] for the long documents of a batch, and what it lets each token see."""
    generator, tokens, chosen = torch.Generator().manual_seed(2), sum(lengths), []
    seen, start = torch.zeros(tokens, tokens, dtype=torch.bool), 0
    for length in lengths:
        block = seen[start : start + length, start : start + length]
        start += length
        if length <= topk:
            block.fill_(True)
            continue
        for query in range(length):  # itself, and others of which some are later
            others = torch.randperm(length, generator=generator)
            row = torch.cat((torch.tensor([query]), others[others != query]))[:topk]
            block[query, row] = True
            chosen.append(row)
    return torch.stack(chosen).int(), seen


@pytest.mark.parametrize("lengths", [[40], [30, 4, 7, 20, 21, 3], [300]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selected_attention_equals_a_dense_mask(lengths: list[int], dtype: torch.dtype) -> None:
    generator, topk, scale = torch.Generator().manual_seed(0), 10, 0.3
    inputs = [torch.randn(sum(lengths), 3, size, generator=generator).to(dtype) for size in (12, 12, 7)]
    selected, seen = selection(lengths, topk)
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.float().requires_grad_() for x in inputs]
    parts = indexer.parts_by_length(Documents.from_lengths(lengths), topk)
    out = indexer.selected_attention(*ours, parts, selected, scale)
    expected = dense_attention(*theirs, seen, scale)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(out.float(), expected, tolerance, "output")
    target = torch.randn(expected.shape, generator=generator).to(dtype)
    (out * target).sum().backward()
    (expected * target.float()).sum().backward()
    for name, mine, other in zip(("query", "key", "value"), ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        assert_close(mine.grad.float(), other.grad, tolerance, name)


def test_a_batch_is_cut_around_long_documents_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = indexer.parts_by_length(Documents.from_lengths([16, 3, 17, 40, 2]), 16)
    assert [(part.rows.start, part.rows.stop) for part in parts] == [(0, 19), (19, 36), (36, 76), (76, 78)]
    assert [part.documents and part.documents.lengths for part in parts] == [(16, 3), None, None, (2,)]
    documents = Documents.from_lengths([16, 3])
    (part,) = indexer.parts_by_length(documents, 16)
    assert part.documents is documents
    assert part.rows == slice(0, 19)
    save_tiny(tmp_path, DSA)
    model = load_model(tmp_path, storage="none", dtype=torch.float32)
    monkeypatch.setattr(indexer.Indexer, "_select", lambda *args: pytest.fail("there was nothing to select"))
    model.hidden(random_tokens((19,)), documents)


def test_no_tensor_grows_with_the_square_of_the_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, list | tuple) else [out]) if torch.is_tensor(x))
            return out

    save_tiny(tmp_path, DSA, num_hidden_layers=1, first_k_dense_replace=1)
    model = load_model(tmp_path, storage="none", dtype=torch.float32)
    length = 900
    monkeypatch.setattr(indexer, "SCORES_IN_MEMORY", 16 * 4 * length)
    tokens = random_tokens((1, length))
    with Sizes():
        model.requires_grad_(True)
        model(tokens).sum().backward()
    assert max(sizes) < length**2 // 4


def test_blocks_cover_every_query_once_within_the_bound() -> None:
    for length, heads in ((1, 1), (256, 4), (257, 4), (5000, 64), (2**21, 64)):
        every = indexer._blocks(length, length, heads)
        blocks = [*every] if length < 2**20 else [next(every)]
        starts, stops = zip(*blocks, strict=True)
        assert starts[0] == 0
        assert starts[1:] == stops[:-1]
        assert length > 2**20 or stops[-1] == length
        largest = max(stop - start for start, stop in blocks)
        assert largest == 1 or largest * heads * length <= indexer.SCORES_IN_MEMORY
        assert largest <= indexer.QUERIES_IN_BLOCK


# --- config.json


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"index_topk_freq": 2},
        {"index_topk_freq": 3, "index_skip_topk_offset": 1},
        {"index_topk_freq": 4, "index_skip_topk_offset": 5},
        {"index_topk_freq": 0, "index_skip_topk_offset": 0},
        {"index_topk_pattern": "FSSFSSFFSFSS"},
        {"index_topk_pattern": ["full", "shared"] * 6, "index_topk_freq": 3},
        {"indexer_types": ["full", "shared", "shared"] * 4, "index_topk_pattern": "F" * 12},
        {"indexer_types": ["full", "shared"] * 7},  # two types too many: of prediction layers
    ],
)
def test_which_layers_share_a_selection(given: dict[str, Any]) -> None:
    from transformers import GlmMoeDsaConfig as Reference

    theirs = Reference(num_hidden_layers=12, **given).indexer_types
    parsed = GlmMoeDsaConfig.parse({"num_hidden_layers": 12, **given}, "here")
    assert parsed.selects == tuple(kind == "full" for kind in theirs[:12])


def test_the_published_size_has_the_published_number_of_parameters() -> None:
    config = GlmMoeDsaConfig.parse({"model_type": DSA}, "defaults")
    key_map = key_map_for(build, config, "nf4")
    assert count_parameters(key_map.keys) == 743_911_199_232
    dense = build(config, Factory(StorageSpec("none"), torch.bfloat16, "meta"))
    assert sum(parameter.numel() for parameter in dense.parameters()) == 743_911_199_232
    assert key_map.is_carried("model.layers.78.eh_proj.weight")
    assert not key_map.is_carried("model.layers.77.self_attn.indexer.wk.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q_lora_rank": None},
            "where: q_lora_rank is null, but the indexer reads the compressed queries.\nSet it to their number",
        ),
        (
            {"rope_interleave": False},
            "where: rope_interleave is false; glm_moe_dsa always rotates interleaved pairs.\nSet it to true",
        ),
        ({"indexer_rope_interleave": False}, "where: indexer_rope_interleave is false"),
        ({"index_topk": 0}, "where: index_topk must be a positive integer, got 0"),
        ({"index_n_heads": None}, "where: index_n_heads must be a positive integer, got None"),
        (
            {"index_head_dim": 32},
            "where: index_head_dim 32 is less than qk_rope_head_dim 64, the dimensions that the indexer rotates.\nMake",
        ),
        ({"index_topk_freq": -1}, "where: index_topk_freq must be an integer of at least 0, got -1"),
        ({"index_skip_topk_offset": 1.5}, "where: index_skip_topk_offset must be an integer of at least 0, got 1.5"),
        (
            {"indexer_types": ["full", "own"]},
            r"where: indexer_types must be a list of 'full' and 'shared', got \['full', 'own'\]",
        ),
        ({"indexer_types": "FS"}, "where: indexer_types must be a list of 'full' and 'shared', got 'FS'"),
        (
            {"index_topk_pattern": "FSX"},
            "where: index_topk_pattern must be a list of 'full' and 'shared', or a string of 'F' and 'S', got 'FSX'",
        ),
        (
            {"index_topk_pattern": "FS"},
            "where: index_topk_pattern names 2 layers, num_hidden_layers is 78; make them agree",
        ),
        ({"indexer_types": []}, "where: indexer_types names 0 layers, num_hidden_layers is 78; make them agree"),
        (
            {"indexer_types": ["shared"] * 78},
            "where: by indexer_types, the first layer shares the selection of a layer before it, and there is none.\n"
            "Begin with a full layer",
        ),
        (
            {"index_topk_freq": 2, "index_skip_topk_offset": 0},
            "where: by index_topk_freq, the first layer shares .*\nSet index_skip_topk_offset to 1 or more",
        ),
        ({"attention_dropout": 0.1}, "where: attention_dropout is 0.1; only 0.0 is implemented"),
        ({"hidden_act": "gelu"}, "where: hidden_act is 'gelu'; only 'silu' is implemented"),
        ({"partial_rotary_factor": 0.5}, r"where: partial_rotary_factor is 0\.5; latent attention"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types names 1 layers, num_hidden_layers is 78; make them agree"),
        ({"n_group": 3}, "where: n_group 3 doesn't divide n_routed_experts 256"),
    ],
)
def test_errors_of_config_json(change: dict[str, Any], message: str) -> None:
    config = {"model_type": DSA, **change}
    with pytest.raises(NibbleError, match=message):
        architecture_for(config, "where").parse_config(config, "where")
