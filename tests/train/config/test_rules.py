"""Keys that do not fit each other, and those that do."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tests.config_helpers import MINIMAL, message, with_keys
from train.config.load import Config, dump_config, parse_config

MESSAGES_ONLY = "(its fields: messages, tools, role, content, system). Rename it, or change data.format."


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["adapter.kind=none"],
            "adapter.kind: none with model.storage: nf4: full fine-tuning needs unquantised weights. Set "
            "model.storage: none, or adapter.kind: lora.",
        ),
        (
            ["adapter.init_from=old", "adapter.kind=none", "model.storage=none"],
            "adapter.init_from with adapter.kind: none: there is no adapter to start from it. Set adapter.init_from: "
            "null, or adapter.kind: lora.",
        ),
        (
            ["adapter.layers=[1]", "adapter.kind=none", "model.storage=none"],
            "adapter.layers with adapter.kind: none: full fine-tuning trains every layer. Set adapter.layers: null, or "
            "adapter.kind: lora.",
        ),
        (
            ["model.double_quant=true", "model.storage=int8"],
            "model.double_quant: true with model.storage: int8: only the scales of nf4 and fp4 are quantised again. "
            "Set model.double_quant: false (or leave it out), or model.storage: nf4.",
        ),
        (
            ["data.eval_fraction=0.1", "data.eval=held.jsonl"],
            "data.eval_fraction with data.eval: held-out rows come from one of them. Set data.eval_fraction: null (or "
            "leave it out), or data.eval: null.",
        ),
        (
            ["train.keep_best=true"],
            "train.keep_best without train.eval_every: there are evaluations only before the first step and after the "
            "last one. Set train.eval_every, or leave train.keep_best out.",
        ),
        (
            ["train.patience=3"],
            "train.patience without train.eval_every: there are evaluations only before the first step and after the "
            "last one. Set train.eval_every, or leave train.patience out.",
        ),
        (
            ["train.patience_delta=0.1", "train.eval_every=5"],
            "train.patience_delta without train.patience: nothing uses it. Set train.patience, or leave it out.",
        ),
        (
            ["train.eval_every=5", "data.eval_fraction=null"],
            "train.eval_every without held-out rows: set data.eval or data.eval_fraction, or train.eval_every: null.",
        ),
        (
            ["data.sequence_length=7"],
            "data.packing: true with data.sequence_length: 7: nothing fits together in so few tokens. Set "
            "data.sequence_length to 8 or more, or data.packing: false.",
        ),
        (
            ["data.fields={prompt: question}"],
            f"data.fields: 'prompt' is not a field of data.format: messages {MESSAGES_ONLY}",
        ),
        (
            ["data.fields={prompt: a, completion: a}", "data.format=prompt_completion"],
            "data.fields: two fields are read from the same name; give each its own.",
        ),
        (
            ["train.optimizer=paged_adamw_8bit", "train.device=cpu"],
            "train.optimizer: paged_adamw_8bit with train.device: cpu: paged state needs CUDA. Set train.optimizer: "
            "adamw_8bit, or train.device: cuda.",
        ),
        (
            ["adapter.targets=[]"],
            "adapter.targets: [] with adapter.kind: lora: nothing would be trained. Name targets, e.g. [attention, "
            "experts], or set adapter.kind: none for full fine-tuning.",
        ),
        (["adapter.targets=[o_proj, o_proj]"], "adapter.targets: 'o_proj' is listed twice."),
        (["adapter.layers=[3, 3]"], "adapter.layers: a layer is listed twice."),
        (
            ["adapter.rank={attention: 8, experts: 4, router: 2}"],
            "adapter.rank gives a value for 'router', which adapter.targets does not list. Add or drop it.",
        ),
        (
            ["adapter.alpha={attention: 8}"],
            "adapter.alpha has no value for 'experts', which adapter.targets lists. Add experts: N, or use one number.",
        ),
        (
            ["adapter.rank={attention: 8, experts: 4, expertz: 4}"],
            "adapter.rank: 'expertz' is not a group. Did you mean 'experts'?",
        ),
        (
            ["adapter.rank={attention: 8, experts: 4, o_proj: 4}"],
            "adapter.rank: 'o_proj' is not a group. The groups are attention, linear_attention, experts, "
            "shared_experts, dense_mlp, router.",
        ),
    ],
)
def test_wrong_combination_names_both_keys_and_the_fix(overrides: list[str], expected: str) -> None:
    assert message(MINIMAL, *overrides) == f"--set {overrides[0]}: {expected}"


def test_combination_points_at_the_line_that_was_written_or_the_set() -> None:
    text = MINIMAL + "adapter:\n  kind: none\n"
    assert message(text).startswith("my.yaml:6: adapter.kind: none with model.storage: nf4")
    text = "adapter: {kind: none}\nmodel: {path: x, storage: none}\ndata: {train: x}\noutput: {dir: x}\n"
    assert message(text, "model.storage=fp4").startswith("--set model.storage=fp4: adapter.kind: none with")


def test_combination_of_a_part_points_at_the_set_that_wrote_the_whole() -> None:
    text = MINIMAL + "adapter:\n  targets: [attention]\n"
    override = "adapter.rank={attention: 4, experts: 8}"
    assert message(text, override) == (
        f"--set {override}: adapter.rank gives a value for 'experts', which adapter.targets does not list. Add or drop "
        "it."
    )


def test_several_combinations_are_all_listed() -> None:
    lines = message(MINIMAL, "adapter.kind=none", "train.optimizer=paged_adamw", "train.device=cpu").splitlines()
    assert len(lines) == 2


def test_combinations_hold_for_a_config_built_in_python() -> None:
    values: dict[str, Any] = {"model": {"path": "x"}, "data": {"train": "x"}, "output": {"dir": "x"}}
    assert Config.model_validate(values) == with_keys("model.path=x data.train=x output.dir=x")
    with pytest.raises(ValidationError, match="full fine-tuning needs unquantised weights"):
        Config.model_validate({**values, "adapter": {"kind": "none"}})


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.kind=none", "model.storage=none"],
        ["train.optimizer=paged_adamw"],
        ["train.optimizer=paged_adamw", "train.device=cuda:1"],
        ["data.sequence_length=7", "data.packing=false"],
        ["adapter.rank={attention: 8, experts: 4}", "adapter.alpha={attention: 8, experts: 2.5}"],
        # o_proj may or may not be the attention group's: that is for the model to say.
        ["adapter.targets=[o_proj, experts]", "adapter.rank={attention: 8, experts: 4}"],
        ["adapter.rank.attention=8", "adapter.rank.experts=2"],
        ["data.format=prompt_completion", "data.fields={prompt: question, completion: answer}"],
        ["data.eval_fraction=null"],
        ["train.resume=outputs/x/checkpoints/step-3"],
    ],
)
def test_allowed_combinations(overrides: list[str]) -> None:
    config = parse_config(MINIMAL, overrides)
    assert parse_config(dump_config(config)) == config
