"""YAML in and out, and --set: which value a text is, where a mistake stands, what is bounded."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from quant.common.errors import NibbleError
from tests.config_helpers import MINIMAL, message, with_keys
from train.config.load import config_schema, dump_config, load_config, parse_config
from train.config.schema import keys
from train.config.sections import OutputConfig
from train.config.yaml_text import read_text


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
    assert message("#" * 2**21) == "my.yaml: not a config: it has more than 1,048,576 characters"
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
