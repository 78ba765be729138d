"""Merged checkpoints: transformers computes with them what PEFT does with base and adapter; nothing else changes."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import load_model, merge_adapter
from models.checkpoint.conversion import convert
from models.checkpoint.hub import INDEX, SINGLE
from models.checkpoint.native import MANIFEST, Manifest, convert_command
from quant.common.errors import NibbleError
from quant.storage import StorageSpec
from tests.convert_helpers import contents
from tests.helpers import assert_close, random_tokens, relative_error
from tests.hub_forms import FORMS, save_form, tensors_in
from tests.merge_helpers import random_adapter, shard
from tests.peft_helpers import logits_of, peft_load

TOKENS = random_tokens((2, 40))
BESIDE = {
    "generation_config.json": '{"eos_token_id": [1, 2]}',
    "tokenizer.json": '{"tokens": "ü"}',
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}


@pytest.mark.parametrize("form", FORMS)
def test_transformers_computes_what_peft_does(tmp_path: Path, form: str) -> None:
    """Every group of matrices of every form of checkpoint, in float32; and what isn't adapted is as it was."""
    from transformers import AutoModelForCausalLM, Qwen3_5MoeForConditionalGeneration

    hub, out = tmp_path / "hub", tmp_path / "out"
    reference = save_form(hub, form)
    for name, text in BESIDE.items():
        (hub / name).parent.mkdir(exist_ok=True)
        (hub / name).write_text(text)
    adapted = random_adapter(hub, tmp_path / "adapter")
    theirs, _ = peft_load(reference, tmp_path / "adapter")
    expected = logits_of(theirs, TOKENS)
    merge_adapter(hub, tmp_path / "adapter", out)

    wrapped = form.startswith("vision-language")
    for class_ in (AutoModelForCausalLM, *([Qwen3_5MoeForConditionalGeneration] if wrapped else [])):
        loaded, info = class_.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] | info["mismatched_keys"], info
        assert_close(logits_of(loaded, TOKENS), expected, what=form)
    assert relative_error(expected, logits_of(reference, TOKENS)) > 1e-2
    before, after = tensors_in(hub), tensors_in(out)
    assert list(before) == list(after)
    assert {name for name, tensor in after.items() if not torch.equal(tensor, before[name])} == adapted
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in hub.iterdir())
    for name in ("config.json", *BESIDE):
        assert (out / name).read_bytes() == (hub / name).read_bytes(), name


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hub`, a bfloat16 checkpoint in three shards, and `adapter`, of all its groups."""
    folder = tmp_path_factory.mktemp("glm")
    save_form(folder / "hub", "glm4_moe_lite", torch.bfloat16, num_hidden_layers=3)
    shard(folder / "hub", 3)
    random_adapter(folder / "hub", folder / "adapter")
    return folder


def test_shards_keep_their_headers_and_merged_values_are_rounded_once(glm: Path, tmp_path: Path) -> None:
    merge_adapter(glm / "hub", glm / "adapter", tmp_path / "out")
    names = [path.name for path in sorted((glm / "hub").glob("*.safetensors"))]
    assert len(names) == 3 and names == [path.name for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    for name in names:
        before, after = ((folder / name).read_bytes() for folder in (glm / "hub", tmp_path / "out"))
        header = 8 + int.from_bytes(before[:8], "little")
        assert before[:header] == after[:header] and len(before) == len(after)
    assert (tmp_path / "out" / INDEX).read_bytes() == (glm / "hub" / INDEX).read_bytes()
    # The nearest bfloat16 of the exact sum, but for ties that float32's own rounding makes.
    adapter, before, after = (
        load_file(glm / "adapter" / "adapter_model.safetensors"),
        *map(tensors_in, (glm / "hub", tmp_path / "out")),
    )
    prefix = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_"
    a, b = (adapter[f"{prefix}{letter}.weight"].double() for letter in "AB")
    wrong = count = 0
    for expert in range(8):
        delta = 2.0 * b[:, expert::8] @ a[3 * expert : 3 * expert + 3]
        for part, rows in (("gate", slice(0, 64)), ("up", slice(64, 128))):
            name = f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight"
            exact = before[name].double() + delta[rows]
            wrong += int((after[name] != exact.to(torch.bfloat16)).sum())
            count += exact.numel()
    assert wrong <= count * 1e-3


@pytest.mark.parametrize("storage", ["nf4", "int8"])
def test_merged_into_what_the_training_saw(tmp_path: Path, storage: str) -> None:
    """The quantised base with the adapter on top, as one dense checkpoint; matrices that aren't adapted too."""
    hub = tmp_path / "hub"
    save_form(hub, "glm4_moe_lite", num_hidden_layers=2)
    random_adapter(hub, tmp_path / "adapter", ("experts",))
    model = load_model(hub, storage, "float32", adapter=tmp_path / "adapter")
    expected = logits_of(model, TOKENS)
    from transformers import AutoModelForCausalLM

    logits = {}
    for onto in ("base", "dequantised"):
        result = merge_adapter(
            hub, tmp_path / "adapter", tmp_path / onto, onto=onto, trained_with=storage  # type: ignore[arg-type]
        )  # fmt: skip
        logits[onto] = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / onto), TOKENS)
    assert_close(logits["dequantised"], expected)
    assert relative_error(logits["base"], expected) > 1e-3
    assert result.report[-1].startswith("merged into the dequantised base")


@pytest.mark.parametrize("onto", ["base", "dequantised"])
def test_a_converted_result_is_the_conversion_of_the_merged_folder(glm: Path, tmp_path: Path, onto: Any) -> None:
    options: dict[str, Any] = {"onto": onto, "trained_with": None if onto == "base" else "nf4"}
    merge_adapter(glm / "hub", glm / "adapter", tmp_path / "dense", **options)
    convert(tmp_path / "dense", tmp_path / "expected", StorageSpec("nf4"))
    result = merge_adapter(glm / "hub", glm / "adapter", tmp_path / "out", "nf4", **options)
    expected, found = contents(tmp_path / "expected"), contents(tmp_path / "out")
    first, second = (Manifest.load(tmp_path / name) for name in ("expected", "out"))
    for files in (expected, found):
        del files[MANIFEST]
    assert found == expected
    assert first.fingerprint == second.fingerprint, "the merged folder knows its converted copy"
    command = f"python -m models.merge {glm / 'hub'} {glm / 'adapter'} {tmp_path / 'out'}"
    option = "" if onto == "base" else " --onto dequantised --trained-with nf4"
    assert convert_command(second, tmp_path / "out") == f"{command}{option} --storage nf4"
    dense = merge_adapter(glm / "hub", glm / "adapter", tmp_path / "again", **options)
    assert result.errors == dense.errors
    assert_close(
        logits_of(load_model(tmp_path / "out", "nf4"), TOKENS).float(),
        logits_of(load_model(tmp_path / "dense", "nf4"), TOKENS).float(),
        tolerance=0.0,
    )


def test_the_quantisation_error_that_is_told(glm: Path, tmp_path: Path) -> None:
    """Against norms of whole matrices: bitsandbytes' round trip, and B·A by PEFT's layout."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    result = merge_adapter(glm / "hub", glm / "adapter", tmp_path / "out", trained_with="nf4-single")
    tensors, adapter = tensors_in(glm / "hub"), load_file(glm / "adapter" / "adapter_model.safetensors")
    error = delta = 0.0
    for expert in range(8):
        parts = [tensors[f"model.layers.2.mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")]
        for stack, matrix in (("base_layer.", torch.cat(parts[:2])), ("", parts[2])):
            packed, state = quantize_4bit(matrix.float(), blocksize=64, quant_type="nf4", compress_statistics=False)
            error += float((dequantize_4bit(packed, state) - matrix.float()).square().sum())
            prefix = f"base_model.model.model.layers.2.mlp.experts.{stack}lora_"
            a, b = (adapter[f"{prefix}{letter}.weight"] for letter in "AB")
            delta += float((2.0 * b[:, expert::8] @ a[3 * expert : 3 * expert + 3]).square().sum())
    row = next(row for row in result.errors if (row.layer, row.group) == (2, "experts"))
    assert row.error == pytest.approx(error**0.5, rel=1e-4) and row.delta == pytest.approx(delta**0.5, rel=1e-4)
    assert len(result.errors) == 3 + 1 + 3 * 2  # attention in three layers, a dense layer, and three groups in two
    assert len(result.report) == 3
    assert result.report[0].startswith("norms of the quantisation error (nf4, as given) beside the adapter's change: ")


def test_the_page_shows_what_is_said(glm: Path, tmp_path: Path) -> None:
    """docs/merge.md, but for the numbers, which are those of a longer training."""
    random_adapter(glm / "hub", tmp_path / "qlora" / "adapter", ("attention", "experts"), size=0.3)
    (config := tmp_path / "qlora" / "config.yaml").write_text("model: {storage: nf4}\n")
    said = merge_adapter(glm / "hub", tmp_path / "qlora" / "adapter", tmp_path / "out").report
    page = (Path(__file__).parents[3] / "docs" / "merge.md").read_text()
    shown = page[page.index("    norms of the quantisation error") :].partition("\n\n")[0]
    assert _masked(shown) == _masked("\n".join(said).replace(str(config), "outputs/demo/qlora/config.yaml"))


def _masked(text: str) -> str:
    return re.sub(r"(?<= )\d[\d.]*", "#", " ".join(text.split()))


def test_where_the_error_is_larger_it_is_advised(glm: Path, tmp_path: Path) -> None:
    for name, size in (("small", 1e-3), ("large", 1.0)):
        random_adapter(glm / "hub", tmp_path / name, ("attention",), size=size)
        report = merge_adapter(glm / "hub", tmp_path / name, tmp_path / f"{name}-out").report
        assert ("merge with --onto dequantised too" in report[2]) == (name == "small"), report
        assert report[1].startswith(f"the error is the larger in {3 if name == 'small' else 0} of 3 ")
    report = merge_adapter(glm / "hub", tmp_path / "small", tmp_path / "none", trained_with="none").report
    assert report == [
        "trained against the weights as they are (storage none, as given): there is no quantisation error"
    ]


def test_the_run_says_how_the_base_was_stored(glm: Path, tmp_path: Path) -> None:
    random_adapter(glm / "hub", tmp_path / "run" / "adapter", ("attention",))
    config = tmp_path / "run" / "config.yaml"
    for text, stored in (
        ("model:\n  storage: fp4\n  double_quant: false\n", f"fp4, as {config} says"),
        ("model: {storage: int8}\n", f"int8, as {config} says"),
        ("model: [", "nf4 with double quantisation, as none is known: --trained-with"),
        ("- 1\n", "nf4 with double quantisation, as none is known: --trained-with"),
    ):
        config.write_text(text)
        report = merge_adapter(glm / "hub", tmp_path / "run" / "adapter", tmp_path / "out").report
        assert f"({stored})" in report[0]
        shutil.rmtree(tmp_path / "out")


def test_shapes_that_nf4_cannot_hold(tmp_path: Path) -> None:
    """Then the base was not stored so, unless somebody says that it was."""
    save_form(tmp_path / "hub", "glm4_moe_lite", num_hidden_layers=2, moe_intermediate_size=24)
    random_adapter(tmp_path / "hub", tmp_path / "adapter")
    merge = partial(merge_adapter, tmp_path / "hub", tmp_path / "adapter", tmp_path / "out")
    for options in ({"trained_with": "nf4"}, {"trained_with": "nf4", "onto": "dequantised"}):
        with pytest.raises(NibbleError, match="nf4 stores blocks of 64 values"):
            merge(**options)
    assert merge().report == [
        "trained against the weights as they are (storage none, as its shapes can't be stored as nf4): there is no "
        "quantisation error"
    ]


def test_what_the_training_saw_has_to_be_known(glm: Path, tmp_path: Path) -> None:
    random_adapter(glm / "hub", tmp_path / "run" / "adapter", ("attention",))
    config, link = tmp_path / "run" / "config.yaml", tmp_path / "link"
    link.symlink_to(tmp_path / "run" / "adapter")
    for text, problem in (
        ("- 1\n", "isn't known"),
        ("model: {storage: none}\n", r"was not quantised \(as .*config\.yaml says\)"),
        ("model: {storage: nf4, double_quant: 'false'}\n", r"model\.double_quant is 'false'"),
        ("model: {storage: nf4, double_quant: 0}\n", r"model\.double_quant is 0"),
    ):
        config.write_text(text)
        with pytest.raises(NibbleError, match=problem):
            merge_adapter(glm / "hub", link, tmp_path / "out", onto="dequantised")
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_that_names_another_base(glm: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random_adapter(glm / "hub", tmp_path / "adapter", ("attention",))
    path = tmp_path / "adapter" / "adapter_config.json"
    for number, (named, told) in enumerate((("org/hub", False), ("org/Other-Model", True), (None, False))):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))
        caplog.clear()
        merge_adapter(glm / "hub", tmp_path / "adapter", tmp_path / f"out{number}")
        assert ("names org/Other-Model as its base" in caplog.text) == told


def test_an_adapter_that_has_diverged(glm: Path, tmp_path: Path) -> None:
    shutil.copytree(glm / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[max(tensors)].view(-1)[3] = float("nan")
    save_file(tensors, path)
    with pytest.raises(NibbleError, match=r"lora_B\.weight: some of its values are inf or NaN"):
        merge_adapter(glm / "hub", tmp_path / "adapter", tmp_path / "out")
    assert not list(tmp_path.glob("out*")), "refused before anything is written"


def test_quantization_config_goes(glm: Path, tmp_path: Path) -> None:
    """A dense checkpoint that was made of a quantised one, whose config still says so: others would decode it."""
    shutil.copytree(glm / "hub", tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    merge_adapter(tmp_path / "hub", glm / "adapter", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    merge_adapter(tmp_path / "hub", glm / "adapter", tmp_path / "nf4", "nf4")
    assert json.loads((tmp_path / "nf4" / "config.json").read_text()) == config


def test_float16_is_rounded_and_does_not_overflow(tmp_path: Path) -> None:
    from quant.common.errors import NibbleError

    save_form(tmp_path / "hub", "qwen3_moe", num_hidden_layers=1)
    tensors = {name: value.half() for name, value in tensors_in(tmp_path / "hub").items()}
    save_file(tensors, tmp_path / "hub" / SINGLE, {"format": "pt"})
    random_adapter(tmp_path / "hub", tmp_path / "adapter", ("attention",))
    merge_adapter(tmp_path / "hub", tmp_path / "adapter", tmp_path / "out")
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "out").values()} == {torch.float16}
    random_adapter(tmp_path / "hub", tmp_path / "far", ("attention",), size=1e3)
    with pytest.raises(
        NibbleError, match=r"with the adapter some of its values are inf or NaN in float16\.\nThe adapter"
    ):
        merge_adapter(tmp_path / "hub", tmp_path / "far", tmp_path / "other")
    assert not (tmp_path / "other").exists()
