"""Generation against transformers' `generate`, on tiny random checkpoints of every architecture.

The reference gets one prompt at a time, without padding. Prompts and what follows them are longer than Trinity's window
and than the keys that GLM-5 selects, 16 each; blocks of prompts are cut in the middle of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models.attention.continued as continued
import models.generation.engine as engine
from models import load_model
from models.adapters.files import save_adapter
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec, adaptable, groups_of
from models.attention.cache import Cache, History
from models.blocks.router import Router
from models.checkpoint.keymap import key_map_of
from models.decoder import CausalLM
from models.experts.block import Experts
from models.generation.engine import Continuation, blocks
from models.generation.sampling import Sampling
from quant.common.errors import NibbleError
from quant.storage import Storage
from tests.helpers import assert_close, random_tokens, relative_error
from tests.peft_helpers import peft_load, randomise
from tests.tiny import TINY, save_tiny

PROMPTS = [random_tokens((length,), seed=length).tolist() for length in (5, 43, 1, 70)]
NEW = 6


def recording(calls: list[tuple[Tensor, list[list[int]]]], penalty: float = 1.0) -> Sampling:
    """Greedy; appends the logits, and the tokens that were seen, of each call."""

    class Recording(Sampling):
        def choose(self, logits: Tensor, seen: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
            calls.append((logits, [row.tolist() for row in seen]))
            return super().choose(logits, seen, generator)

    return Recording(repetition_penalty=penalty)


@dataclass(frozen=True)
class Answers:
    """tokens: NEW of them for each prompt. logits [rows, NEW, V], what each was chosen from."""

    tokens: list[list[int]]
    logits: Tensor


def ours(model: CausalLM, prompts: Sequence[Sequence[int]] = PROMPTS, new: int = NEW) -> Answers:
    calls: list[tuple[Tensor, list[list[int]]]] = []
    results = model.generate(prompts, new, sampling=recording(calls))
    assert all(result.finish == "length" for result in results)
    return Answers([result.tokens for result in results], torch.stack([logits for logits, _ in calls], dim=1))


def theirs(reference: Any, prompts: Sequence[Sequence[int]] = PROMPTS, new: int = NEW) -> Answers:
    tokens, logits = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        logits.append(torch.cat(out.logits))
    return Answers(tokens, torch.stack(logits))


def check(found: Answers, expected: Answers) -> None:
    assert found.tokens == expected.tokens
    for row in range(len(expected.tokens)):
        for step in range(expected.logits.shape[1]):
            assert_close(found.logits[row, step], expected.logits[row, step], what=f"row {row}, step {step}")


@dataclass(frozen=True)
class Base:
    folder: Path
    reference: Any
    expected: Answers


@pytest.fixture(scope="module", params=TINY)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp(request.param)
    changes = {"indexer_types": ["full", "shared", "full", "shared"]} if request.param == "glm_moe_dsa" else {}
    reference = save_tiny(folder, request.param, **changes)
    return Base(folder, reference, theirs(reference))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = tmp_path_factory.mktemp("small")
    save_tiny(folder, "qwen3_moe", num_hidden_layers=2)
    return load_model(folder, "none", "float32")


def test_greedy_tokens_and_logits_equal_transformers(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts together, then by blocks of 20 tokens and in small pieces of attention, then each alone."""
    model = load_model(base.folder, "none", "float32")
    check(ours(model), base.expected)
    monkeypatch.setattr(engine, "PROMPT_BLOCK", 20)
    monkeypatch.setattr(continued, "PAIRS_AT_A_TIME", 256)
    monkeypatch.setattr(continued, "NUMBERS_AT_A_TIME", 2**12)
    check(ours(model), base.expected)
    alone = [ours(model, [prompt]) for prompt in PROMPTS]
    check(Answers([one.tokens[0] for one in alone], torch.cat([one.logits for one in alone])), base.expected)


