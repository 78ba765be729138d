"""The config: what is accepted, what every mistake is answered with, and that nothing is lost on the way."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from quant.common.errors import NibbleError
from train.config import foreign as foreign_keys
from train.config.load import Config, check_files, config_schema, dump_config, load_config, parse_config
from train.config.schema import help_text, keys, required_keys
from train.config.sections import OPTIONAL, REQUIRED, OutputConfig
from train.config.yaml_text import read_text
from train.optim import NAMES

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))

MINIMAL = """\
model: {path: some/model}
data:
  train: rows.jsonl
output: {dir: out}
"""


def message(text: str, *overrides: str) -> str:
    with pytest.raises(NibbleError) as caught:
        parse_config(text, overrides, name="my.yaml")
    return str(caught.value)


def with_keys(overrides: str) -> Config:
    return parse_config(MINIMAL, overrides.split())


def wrong(*overrides: str) -> str:
    """The message for overrides of a config that is right without them, less the place."""
    return message(MINIMAL, *overrides).split(": ", 1)[1]


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


def test_qlora_config_spells_out_the_defaults() -> None:
    qlora = load_config(CONFIGS[0].parent / "glm47_qlora.yaml")
    overrides = [f"model.path={qlora.model.path}", "data.train=train.jsonl", f"output.dir={qlora.output.dir}"]
    assert qlora == parse_config(MINIMAL, overrides)


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        with_keys("").train.seed = 1


# --- unknown, missing and duplicate keys -------------------------------------------------------------------------


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
            "unknown key 'adapter.zzz'. The keys of adapter are kind, rank, alpha, targets, init_from, rslora, layers, "
            "dtype.",
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


# --- wrong types and values --------------------------------------------------------------------------------------


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
    expected = "my.yaml:5: output: got the text 'out', wanted a mapping of its keys (dir)"
    text = "model: {path: x}\ndata: {train: x}\n\n\noutput: out\n"
    assert message(text) == expected
    assert message(text, "output.dir=x") == expected


@pytest.mark.parametrize("text", ["- a\n- b\n", "hello\n"])
def test_document_that_is_no_mapping(text: str) -> None:
    assert message(text).endswith("wanted sections: model, adapter, data, train, parallel, output")


# --- combinations ------------------------------------------------------------------------------------------------

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


# --- values that depend on others --------------------------------------------------------------------------------


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


# --- YAML --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "2E-4", "0.0002", "2.e-4", ".0002", "+2e-4"])
def test_numbers_with_exponents(text: str) -> None:
    assert parse_config(MINIMAL + f"train:\n  learning_rate: {text}\n").train.learning_rate == 2e-4
    assert with_keys(f"train.learning_rate={text}").train.learning_rate == 2e-4


@pytest.mark.parametrize(("text", "value"), [("010", 10), ("0x10", 16), ("0o17", 15), ("+3", 3)])
def test_integers_are_those_of_yaml_1_2(text: str, value: int) -> None:
    assert with_keys(f"train.seed={text}").train.seed == value


@pytest.mark.parametrize("text", ["no", "on", "1:30", "2024-01-01", "1_000", "a: b", "it's", "é", "x # y"])
def test_text_stays_text(text: str) -> None:
    quoted = text if re.fullmatch(r"[-\w:é]+", text) else '"' + text + '"'
    config = parse_config(MINIMAL.replace("out}", f"{quoted}}}"))
    assert config.output.dir == text
    assert parse_config(dump_config(config)).output.dir == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  path: a\n storage: nf4\n", "my.yaml:3: not valid YAML: "),
        ("model: {path: a\ndata: {train: b}\n", "my.yaml:2: not valid YAML: "),
        ("model:\n\tpath: a\n", "my.yaml:2: not valid YAML: "),
        ("model: {}\n---\nmodel: {}\n", "my.yaml:2: not valid YAML: "),
        ("model: *x\n", "my.yaml:1: not valid YAML: "),
        ("model: \x00\n", "my.yaml: not valid YAML: "),
        ("model: &m {path: *m}\n", "my.yaml:1: the YAML alias in 'model.path' contains itself"),
        ("model: " + "[" * 3000, "my.yaml: not a config: lists or mappings are nested more than 20 deep"),
    ],
)
def test_yaml_syntax_error_names_the_line(text: str, expected: str) -> None:
    said = message(text)
    assert said.startswith(expected)
    assert "\n" not in said


@pytest.mark.parametrize(
    "text",
    [
        # 236 bytes, of which each level has nine of the level before: 9^9 values.
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi")),
        "a: [" + "x," * 10_001 + "]",
        "a: &a {" + ",".join(f"k{i}: 1" for i in range(100)) + "}\nb: [" + ",".join(["*a"] * 101) + "]",
    ],
    ids=["aliases of aliases", "a list", "aliases"],
)
def test_more_values_than_a_config_has(text: str) -> None:
    assert message(text) == "my.yaml: not a config: more than 10,000 values, with those of aliases"


def test_a_file_that_is_no_config() -> None:
    assert message("#" * 2**21) == "my.yaml: not a config: it has 2,097,152 characters"
    deep = "[" * 21 + "]" * 21
    assert message(f"model: {deep}") == "my.yaml: not a config: lists or mappings are nested more than 20 deep"
    with pytest.raises(NibbleError, match=r"^--set data\.fields=\[\[.*: not a config: lists or mappings are nested"):
        parse_config(MINIMAL, [f"data.fields={deep}"])
    assert "is not valid Unicode: '\\udc80'" in message(MINIMAL.replace("out}", r'"\udc80"}'))


@pytest.mark.parametrize("value", ["1e400", "1e308", str(10**30), "-1e400", "0x" + "f" * 5000])
def test_every_number_has_bounds(value: str) -> None:
    """Or the run fails where it is first computed with: after hours, or with a traceback."""
    found = 0
    for key, entry in keys(config_schema()).items():
        kinds = {choice.get("type") for choice in entry.get("anyOf", [entry])}
        if not kinds & {"integer", "number"}:
            continue
        found += 1
        with pytest.raises(NibbleError) as caught:
            parse_config(MINIMAL, [f"{key}={value}"])
        said = str(caught.value).partition(f"{key}={value}: ")[2]
        assert re.match(rf"{re.escape(key)}: got (-?inf|1e\+308|10+), wanted ", said), caught.value
        assert len(said) < 200
    assert found > 20


def test_yaml_tags_and_keys_that_are_no_names() -> None:
    tagged = MINIMAL.replace("some/model", "!!python/name:os.system x")
    assert "my.yaml:1: 'model.path' has a YAML tag; plain values only" in message(tagged)
    assert "my.yaml:5: a key must be a name, not a list or a mapping" in message(MINIMAL + "? [a]\n: 3\n")


def test_aliases_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufeff" + MINIMAL.replace("out}", "&x out}") + "adapter: {init_from: *x}\n", encoding="utf-8")
    assert load_config(path).adapter.init_from == "out"


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


# --- --set -------------------------------------------------------------------------------------------------------


def test_overrides_go_before_the_file_and_the_last_one_wins() -> None:
    text = MINIMAL + "train: {seed: 1, log_every: 5}\n"
    train = parse_config(text, ["train.seed=2", "train.seed=3"]).train
    assert (train.seed, train.log_every) == (3, 5)


def test_overrides_are_yaml() -> None:
    overrides = ["adapter.targets=[o_proj]", "data.format=text", "data.fields={text: body}", "train.max_grad_norm=null"]
    config = parse_config(MINIMAL, overrides)
    assert config.adapter.targets == ("o_proj",)
    assert config.data.fields == {"text": "body"}
    assert config.train.max_grad_norm is None


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_stpes=3", "unknown key 'train.max_stpes'. Did you mean 'train.max_steps'?"),
        ("trian.max_steps=3", "unknown key 'trian.max_steps'. Did you mean 'train.max_steps'?"),
        ("max_steps=3", "unknown key 'max_steps'. Did you mean 'train.max_steps'?"),
        ("train.max_steps.x=3", "unknown key 'train.max_steps.x'. Did you mean 'train.max_steps'?"),
        ("adapter.targets.0=x", "unknown key 'adapter.targets.0'. Did you mean 'adapter.targets'?"),
        ("train.max_steps", "expected KEY=VALUE, as in --set train.max_steps=3"),
        ("=3", "expected KEY=VALUE, as in --set train.max_steps=3"),
        ("train={seed: 3}", "'train' is a section; set one of its keys, as in --set train.micro_batch_size=…"),
        (
            "data.fields={a: 1",
            "not valid YAML: while parsing a flow mapping; expected ',' or '}', but got '<stream end>'",
        ),
        ("data.fields={a: b, a: c}", "duplicate key 'a' (first on line 1)"),
        ("data.fields={a: !b c}", "'a' has a YAML tag; plain values only"),
        ("data.fields=&a {a: *a}", "the YAML alias in 'a' contains itself"),
    ],
)
def test_wrong_override(override: str, expected: str) -> None:
    assert message(MINIMAL, override) == f"--set {override}: {expected}"


def test_override_inside_a_value_that_is_no_mapping() -> None:
    said = message(MINIMAL + "adapter: {rank: 8}\n", "adapter.rank.experts=4")
    assert said == (
        "--set adapter.rank.experts=4: adapter.rank is not a mapping here; set it whole: --set 'adapter.rank={experts: "
        "…}'"
    )


# --- files -------------------------------------------------------------------------------------------------------


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


# --- dump, help, schema ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["2e-4", "0o7", "no", "null", "~", "3", "a: b", "- x", "#", "é😀", "a\nb\t", " x ", "'\"\\"]
)
def test_dump_keeps_every_text(text: str) -> None:
    config = with_keys("").model_copy(update={"output": OutputConfig(dir=text)})
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize("value", [1e-8, 2e-4, 1e22, 0.1, 1.0, 1.2345678901234567e-5])
def test_dump_keeps_every_number(value: float) -> None:
    train = with_keys("").train.model_copy(update={"learning_rate": value})
    written = dump_config(with_keys("").model_copy(update={"train": train}))
    assert read_text(written, "").values["train"]["learning_rate"] == value


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
