"""The config of a run on several processes: section `parallel`, and the keys that mean more with it."""

from __future__ import annotations

import pytest

from quant.common.errors import NibbleError
from train.config.load import Config, config_schema, dump_config, parse_config
from train.config.schema import help_text, keys

MINIMAL = "model: {path: some/model}\ndata: {train: rows.jsonl}\noutput: {dir: out}\n"


def with_keys(overrides: str) -> Config:
    return parse_config(MINIMAL, overrides.split())


def wrong(*overrides: str) -> str:
    with pytest.raises(NibbleError) as caught:
        parse_config(MINIMAL, overrides, name="my.yaml")
    return str(caught.value)


def test_defaults_are_those_of_one_process() -> None:
    parallel = with_keys("").parallel
    assert (parallel.shard, parallel.expert, parallel.replicate) == (None, 1, 1)
    assert (parallel.reshard_after_forward, parallel.cpu_offload, parallel.lost_after) == (True, False, 20.0)
    assert with_keys("").train.save_async is False


def test_the_section_is_read_and_written() -> None:
    text = MINIMAL + "parallel: {shard: 4, expert: 2, replicate: 1, lost_after: 10}\ntrain: {save_async: true}\n"
    config = parse_config(text, ["parallel.cpu_offload=true", "parallel.reshard_after_forward=false"])
    parallel = config.parallel
    assert (parallel.shard, parallel.expert, parallel.replicate, parallel.lost_after) == (4, 2, 1, 10.0)
    assert parallel.cpu_offload and not parallel.reshard_after_forward and config.train.save_async
    assert parse_config(dump_config(config)) == config
    assert "parallel:\n  shard: 4\n  expert: 2\n" in dump_config(config)
    assert "parallel:\n  shard: null\n  expert: 1\n" in dump_config(with_keys(""))


def test_help_shows_the_section_with_its_defaults() -> None:
    shown = help_text(config_schema(), width=200)
    assert "\nparallel: how a run is spread over the processes that torchrun starts" in shown
    assert "\n  parallel.shard  (default null; an integer ≥ 1, or null)\n" in shown
    assert "\n  parallel.lost_after  (default 20.0; a number > 0)\n" in shown
    assert "\n  train.save_async  (default false; true or false)\n" in shown


@pytest.mark.parametrize("key", ["train.micro_batch_size", "train.gradient_accumulation"])
def test_the_batch_is_said_to_be_that_of_all_processes(key: str) -> None:
    assert "process" in keys(config_schema())[key]["description"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.shard=0", "parallel.shard: got 0, wanted an integer ≥ 1, or null"),
        ("parallel.shard=2.0", "parallel.shard: got 2.0, wanted an integer ≥ 1, or null"),
        ("parallel.expert=0", "parallel.expert: got 0, wanted an integer ≥ 1"),
        ("parallel.replicate=null", "parallel.replicate: got null, wanted an integer ≥ 1"),
        ("parallel.reshard_after_forward=2", "parallel.reshard_after_forward: got 2, wanted true or false"),
        ("parallel.cpu_offload=yes", "parallel.cpu_offload: got the text 'yes', wanted true or false"),
        ("parallel.lost_after=0", "parallel.lost_after: got 0, wanted a number > 0"),
        ("train.save_async=1", "train.save_async: got 1, wanted true or false"),
        ("parallel.experts=2", "unknown key 'parallel.experts'. Did you mean 'parallel.expert'?"),
        ("parallel.replicas=2", "unknown key 'parallel.replicas'. Did you mean 'parallel.replicate'?"),
        ("parallel=2", "'parallel' is a section; set one of its keys, as in --set parallel.shard=…"),
    ],
)
def test_wrong_value(override: str, expected: str) -> None:
    assert wrong(override) == f"--set {override}: {expected}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.optimizer=paged_adamw", "parallel.cpu_offload=true"],
            "train.optimizer: paged_adamw with parallel.cpu_offload: true: its state is in host memory already and "
            "there is nothing to page. Set train.optimizer: adamw, or parallel.cpu_offload: false.",
        ),
        (
            ["train.device=cuda:1", "parallel.shard=4"],
            "train.device: cuda:1 with parallel.shard: 4: several processes can't share one GPU; each takes one of its "
            "own. Set train.device: cuda (or leave it out).",
        ),
        (
            ["train.device=cuda:0", "parallel.expert=2", "parallel.replicate=2"],
            "train.device: cuda:0 with parallel.expert: 2: several processes can't share one GPU; each takes one of "
            "its own. Set train.device: cuda (or leave it out).",
        ),
    ],
)
def test_wrong_combination_names_both_keys_and_the_fix(overrides: list[str], expected: str) -> None:
    assert wrong(*overrides) == f"--set {overrides[0]}: {expected}"


@pytest.mark.parametrize(
    "overrides",
    [
        "train.optimizer=adamw_8bit parallel.cpu_offload=true",
        "train.optimizer=paged_adamw_8bit parallel.shard=4",
        "train.device=cuda:1 parallel.shard=1",
        "train.device=cuda:1 parallel.cpu_offload=true",
        "train.device=cuda parallel.shard=4",
        "train.device=cpu parallel.replicate=2 parallel.shard=2 parallel.cpu_offload=true",
        "parallel.shard=null parallel.expert=8",
    ],
)
def test_allowed_combinations(overrides: str) -> None:
    config = with_keys(overrides)
    assert parse_config(dump_config(config)) == config