def test_with_an_adapter_as_peft_has_it(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA on everything that can have it, so that latent attention's absorbed matrix has it too."""
    model = load_model(base.folder, "none", "float32")
    groups = tuple(groups_of(adaptable(key_map_of(model))))
    add_lora(model, AdapterSpec(groups, 4, 8.0))
    randomise(trainable_parameters(model))
    save_adapter(model, tmp_path, "org/base")
    peft, _ = peft_load(base.reference, tmp_path)
    expected = theirs(peft, PROMPTS[1:2], 3)
    assert relative_error(expected.logits[:, 0], base.expected.logits[1:2, 0]) > 1e-2, "the adapter has an effect"
    monkeypatch.setattr(engine, "PROMPT_BLOCK", 20)
    check(ours(model, PROMPTS[1:2], 3), expected)


def one_by_one(model: CausalLM, prompt: list[int], new: list[int]) -> Tensor:
    """What each token is chosen from [steps, V], by a whole forward pass for each."""
    with torch.no_grad():
        return torch.stack([model(torch.tensor([prompt + new[:step]]))[0, -1].float() for step in range(len(new))])


@pytest.mark.parametrize("storage", ["nf4", "fp4", "int8"])
def test_quantised_models_equal_their_own_full_forward(
    base: Base, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward pass itself is held against transformers with dequantised weights elsewhere."""
    model = load_model(base.folder, storage, "float32")
    monkeypatch.setattr(engine, "PROMPT_BLOCK", 20)
    found = ours(model, PROMPTS[:2], 3)
    whole = [one_by_one(model, prompt, new) for prompt, new in zip(PROMPTS, found.tokens, strict=False)]
    check(found, Answers([logits.argmax(-1).tolist() for logits in whole], torch.stack(whole)))


def test_bfloat16_follows_the_full_forward(base: Base) -> None:
    model = load_model(base.folder, "none", "bfloat16")
    # Rounding changes which keys an indexer selects.
    some = PROMPTS[:1] if model.model_type == "glm_moe_dsa" else PROMPTS[:2]
    found = ours(model, some, 3)
    assert found.logits.dtype == torch.float32
    for prompt, new, logits in zip(some, found.tokens, found.logits, strict=True):
        assert relative_error(logits, one_by_one(model, prompt, new)) < 0.1


def test_what_is_kept(base: Base) -> None:
    """Latents for latent attention, a window for Trinity's sliding layers, states for Gated DeltaNet."""
    model = load_model(base.folder, "none", "float32")
    c = model.config
    rows, capacity = 2, 70 + 70 // 4 + 64  # the prompt, and room for more when the next token comes
    continuation = Continuation(model, [PROMPTS[3], PROMPTS[0]])
    continuation.step(torch.tensor([1, 2]))
    kind = model.model_type
    if kind in ("glm4_moe_lite", "glm_moe_dsa"):
        numbers = c.layers * (64 + 8) * capacity
        numbers += 2 * 16 * capacity if kind == "glm_moe_dsa" else 0  # keys of two indexers
    elif kind == "afmoe":
        numbers = 2 * 2 * 16 * (3 * 16 + capacity)
    elif kind.startswith("qwen3_5"):
        numbers = 3 * (4 * 16 * 32 + 3 * (2 * 2 * 16 + 4 * 32)) + 2 * 2 * 32 * capacity
    else:
        numbers = 4 * 2 * c.attention.kv_width * capacity
    assert continuation.cache.nbytes == rows * numbers * 4


@pytest.mark.parametrize("at_a_time", [None, 4])
def test_a_step_makes_only_the_chosen_experts_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_a_time: int | None
) -> None:
    """One after another as on a CPU, and several together as on CUDA."""
    save_tiny(tmp_path, "glm4_moe")
    model = load_model(tmp_path, "nf4", "float32")
    stacks = {}
    for module in model.modules():
        if isinstance(module, Experts):
            module.experts_at_a_time = at_a_time
            stacks[module.gate_up_proj.weight], stacks[module.down_proj.weight] = module, module
    made: dict[Storage, list[int]] = {stack: [] for stack in stacks}
    chosen: dict[Experts, set[int]] = {}
    experts_of = {module.gate: module.experts for module in model.modules() if hasattr(module, "gate")}
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.register_forward_hook(
            lambda router, _, output: chosen.update({experts_of[router]: set(output[0].flatten().tolist())})
        )
    kind = type(next(iter(stacks)))
    dense = kind.dense

    def counted(self: Storage, which: Any = None, **options: Any) -> Tensor:
        if self in made:
            made[self] += range(self.shape[0])[which] if isinstance(which, slice) else [which]
        return dense(self, which, **options)

    continuation = Continuation(model, PROMPTS[:2])
    monkeypatch.setattr(kind, "dense", counted)
    for tokens in ([1, 2], [3, 4]):
        for counts in made.values():
            counts.clear()
        continuation.step(torch.tensor(tokens))
        assert len(chosen) == 3
        for stack, counts in made.items():
            assert sorted(counts) == sorted(chosen[stacks[stack]])
            assert len(counts) < 8, "two rows choose four of eight experts at most"


def test_rows_end_one_by_one(small: CausalLM) -> None:
    """By stop tokens, by the caller, by length; the others go on as if alone."""
    whole = [result.tokens for result in small.generate(PROMPTS, 12)]
    stop = {whole[0][4], whole[3][0]}
    called: list[tuple[int, int]] = []

    def on_token(row: int, token: int) -> bool:
        called.append((row, token))
        return row == 2 and len([one for one, _ in called if one == 2]) == 3

    results = small.generate(PROMPTS, 12, stop=stop, on_token=on_token)
    for row, (result, tokens) in enumerate(zip(results, whole, strict=True)):
        kept = next((index for index, token in enumerate(tokens) if token in stop), 12)
        expected = tokens[: min(kept, 3 if row == 2 else 12)]
        assert result.tokens == expected
        assert result.finish == ("length" if len(expected) == 12 else "stop")
        assert [token for one, token in called if one == row] == expected
    assert results[3].tokens == []
    assert {result.finish for result in results} == {"length", "stop"}
    assert small.generate([], 3) == []


def test_seeds(small: CausalLM) -> None:
    sampling = Sampling(temperature=1.0)

    def draw(seed: int) -> list[list[int]]:
        return [result.tokens for result in small.generate(PROMPTS, 6, sampling=sampling, seed=seed)]

    assert draw(1) == draw(1) != draw(2)


def test_what_was_seen_is_the_prompt_and_the_new_tokens(small: CausalLM) -> None:
    calls: list[tuple[Tensor, list[list[int]]]] = []
    results = small.generate(PROMPTS[:2], 3, sampling=recording(calls, 1.1))
    for step, (_, seen) in enumerate(calls):
        assert seen == [p + r.tokens[:step] for p, r in zip(PROMPTS[:2], results, strict=True)]
    small.generate(PROMPTS[:2], 3, sampling=recording(calls))
    assert [seen for _, seen in calls[3:]] == [[]] * 3  # only a penalty needs it


def test_a_model_that_is_cut_over_processes_is_refused(tmp_path: Path) -> None:
    """The other process of two is a pretended one."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    save_tiny(tmp_path, "glm4_moe_lite")
    model = load_model(tmp_path, "none", "float32")
    init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        fully_shard(model.model.layers[0], mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(NibbleError, match="cut over several processes, where generating isn't offered"):
            model.generate(PROMPTS[:1], 3)
    finally:
        destroy_process_group()


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("glm4_moe_lite", {}), ("glm_moe_dsa", {}), ("afmoe", {"global_attn_every_n_layers": 2})],
)
def test_memory_of_a_prompt_does_not_grow_with_the_square_of_its_length(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    """The largest tensor of a prompt's computation; a block's hidden states or the cache, never tokens by tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(engine, "PROMPT_BLOCK", 40)
    monkeypatch.setattr(continued, "PAIRS_AT_A_TIME", 2**13)
    monkeypatch.setattr(continued, "NUMBERS_AT_A_TIME", 2**15)
    monkeypatch.setattr("models.attention.indexer.SCORES_IN_MEMORY", 2**15)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            tensors = (x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor))
            sizes.extend(x.untyped_storage().nbytes() for x in tensors if x.untyped_storage().data_ptr() not in weights)
            return out

    save_tiny(tmp_path, model_type, num_hidden_layers=2, **changes)
    model = load_model(tmp_path, "none", "float32")
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    length = 480
    with Sizes():
        Continuation(model, [random_tokens((length,)).tolist()])
    assert 4 * 40 * 64 < max(sizes) < length**2, "a mask of all tokens by all would be this large"


