"""The config: what is accepted, what every mistake is answered with, and that nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from quant.common.errors import NibbleError
from tests.config_helpers import MINIMAL, message, with_keys
from train.config.load import Config, check_files, config_schema, dump_config, load_config, parse_config
from train.config.schema import help_text, keys, required_keys
from train.config.sections import OPTIONAL, REQUIRED
from train.optim import NAMES

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def test_the_repository_has_the_documented_configs() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {"glm47_qlora", "glm47_qlora_attention", "glm47_lora_int8", "glm47_lora_bf16", "glm47_full"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_loads_and_round_trips(path: Path) -> None:
    config = load_config(path)
    assert parse_config(dump_config(config)) == config


def test_documented_defaults() -> None:
    config = with_keys("")
    assert (config.model.storage, config.model.double_quant, config.model.dtype) == ("nf4", True, "bfloat16")
    assert (config.adapter.kind, config.adapter.rank, config.adapter.alpha) == ("lora", 32, 16.0)
    assert config.adapter.targets == ("attention", "experts")
    assert (config.data.eval, config.data.eval_fraction, config.data.format) == (None, 0.1, "messages")
    assert (config.train.learning_rate, config.train.betas, config.train.eps) == (2e-4, (0.9, 0.999), 1e-8)
    assert (config.train.resume, config.train.device, config.train.tensorboard) == ("auto", None, True)
    assert (config.train.keep_checkpoints, config.data.on_bad_row) == (2, "skip")


def test_qlora_config_spells_out_the_defaults_but_for_bfloat16_lora() -> None:
    qlora = load_config(CONFIGS[0].parent / "glm47_qlora.yaml")
    overrides = [f"model.path={qlora.model.path}", "data.train=train.jsonl", f"output.dir={qlora.output.dir}"]
    overrides.append("adapter.dtype=bfloat16")
    assert qlora == parse_config(MINIMAL, overrides)


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        with_keys("").train.seed = 1


def test_unknown_key_names_line_and_nearest_key() -> None:
    text = MINIMAL + "train:\n  seed: 1\n  learning_rat: 1.0e-4\n"
    assert message(text) == "my.yaml:7: unknown key 'train.learning_rat'. Did you mean 'train.learning_rate'?"


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("trian: {seed: 1}", "unknown key 'trian'. Did you mean 'train'?"),
        ("max_steps: 3", "unknown key 'max_steps'. Did you mean 'train.max_steps'?"),
        ("lerning_rate: 3", "unknown key 'lerning_rate'. Did you mean 'train.learning_rate'?"),
        ("train: {rank: 8}", "unknown key 'train.rank'. Did you mean 'adapter.rank'?"),
        (
            "adapter: {zzz: 8}",
            "unknown key 'adapter.zzz'. The keys of adapter are kind, rank, alpha, targets, init_from, init_layout, "
            "rslora, layers, dtype, serve_with.",
        ),
        ("train.seed: 3", "'train.seed' is written with a dot in --set only; here it is train: {seed: …}"),
        ("qqqq: 8", "unknown key 'qqqq'. The sections are model, adapter, data, train, parallel, output."),
    ],
)
def test_unknown_key_suggestions(extra: str, expected: str) -> None:
    assert message(MINIMAL + extra + "\n") == f"my.yaml:5: {expected}"


def test_missing_keys_are_all_named() -> None:
    assert message("").splitlines() == [
        "my.yaml: missing key 'data.train' (File of training rows (.jsonl, .json or .csv, also with .gz, or "
        ".parquet), a glob, or a list of these)",
        "my.yaml: missing key 'model.path' (Hub id (zai-org/GLM-4.7-Flash), folder in the hub's format, or folder "
        "written by models.convert)",
        "my.yaml: missing key 'output.dir' (Folder for the adapter, checkpoints, metrics, plots and the resolved "
        "config)",
    ]
    assert message("model: {path: x}\ndata: {}\noutput: {dir: x}").startswith("my.yaml: missing key 'data.train'")


def test_section_with_everything_commented_out_is_empty() -> None:
    assert parse_config(MINIMAL + "train:\n  # seed: 3\nadapter: null\n") == parse_config(MINIMAL)
    assert "missing key 'output.dir'" in message("model: {path: x}\ndata: {train: x}\noutput:\n")


def test_duplicate_keys() -> None:
    text = MINIMAL + "train:\n  seed: 1\n  log_every: 2\n  seed: 3\nmodel: {}\n"
    assert message(text).splitlines() == [
        "my.yaml:8: duplicate key 'train.seed' (first on line 6)",
        "my.yaml:9: duplicate key 'model' (first on line 1)",
    ]


def test_several_mistakes_are_all_listed_in_file_order() -> None:
    text = MINIMAL + "train:\n  epochs: 0\n  sede: 3\n  seed: -1\nadapter:\n  rank: 1.5\n"
    lines = message(text, "train.log_every=often", "train.what=1").splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "my.yaml:6",
        "my.yaml:7",
        "my.yaml:8",
        "my.yaml:10",
        "--set train.log_every=often",
        "--set train.what=1",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_steps='3'", "train.max_steps: got the text '3', wanted an integer ≥ 1, or null"),
        ("train.max_steps=1.5", "train.max_steps: got 1.5, wanted an integer ≥ 1, or null"),
        ("train.seed=true", "train.seed: got true, wanted an integer ≥ 0"),
        ("train.epochs=0", "train.epochs: got 0, wanted an integer ≥ 1"),
        ("train.epochs=", "train.epochs: got null, wanted an integer ≥ 1"),
        ("train.learning_rate=0", "train.learning_rate: got 0, wanted a number > 0"),
        ("train.learning_rate=-2e-4", "train.learning_rate: got -0.0002, wanted a number > 0"),
        ("train.learning_rate=.nan", "train.learning_rate: got nan, wanted a number > 0"),
        ("train.learning_rate=.inf", "train.learning_rate: got inf, wanted a number > 0 and ≤ 1000.0"),
        ("train.learning_rate=1e400", "train.learning_rate: got inf, wanted a number > 0 and ≤ 1000.0"),
        ("train.seed=" + "9" * 5000, "train.seed: got inf, wanted an integer ≥ 0 and ≤ 4294967295"),
        ("train.learning_rate=nan", "train.learning_rate: got the text 'nan', wanted a number > 0"),
        ("train.warmup_ratio=1.5", "train.warmup_ratio: got 1.5, wanted a number ≥ 0 and ≤ 1"),
        ("train.warmup_ratio=-0.1", "train.warmup_ratio: got -0.1, wanted a number ≥ 0 and ≤ 1"),
        ("train.max_grad_norm=0", "train.max_grad_norm: got 0, wanted a number > 0, or null"),
        ("train.weight_decay=-1", "train.weight_decay: got -1, wanted a number ≥ 0"),
        ("train.betas=[0.9]", "train.betas: got the list [0.9], wanted a list of 2, each a number ≥ 0 and < 1"),
        ("train.betas=[0.9, 1]", "train.betas[1]: got 1, wanted a number ≥ 0 and < 1"),
        ("train.tensorboard=yes", "train.tensorboard: got the text 'yes', wanted true or false"),
        ("train.resume=false", "train.resume: got false, wanted auto, never or the folder of a checkpoint"),
        ("train.device=gpu", "train.device: got the text 'gpu', wanted cpu, cuda, cuda:N or null"),
        (
            "train.optimizer=adamw8bit",
            "train.optimizer: got the text 'adamw8bit', wanted one of adamw, adamw_8bit, paged_adamw, "
            "paged_adamw_8bit. Did you mean 'adamw_8bit'?",
        ),
        ("train.schedule=step", "train.schedule: got the text 'step', wanted one of constant, linear, cosine"),
        ("model.path=''", "model.path: got the text '', wanted non-empty text"),
        ("model.path=3", "model.path: got 3, wanted non-empty text"),
        (
            "model.dtype=float16",
            "model.dtype: float16 needs loss scaling, which is not supported; use bfloat16 or float32",
        ),
        ("model.double_quant=1", "model.double_quant: got 1, wanted true or false, or null"),
        (
            "adapter.rank=0",
            "adapter.rank: got 0, wanted an integer ≥ 1, or a mapping of name to an integer ≥ 1",
        ),
        (
            "adapter.rank=-4",
            "adapter.rank: got -4, wanted an integer ≥ 1, or a mapping of name to an integer ≥ 1",
        ),
        ("adapter.rank={attention: 8, experts: 0}", "adapter.rank.experts: got 0, wanted an integer ≥ 1"),
        ("adapter.alpha=0", "adapter.alpha: got 0, wanted a number > 0, or a mapping of name to a number > 0"),
        ("adapter.targets=experts", "adapter.targets: got the text 'experts', wanted a list, each non-empty text"),
        ("adapter.targets=[experts, 3]", "adapter.targets[1]: got 3, wanted non-empty text"),
        ("adapter.layers=[]", "adapter.layers: got the list [], wanted a non-empty list, each an integer ≥ 0, or null"),
        ("adapter.layers=[0, -1]", "adapter.layers[1]: got -1, wanted an integer ≥ 0"),
        ("data.eval_fraction=1", "data.eval_fraction: got 1, wanted a number > 0 and < 1, or null"),
        ("data.fields={prompt: 3}", "data.fields.prompt: got 3, wanted non-empty text"),
        ("data.fields=prompt", "data.fields: got the text 'prompt', wanted a mapping of name to non-empty text"),
        ("data.sequence_length=1", "data.sequence_length: got 1, wanted an integer ≥ 2"),
        (
            "data.format=message",
            "data.format: got the text 'message', wanted one of messages, prompt_completion, text. Did you mean "
            "'messages'?",
        ),
    ],
)
def test_wrong_value(override: str, expected: str) -> None:
    assert message(MINIMAL, override) == f"--set {override}: {expected}"


def test_wrong_type_names_the_line() -> None:
    text = MINIMAL + "adapter:\n  kind: lora\n  rank:\n    attention: 8\n    experts: x\n"
    assert message(text) == "my.yaml:9: adapter.rank.experts: got the text 'x', wanted an integer ≥ 1"
    text = MINIMAL + "adapter:\n  targets:\n    - attention\n    - 7\n"
    assert message(text) == "my.yaml:8: adapter.targets[1]: got 7, wanted non-empty text"


def test_section_that_is_no_mapping() -> None:
    expected = "my.yaml:5: output: got the text 'out', wanted a mapping of its keys (dir, expert_usage)"
    text = "model: {path: x}\ndata: {train: x}\n\n\noutput: out\n"
    assert message(text) == expected
    assert message(text, "output.dir=x") == expected


@pytest.mark.parametrize("text", ["- a\n- b\n", "hello\n"])
def test_document_that_is_no_mapping(text: str) -> None:
    assert message(text).endswith("wanted sections: model, adapter, data, train, parallel, output")


@pytest.mark.parametrize("storage", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("given", ["", "model.double_quant=null"])
def test_double_quant_follows_storage(storage: str, given: str) -> None:
    assert with_keys(f"model.storage={storage} {given}").model.double_quant is (storage in ("nf4", "fp4"))


def test_double_quant_can_be_switched_off_everywhere() -> None:
    assert not with_keys("model.double_quant=false").model.double_quant
    assert not with_keys("model.double_quant=false model.storage=int8").model.double_quant


def test_eval_file_replaces_the_fraction() -> None:
    data = with_keys("data.eval=held.jsonl").data
    assert (data.eval, data.eval_fraction) == ("held.jsonl", None)


def test_format_with_a_slash_is_understood() -> None:
    assert with_keys("data.format=prompt/completion").data.format == "prompt_completion"


def test_home_folder_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = ("model.path", "data.train", "data.eval", "adapter.init_from", "train.resume", "output.dir")
    config = parse_config(MINIMAL, [f"{key}=~/x" for key in paths])
    for key in paths:
        section, _, name = key.partition(".")
        assert getattr(getattr(config, section), name) == "/home/me/x", key


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(NibbleError, match=r"train\.yaml: not a text file in UTF-8 \(byte 3\)"):
        load_config(tmp_path / "train.yaml")
    with pytest.raises(NibbleError, match=r"trian\.yaml: no such file\. Did you mean .*/train\.yaml\?"):
        load_config(tmp_path / "trian.yaml")
    with pytest.raises(NibbleError, match="Is a directory"):
        load_config(tmp_path)


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = f"Relative paths start at the current directory ({tmp_path})."
    config = with_keys("data.eval=b.jsonl adapter.init_from=c train.resume=d")
    with pytest.raises(NibbleError) as caught:
        check_files(config)
    assert str(caught.value).splitlines() == [
        f"data.train: rows.jsonl: no such file. {here}",
        f"data.eval: b.jsonl: no such file. {here}",
        f"adapter.init_from: c: no such folder. {here}",
        f"train.resume: d: no such folder. {here}",
    ]
    for name in ("rows.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    for name in ("c", "d"):
        (tmp_path / name).mkdir()
    check_files(config)
    for name in ("rows.jsonl", "b.jsonl"):
        (tmp_path / name).unlink()
    check_files(config, rows=False)  # as a process that doesn't read them
    with pytest.raises(NibbleError, match=r"adapter\.init_from: e: no such folder"):
        check_files(with_keys("adapter.init_from=e"), rows=False)


def test_every_key_is_described_and_in_the_help() -> None:
    entries = keys(config_schema())
    shown = help_text(config_schema())
    sections = [getattr(with_keys(""), name) for name in Config.model_fields]
    assert len(entries) == sum(len(type(section).model_fields) for section in sections)
    for name, entry in entries.items():
        assert len(entry["description"]) > 20, name
        assert f"\n  {name}  (" in shown, name


def test_schema_is_complete_json() -> None:
    schema = config_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert required_keys(schema) == ["model.path", "data.train", "output.dir"]
    for section in schema["$defs"].values():
        assert section["additionalProperties"] is False
    for name, entry in keys(schema).items():
        assert "type" in entry or "anyOf" in entry, name
        assert ("default" in entry) != (name in required_keys(schema)), name


def test_choices_are_those_of_the_parts() -> None:
    assert tuple(keys(config_schema())["train.optimizer"]["enum"]) == NAMES


def test_fields_of_every_format() -> None:
    described = keys(config_schema())
    assert described["data.format"]["enum"] == list(REQUIRED)
    for name in (name for names in (*REQUIRED.values(), *OPTIONAL.values()) for name in names):
        assert name in described["data.fields"]["description"]
    config = with_keys("data.fields.messages=conversations data.fields.role=from data.fields.content=value")
    assert config.data.fields == {"messages": "conversations", "role": "from", "content": "value"}


@pytest.mark.parametrize("key", ["model.path", "adapter.init_from", "train.resume", "output.dir"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("a/" + "ä" * 128, "has a part of more than 255 bytes"),
        ("a\0b", "has a NUL character in it"),
        ("a/" * 2000, "is longer than a path may be"),
    ],
)
def test_names_that_no_file_can_have(key: str, value: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    values = {"model": {"path": "m"}, "data": {"train": str(tmp_path / "rows.jsonl")}, "output": {"dir": "out"}}
    section, name = key.split(".")
    values.setdefault(section, {})[name] = value
    with pytest.raises(NibbleError) as caught:
        check_files(Config.model_validate(values))
    assert str(caught.value).startswith(f"{key}: '") and reason in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["x" * 300 + ".yaml", "a\0b.yaml"])
def test_a_config_of_a_name_that_no_file_can_have(name: str) -> None:
    with pytest.raises(NibbleError, match=r"(File name too long|embedded null byte)$"):
        load_config(name)
