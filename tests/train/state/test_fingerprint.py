"""What a resumed run must share with its checkpoint, key by key."""

from __future__ import annotations

import json

import pytest

from train.config.load import Config, config_schema, parse_config
from train.config.schema import keys
from train.state.fingerprint import resume_differences, resume_fingerprint

MINIMAL = "model: {path: some/model}\ndata: {train: rows.jsonl}\noutput: {dir: out}\n"


def with_keys(overrides: str) -> Config:
    return parse_config(MINIMAL, overrides.split())


# A value other than the one in MINIMAL for each key that may not change.
CHANGES = {
    "model.storage": "int8",
    "model.double_quant": "false",
    "model.dtype": "float32",
    "adapter.kind": "none",
    "adapter.rank": "8",
    "adapter.alpha": "8",
    "adapter.targets": "[experts]",
    "adapter.init_from": "old",
    "adapter.init_layout": "expert-major",
    "adapter.rslora": "true",
    "adapter.layers": "[1]",
    "adapter.dtype": "bfloat16",
    "adapter.serve_with": "vllm",
    "data.eval_fraction": "0.2",
    "data.format": "text",
    "data.fields": "{messages: chat}",
    "data.template_variables": "{enable_thinking: false}",
    "data.sequence_length": "512",
    "data.packing": "false",
    "train.micro_batch_size": "1",
    "train.gradient_accumulation": "1",
    "train.epochs": "2",
    "train.max_steps": "7",
    "train.optimizer": "adamw",
    "train.learning_rate": "1e-4",
    "train.schedule": "linear",
    "train.warmup_ratio": "0.2",
    "train.weight_decay": "0.1",
    "train.max_grad_norm": "null",
    "train.betas": "[0.9, 0.95]",
    "train.eps": "1e-6",
    "train.seed": "1",
    "train.balance": "aux_loss",
    "train.balance_rate": "0.1",
}
# Of the first three the content counts, which train.run compares.
FREE = {
    "model.path": "other",
    "data.train": "other.jsonl",
    "data.eval": "held.jsonl",
    "data.on_bad_row": "error",
    "train.activation_checkpointing": "false",
    "train.kernels": "torch",
    "train.cuda_graph": "off",
    "train.log_every": "7",
    "train.eval_every": "7",
    "train.keep_best": "true",
    "train.patience": "7",
    "train.patience_delta": "7",
    "train.save_every": "7",
    "train.save_minutes": "7",
    "train.save_async": "true",
    "train.keep_checkpoints": "7",
    "train.resume": "never",
    "train.device": "cpu",
    "train.tensorboard": "false",
    "parallel.shard": "2",
    "parallel.expert": "2",
    "parallel.replicate": "2",
    "parallel.reshard_after_forward": "false",
    "parallel.cpu_offload": "true",
    "parallel.lost_after": "7",
    "output.dir": "elsewhere",
    "output.expert_usage": "5",
}


def test_every_key_is_either_fixed_or_free_on_resume() -> None:
    assert CHANGES.keys() | FREE.keys() == keys(config_schema()).keys()
    assert not CHANGES.keys() & FREE.keys()


@pytest.mark.parametrize("key", CHANGES)
def test_resume_names_the_key_that_changed(key: str) -> None:
    companions = {
        "adapter.kind": ["model.storage=none"],
        "adapter.init_layout": ["adapter.init_from=old"],
        "train.balance_rate": ["train.balance=aux_loss"],
    }
    companion = companions.get(key, [])
    before = resume_fingerprint(parse_config(MINIMAL, companion))
    after = resume_fingerprint(parse_config(MINIMAL, [*companion, f"{key}={CHANGES[key]}"]))
    assert any(line.startswith(f"{key} is ") for line in resume_differences(before, after))


@pytest.mark.parametrize("key", FREE)
def test_keys_that_may_change_on_resume(key: str) -> None:
    companions = {
        "data.eval": ["data.eval=some.jsonl"],
        "train.keep_best": ["train.eval_every=5"],
        "train.patience": ["train.eval_every=5"],
        "train.patience_delta": ["train.eval_every=5", "train.patience=2"],
    }
    companion = companions.get(key, [])
    before = parse_config(MINIMAL, companion)
    after = parse_config(MINIMAL, [*companion, f"{key}={FREE[key]}"])
    assert resume_differences(resume_fingerprint(before), resume_fingerprint(after)) == []


def test_resume_differences_read_well_and_survive_json() -> None:
    before = json.loads(json.dumps(resume_fingerprint(with_keys("train.max_steps=5"))))
    after = resume_fingerprint(with_keys("train.max_steps=5 train.learning_rate=1e-3 train.max_grad_norm=null"))
    assert resume_differences(before, after) == [
        "train.learning_rate is 0.001 now, 0.0002 there",
        "train.max_grad_norm is null now, 1.0 there",
    ]
    assert resume_differences({"train.seed": 0, "train.old": 1}, {"train.seed": 0}) == [
        "train.old is not set now, 1 there"
    ]


def test_length_of_the_run_matters_only_where_the_schedule_uses_it() -> None:
    constant = "train.schedule=constant train.warmup_ratio=0 "
    short, long = (resume_fingerprint(with_keys(constant + f"train.max_steps={n}")) for n in (5, 9))
    assert resume_differences(short, long) == []
    # max_steps goes before epochs, which is then not used.
    one, two = (resume_fingerprint(with_keys(f"train.max_steps=5 train.epochs={n}")) for n in (1, 2))
    assert resume_differences(one, two) == []


def test_adapter_keys_do_not_count_without_an_adapter() -> None:
    full = "adapter.kind=none model.storage=none "
    one, two = (resume_fingerprint(with_keys(full + f"adapter.rank={n}")) for n in (1, 2))
    assert resume_differences(one, two) == []