def test_blocks_of_prompts() -> None:
    assert list(blocks([5], 8)) == [[(0, 0, 5)]]
    assert list(blocks([5, 3, 1, 8], 8)) == [[(0, 0, 5), (1, 0, 3)], [(2, 0, 1)], [(3, 0, 8)]]
    assert list(blocks([4, 20, 3, 6], 8)) == [
        [(0, 0, 4)],
        [(1, 0, 8)],
        [(1, 8, 16)],
        [(1, 16, 20), (2, 0, 3)],
        [(3, 0, 6)],
    ]


@pytest.mark.parametrize("window", [None, 5])
def test_a_history_keeps_what_can_be_seen(window: int | None) -> None:
    """Rows of which token t is t, by pieces of any length and token by token, against the definition."""
    history, lengths = History(2, torch.zeros(1, 1, 1), window), [0, 0]
    for row, count in ((0, 3), (1, 1), (0, 9), (1, 4), (0, 2), (1, 7)):
        new = torch.arange(lengths[row], lengths[row] + count, dtype=torch.float32)[:, None, None]
        seen = history.extend(row, lengths[row], new).flatten().tolist()
        first = 0 if window is None else max(0, lengths[row] - window + 1)
        lengths[row] += count
        assert seen == list(range(first, lengths[row]))
    for _ in range(120):
        positions = torch.tensor(lengths)
        seen = history.step(positions, max(lengths) + 1, positions.float()[:, None, None])
        lengths = [length + 1 for length in lengths]
        for row, length in enumerate(lengths):
            first = 0 if window is None else max(0, length - window)
            assert sorted(seen[row].flatten()[:length].tolist()) == list(range(first, length))


