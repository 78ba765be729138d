"""Keys of other tools get the name of ours."""

from __future__ import annotations

import pytest
import yaml

from tests.config_helpers import MINIMAL, message
from train.config import foreign as foreign_keys
from train.config.load import Config, config_schema
from train.config.schema import keys


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("lora_r", "adapter.rank"),
        ("adapter.r", "adapter.rank"),
        ("lora_alpha", "adapter.alpha"),
        ("adapter.target_modules", "adapter.targets"),
        ("train.fp16", "model.dtype: bfloat16 (float16 would need loss scaling)"),
        ("model.bf16", "model.dtype: bfloat16"),
        ("load_in_4bit", "model.storage: nf4"),
        ("model.load_in_8bit", "model.storage: int8"),
        ("lr", "train.learning_rate"),
        ("train.batch_size", "train.micro_batch_size"),
        ("train.per_device_train_batch_size", "train.micro_batch_size"),
        ("num_epochs", "train.epochs"),
        ("train.num_train_epochs", "train.epochs"),
        ("train.warmup_steps", "train.warmup_ratio, a share of the steps"),
        ("data.max_seq_length", "data.sequence_length"),
        ("train.gradient-checkpointing", "train.activation_checkpointing"),
        ("output_dir", "output.dir"),
    ],
)
def test_keys_of_other_tools(key: str, ours: str) -> None:
    expected = f"unknown key '{key}'. Here that is {ours}."
    assert message(MINIMAL, f"{key}=1") == f"--set {key}=1: {expected}"
    section, _, leaf = key.rpartition(".")
    text = yaml.safe_load(MINIMAL)
    (text.setdefault(section, {}) if section else text)[leaf] = 1
    assert expected in message(yaml.safe_dump(text))


def test_keys_of_other_tools_name_keys_that_there_are() -> None:
    known = {*keys(config_schema()), *Config.model_fields}
    for foreign, ours in foreign_keys._OF.items():
        assert ours.partition(":")[0].partition(" ")[0].rstrip(",") in known, foreign
        assert foreign not in {key.partition(".")[2] for key in known}, f"{foreign} is a key of our own"
    assert not foreign_keys._OF.keys() & foreign_keys._NONE.keys()
    assert message(MINIMAL, "adapter.lora_dropout=0.1").endswith("There is no dropout here; leave it out.")
