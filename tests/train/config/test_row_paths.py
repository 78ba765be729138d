"""The files that data.train and data.eval name: one, globs, lists with weights."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from quant.common.errors import NibbleError
from train.config.load import Config, check_files, config_schema, dump_config, load_config, parse_config
from train.config.row_paths import RowFile, row_files
from train.config.schema import help_text
from train.state.fingerprint import resume_fingerprint

MINIMAL = "model: {path: some/model}\ndata: {train: rows.jsonl}\noutput: {dir: out}\n"
LISTS: list[tuple[str, Any]] = [
    ("a.jsonl", "a.jsonl"),
    ("'*.jsonl'", "*.jsonl"),
    ("[a.jsonl]", ["a.jsonl"]),
    ("[a.jsonl, '2e-4', {path: 'no', weight: 2}]", ["a.jsonl", "2e-4", {"path": "no", "weight": 2.0}]),
    ("[{path: ~/b.jsonl}]", [{"path": os.path.expanduser("~/b.jsonl"), "weight": 1.0}]),
]


def with_train(value: str) -> Config:
    return parse_config(MINIMAL, [f"data.train={value}"])


@pytest.mark.parametrize(("value", "expected"), LISTS)
@pytest.mark.parametrize("key", ["data.train", "data.eval"])
def test_files_round_trip_and_make_runs_differ(key: str, value: str, expected: Any) -> None:
    config = parse_config(MINIMAL, [f"{key}={value}"])
    name = key.removeprefix("data.")
    assert config.model_dump(mode="json")["data"][name] == expected, "a plain path stays one"
    assert parse_config(dump_config(config)) == config
    assert yaml.safe_load(dump_config(config))["data"][name] == expected
    other = parse_config(MINIMAL, [f"{key}=other.jsonl"])
    assert resume_fingerprint(config) == resume_fingerprint(other), "the content is compared, as of a single file"


@pytest.mark.parametrize(
    ("value", "place", "got"),
    [
        ("[]", "data.train", "the list []"),
        ("3", "data.train", "3"),
        ("{path: a}", "data.train", 'the mapping {"path": "a"}'),
        ("[a, 3]", "data.train[1]", "3"),
        ("[a, {weight: 2}]", "data.train[1]", 'the mapping {"weight": 2}'),
    ],
)
def test_what_is_no_file_is_one_error_of_its_key(value: str, place: str, got: str) -> None:
    with pytest.raises(NibbleError) as caught:
        with_train(value)
    assert str(caught.value) == (
        f"--set data.train={value}: {place}: got {got}, wanted a file, a glob, or a non-empty list of these, each a "
        "path or {path: …, weight: a number > 0}"
    )


def test_help_and_schema_know_the_list() -> None:
    assert "data.train  (required; a file, a glob, or a non-empty list of these" in help_text(config_schema())
    assert config_schema()["$defs"]["WeightedFile"]["required"] == ["path"]


def test_globs_and_lists_are_found_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.jsonl", "b/10.jsonl", "b/sub/3.jsonl", "c.jsonl", "[c].jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("b/folder.jsonl").mkdir()

    def names(value: str) -> list[str]:
        return [file.path for file in row_files(with_train(value).data.train, "data.train")]

    assert names("b/*.jsonl") == ["b/10.jsonl", "b/2.jsonl"]
    assert names("b/**/*.jsonl") == ["b/10.jsonl", "b/2.jsonl", "b/sub/3.jsonl"]
    assert names("[c.jsonl, b/*.jsonl]") == ["c.jsonl", "b/10.jsonl", "b/2.jsonl"]
    assert names("'[c].jsonl'") == ["[c].jsonl"], "a file with the characters of a pattern"
    weighted = row_files(with_train("[{path: b/*.jsonl, weight: 0.5}, c.jsonl]").data.train, "data.train")
    assert weighted == [RowFile("b/10.jsonl", 0.5), RowFile("b/2.jsonl", 0.5), RowFile("c.jsonl")]
    check_files(with_train("[c.jsonl, b/*.jsonl]"))
    for value, expected in (
        ("[c.jsonl, d.jsonl]", "d.jsonl: no such file. "),
        ("[c.jsonl, b]", "b is a folder; name its files, e.g. b/*.jsonl."),
        ("'b/*.json'", "b/*.json: no file matches. "),
        ("[c.jsonl, ./c.jsonl]", "./c.jsonl is named twice; a weight repeats its rows."),
        ("[b/2.jsonl, 'b/*.jsonl']", "b/2.jsonl is named twice; a weight repeats its rows."),
    ):
        with pytest.raises(NibbleError) as caught:
            check_files(with_train(value))
        assert str(caught.value).startswith(f"data.train: {expected}")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{path: a, weight: 0}", "data.train[0].weight: got 0, wanted a number > 0"),
        ("{path: a, weight: x}", "data.train[0].weight: got the text 'x', wanted a number > 0"),
        ("{path: [a]}", 'data.train[0].path: got the list ["a"], wanted non-empty text'),
        ("{path: a, weight: 2000}", "data.train[0].weight: got 2000, wanted a number > 0 and ≤ 1000"),
        ("{file: a}", "unknown key 'data.train[0].file'. Its keys are path, weight"),
    ],
)
def test_a_mistake_in_an_entry_names_what_is_wrong_with_it(entry: str, said: str) -> None:
    with pytest.raises(NibbleError, match=re.escape(said) + "$"):
        parse_config(f"model: {{path: a}}\ndata: {{train: [{entry}]}}\noutput: {{dir: a}}\n")


def test_a_config_with_no_end_and_one_with_thousands_of_mistakes(tmp_path: Path) -> None:
    with pytest.raises(NibbleError, match=r"^/dev/zero: not a config: it has more than 1,048,576 characters$"):
        load_config("/dev/zero")
    lines = [f"  k{number}: 1" for number in range(1000)]
    text = "model: {path: a}\ndata: {train: a}\noutput: {dir: a}\ntrain:\n" + "\n".join(lines)
    with pytest.raises(NibbleError) as caught:
        parse_config(text)
    found = str(caught.value).splitlines()
    assert (len(found), found[-1]) == (21, "… and 980 more")
