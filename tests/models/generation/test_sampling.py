"""The distribution of the next token, against transformers' logits processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.generation.sampling import GREEDY, Sampling
from quant.common.errors import NibbleError
from tests.helpers import assert_close

VOCABULARY = 50
SEEN = [torch.tensor([3, 4, 4, 20]), torch.tensor([7]), torch.tensor([0, 49, 12])]


def logits() -> torch.Tensor:
    values = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 3
    values[0, 10:14] = values[0].max() - 1  # equal ones, on both sides of a filter's bound
    return values


def theirs(settings: dict[str, Any], scores: torch.Tensor) -> torch.Tensor:
    """The probabilities that `generate` of transformers draws from: its processors in its order."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    given = {"top_k": None, "top_p": None, **settings}
    processors = model._get_logits_processor(GenerationConfig(do_sample=True, **given), device="cpu")
    assert len(processors) == len(settings) - (settings["temperature"] == 1.0)
    rows = [processors(tokens[None], row[None].clone()) for tokens, row in zip(SEEN, scores, strict=True)]
    return torch.cat(rows).softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 5},
        {"temperature": 1.0, "top_k": 12},  # the equal logits of the first row are around this place
        {"temperature": 1.0, "top_k": 1000},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "repetition_penalty": 0.5},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2},
        {"temperature": 3.0, "top_k": 30, "top_p": 0.7, "min_p": 0.1, "repetition_penalty": 1.1},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_the_distribution_is_that_of_transformers(settings: dict[str, Any]) -> None:
    expected = theirs(settings, logits())
    found = Sampling(**settings).probabilities(logits(), SEEN)
    assert torch.equal(found > 0, expected > 0)
    assert_close(found, expected)


def test_draws_have_that_distribution() -> None:
    sampling = Sampling(temperature=1.5, top_k=6)
    row = logits()[1:2]
    expected = sampling.probabilities(row, SEEN[1:2])[0]
    rows = row.expand(20_000, -1)
    drawn = sampling.choose(rows, [SEEN[1]] * len(rows), torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64 and drawn.shape == (20_000,)
    found = torch.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    # Five standard deviations of a frequency of 20,000 draws, at most.
    assert float((found - expected).abs().max()) < 5 * 0.5 / 20_000**0.5
    again = sampling.choose(rows, [SEEN[1]] * len(rows), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    other = sampling.choose(rows, [SEEN[1]] * len(rows), torch.Generator().manual_seed(1))
    assert not torch.equal(drawn, other)


def test_greedy_takes_the_largest_after_the_penalty() -> None:
    assert torch.equal(GREEDY.choose(logits(), SEEN), logits().argmax(-1))
    scores = torch.tensor([[2.0, 1.9, -1.0], [-0.1, -0.2, -5.0]])
    seen = [torch.tensor([0]), torch.tensor([0, 0])]
    assert Sampling(repetition_penalty=1.1).choose(scores, seen).tolist() == [1, 0]
    assert Sampling(repetition_penalty=3.0).choose(scores, seen).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, float("nan"), float("inf"), True, "1", None)),
        ("top_k", (0, -1, 1.5, True)),
        ("top_p", (0, 0.0, 1.1, -0.5, float("nan"))),
        ("min_p", (-0.1, 1.1)),
        ("repetition_penalty", (0, -1.0, None, 1e9)),
    ],
)
def test_a_value_out_of_range_is_named(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(NibbleError, match=rf"^{name} must be .*, got "):
            Sampling(**{name: value})


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_choose_nothing(sampling: Sampling, value: float) -> None:
    broken = logits()
    broken[1, 3] = value
    with pytest.raises(NibbleError, match="not finite"):
        sampling.choose(broken, SEEN)