def test_rows_of_a_cache_are_selected() -> None:
    cache, owner = Cache(3), torch.nn.Identity()
    history = cache.history(owner, "key", torch.zeros(1, 1, 1))
    for row in range(3):
        history.extend(row, 0, torch.full((2, 1, 1), float(row)))
    cache.state(owner, "state", (1,), torch.zeros(0))[:] = torch.arange(3.0)[:, None]
    cache.select([2, 0])
    assert cache.rows == 2
    assert cache.history(owner, "key", torch.zeros(1, 1, 1)) is history
    assert history.buffer[:, 0, 0, 0].tolist() == [2, 0]
    assert cache.state(owner, "state", (1,), torch.zeros(0)).flatten().tolist() == [2, 0]


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[1], []], 3, "prompt 1 has no tokens; give it at least one"),
        ([[1, 128]], 3, "prompt 0 has tokens from 1 to 128; the model's vocabulary has 0 to 127.\nDo tokenizer and"),
        ([[-1]], 3, "prompt 0 has tokens from -1 to -1"),
        ([[1]], 0, "max_new_tokens is 0; at least one token"),
    ],
)
def test_errors(small: CausalLM, prompts: list[list[int]], count: int, message: str) -> None:
    with pytest.raises(NibbleError, match=message):
        small.generate(prompts, count)
