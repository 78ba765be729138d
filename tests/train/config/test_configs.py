"""The configs that come with the project: what their headers promise, and a run of each at a tiny size."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.targets import AdapterSpec, adaptable, groups_of, resolve
from models.checkpoint.conversion import count_parameters
from models.checkpoint.keymap import KeyMap
from models.decoder import CausalLM
from models.experts.block import Experts
from models.registry import ARCHITECTURES, architecture_for
from parallel.mesh import MeshSizes
from parallel.plan import cuts
from quant.storage import StorageSpec
from tests.helpers import key_map_for
from train.__main__ import main
from train.config.load import dump_config, load_config, parse_config
from train.demo import __main__ as demo
from train.demo.models import MODELS
from train.output.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("nothing_drawn")
ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TINY = [path for path in CONFIGS if "_tiny_" in path.stem]
CUT = [path for path in CONFIGS if path.stem.endswith("_qlora_fsdp")]  # for several processes
REAL = [path for path in CONFIGS if path not in (*TINY, *CUT) and path.stem != "tiny_fsdp"]

# What the published config.json says where the parser's defaults are another model's.
_TRINITY = {"model_type": "afmoe", "num_dense_layers": 2, "num_experts": 128, "num_experts_per_tok": 8}
PUBLISHED: dict[str, dict[str, Any]] = {
    "zai-org/GLM-4.7-Flash": {"model_type": "glm4_moe_lite"},
    "zai-org/GLM-4.5-Air": {"model_type": "glm4_moe", "head_dim": 128, "attention_bias": True},
    "Qwen/Qwen3-30B-A3B": {"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128},
    "Qwen/Qwen3.5-35B-A3B": {"model_type": "qwen3_5_moe", "text_config": {}},
    "arcee-ai/Trinity-Nano-Preview": {
        **_TRINITY,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 256,
        "num_attention_heads": 8,
        "num_hidden_layers": 56,
        "num_key_value_heads": 2,
        "num_shared_experts": 1,
    },
    "arcee-ai/Trinity-Mini": {
        **_TRINITY,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 1024,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 4,
        "num_shared_experts": 1,
    },
}
PARAMETERS = {
    "zai-org/GLM-4.7-Flash": 29_943_390_976,
    "zai-org/GLM-4.5-Air": 106_852_245_504,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "Qwen/Qwen3.5-35B-A3B": 34_660_610_688,
    "arcee-ai/Trinity-Nano-Preview": 6_120_003_328,
    "arcee-ai/Trinity-Mini": 26_123_974_400,
}
BYTES = {"bfloat16": 2, "float32": 4}


@functools.cache
def key_map_of(hub_id: str) -> KeyMap:
    architecture = architecture_for(PUBLISHED[hub_id], hub_id)
    return key_map_for(architecture.build_model, architecture.parse_config(PUBLISHED[hub_id], hub_id))


@functools.cache
def gib_of(hub_id: str, spec: StorageSpec) -> str:
    """The size of the weights on the meta device, buffers included, with one decimal."""
    architecture = architecture_for(PUBLISHED[hub_id], hub_id)
    config = architecture.parse_config(PUBLISHED[hub_id], hub_id)
    model: CausalLM = architecture.build(config, spec, torch.bfloat16, "meta")
    return f"{sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) / 2**30:.1f}"


def comment_of(path: Path) -> str:
    """The words at the head of a config, in one line."""
    lines = [line for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if line.startswith("#")]
    return " ".join(line.removeprefix("#").strip() for line in lines)


def named(path: Path) -> str:
    return path.stem


def test_each_model_has_the_configs_that_the_readme_lists() -> None:
    models = ("glm47", "glm45_air", "qwen3_30b", "qwen35", "trinity_nano", "trinity_mini")
    assert {path.stem for path in REAL} >= {f"{model}_{kind}" for model in models for kind in ("qlora", "lora_int8")}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in REAL:
        assert f"](configs/{path.name})" in readme, path.name


@pytest.mark.parametrize("model_type", MODELS)
def test_the_readme_names_the_groups_of_each_model(model_type: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{model_type}` \|.*\| ([^|]*) \|$", readme, re.M)
    assert row is not None
    architecture = architecture_for(MODELS[model_type].config, model_type)
    key_map = key_map_for(architecture.build_model, architecture.parse_config(MODELS[model_type].config, model_type))
    assert re.findall(r"`(\w+)`", row[1]) == groups_of(adaptable(key_map))


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_the_readme_states_the_size_in_nf4(hub_id: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{PUBLISHED[hub_id]['model_type']}` \|.*\| ([^|]*) \|[^|]*\|$", readme, re.M)
    assert row is not None and gib_of(hub_id, StorageSpec("nf4", True)) in re.findall(r"[\d.]+", row[1])


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_the_published_sizes_are_those_of_the_models(hub_id: str) -> None:
    assert count_parameters(key_map_of(hub_id).keys) == PARAMETERS[hub_id]


@pytest.mark.parametrize("path", REAL, ids=named)
def test_header_and_tables_state_what_the_sizes_give(path: Path) -> None:
    config, comment = load_config(path), comment_of(path)
    assert f"python -m train --config configs/{path.name} " in comment
    assert config.output.dir == f"outputs/{path.stem.replace('_', '-')}"
    stated = re.search(r"[Ww]eights:? ([\d.]+) GiB", comment)
    assert stated is not None
    double = config.model.double_quant
    spec = StorageSpec(config.model.storage, double) if double is not None else StorageSpec(config.model.storage)
    assert stated[1] == gib_of(config.model.path, spec)

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"\({re.escape(f'configs/{path.name}')}\) \| \w+, ([\d.]+) GiB \|", readme)
    assert (row is None) == (config.adapter.kind == "none")
    assert row is None or row[1] == stated[1]

    if config.adapter.kind == "none":
        return
    adapter = config.adapter
    spec_of_lora = AdapterSpec(adapter.targets, adapter.rank, adapter.alpha)
    targets = resolve(key_map_of(config.model.path), spec_of_lora, "model")
    parameters = sum(
        target.rank * sum(target.key.shape[-2:]) * (target.key.shape[0] if len(target.key.shape) == 3 else 1)
        for target in targets
    )
    # A value and its gradient; two moments of a byte, with a float32 scale for 256 of them.
    each = 2 * BYTES[adapter.dtype] + 2 * (1 + 4 / 256)
    assert config.train.optimizer == "adamw_8bit"
    gib = f"{parameters * each / 2**30:.1f}"
    trained = re.search(r"LoRA ([\d,]+) parameters, ([\d.]+) GiB with gradients and the 8-bit", comment)
    assert (trained is not None) == (config.model.path != "zai-org/GLM-4.7-Flash")
    assert trained is None or trained.groups() == (f"{parameters:,}", gib)

    total = float(stated[1]) + float(gib)
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    row = re.search(
        rf"^\| {path.stem} \| {stated[1]} GiB \| {gib} GiB \| {total:.1f} GiB \| (\d+) GB", performance, re.M
    )
    assert row is not None and total < int(row[1]) * 1e9 / 2**30


@pytest.mark.parametrize("path", [*REAL, *CUT], ids=named)
def test_every_target_is_there_at_the_real_size(path: Path) -> None:
    config = load_config(path)
    if config.adapter.kind == "none":
        return
    key_map = key_map_of(config.model.path)
    model_type = PUBLISHED[config.model.path]["model_type"]
    targets = resolve(key_map, AdapterSpec(config.adapter.targets, config.adapter.rank, 1), model_type)
    found = {target.key.group for target in targets}
    assert found == set(config.adapter.targets)
    layers = {re.search(r"layers\.(\d+)\.", target.key.native)[1] for target in targets}  # type: ignore[index]
    assert len(layers) == len({key.native.split(".")[2] for key in key_map.keys if ".layers." in key.native})


@pytest.mark.parametrize("model_type", MODELS)
def test_each_architecture_has_a_tiny_config_for_each_step(model_type: str) -> None:
    folder = "outputs/demo" if model_type == "glm4_moe_lite" else f"outputs/demo-{model_type}"
    configs = [load_config(path) for path in TINY]
    of_this = {config.output.dir: config for config in configs if Path(config.output.dir).parent == Path(folder)}
    assert set(of_this) == {f"{folder}/base", f"{folder}/qlora"}
    base, qlora = of_this[f"{folder}/base"], of_this[f"{folder}/qlora"]
    assert (base.model.path, base.adapter.kind, base.model.dtype) == (f"{folder}/start", "none", "float32")
    assert (qlora.model.path, qlora.model.storage, qlora.adapter.kind) == (f"{folder}/base-nf4", "nf4", "lora")
    for config, rows in ((base, "base"), (qlora, "tuning")):
        assert config.data.train == f"{folder}/data/{rows}_train.jsonl"
        assert config.data.eval == f"{folder}/data/{rows}_eval.jsonl"


def test_there_are_no_other_tiny_configs() -> None:
    assert set(MODELS) <= set(ARCHITECTURES)
    assert len(TINY) == 2 * len(MODELS)


# --- several processes


@functools.cache
def adapted_at_the_real_size(path: Path) -> CausalLM:
    config = load_config(path)
    hub_id, adapter = config.model.path, config.adapter
    architecture = architecture_for(PUBLISHED[hub_id], hub_id)
    spec = StorageSpec(config.model.storage, config.model.double_quant)
    parsed = architecture.parse_config(PUBLISHED[hub_id], hub_id)
    model: CausalLM = architecture.build(parsed, spec, torch.bfloat16, "meta")
    add_lora(model, AdapterSpec(adapter.targets, adapter.rank, adapter.alpha, dtype=getattr(torch, adapter.dtype)))
    return model


def test_there_is_a_config_for_several_processes_of_each_family() -> None:
    assert {path.stem.removesuffix("_qlora_fsdp") for path in CUT} == {"glm47", "qwen35", "trinity_mini"}


@pytest.mark.parametrize("path", CUT, ids=named)
def test_a_cut_model_is_trained_as_on_one_device(path: Path) -> None:
    single, config = load_config(path.with_name(path.name.replace("_fsdp", ""))), load_config(path)
    changes = [f"output.dir=outputs/{path.stem.replace('_', '-')}"]
    if path.stem.startswith("qwen35"):  # whose rank on one card is what the card has room for
        changes += ["adapter.rank=16", "adapter.alpha=32"]
    assert config == parse_config(dump_config(single), changes)
    assert all(f"  {key}: " in path.read_text(encoding="utf-8") for key in ("shard", "expert", "replicate"))


@pytest.mark.parametrize("path", CUT, ids=named)
def test_a_cut_model_divides_by_the_processes(path: Path) -> None:
    model, comment, text = adapted_at_the_real_size(path), comment_of(path), path.read_text(encoding="utf-8")
    assert f"torchrun --nproc-per-node 8 -m train --config configs/{path.name} " in comment
    assert "For 4 or 2 GPUs" in comment
    experts = {module.experts for module in model.modules() if isinstance(module, Experts)}
    assert len(experts) == 1
    (count,) = experts
    assert f"{count // 2}, {count // 4} or {count // 8} of a layer's {count} experts" in text
    for parts in (2, 4, 8):
        for sizes in (MeshSizes(shard=parts), MeshSizes(expert=parts)):
            assert cuts(model, sizes)
        assert count % parts == 0
    sequences = load_config(path).train.micro_batch_size * load_config(path).train.gradient_accumulation
    assert sequences == 8 and "one for each of 8, two for each of 4. 16,384 tokens" in text


@pytest.mark.parametrize("path", CUT, ids=named)
def test_header_states_what_a_process_holds(path: Path) -> None:
    config, model, comment = load_config(path), adapted_at_the_real_size(path), comment_of(path)
    weights = sum(tensor.nbytes for name, tensor in model.state_dict().items() if ".lora." not in name)
    trained = sum(parameter.numel() for _, parameter in trainable_parameters(model))
    assert config.train.optimizer == "adamw_8bit"
    # A value and its gradient; two moments with their scales.
    training = trained * (2 * BYTES[config.adapter.dtype] + 2 * (1 + 4 / 256))
    gib = 2**30
    assert f"weights {weights / gib:.1f} GiB; LoRA {trained:,} parameters, {training / gib:.1f} GiB with" in comment
    eighth, fourth, half = (f"{(weights + training) / parts / gib:.1f}" for parts in (8, 4, 2))
    assert f"Each of 8 processes holds {eighth} GiB of that (of 4: {fourth}, of 2: {half})" in comment
    layers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        unit = ".".join(name.split(".")[:3]) if ".layers." in name else name
        size = parameter.nbytes * (2 if parameter.requires_grad else 1)  # the gradient lies beside it for a moment
        layers[unit] = layers.get(unit, 0) + size
    head = layers["lm_head.weight.value"] + layers["model.norm.weight"]
    largest = sum(sorted(size for name, size in layers.items() if ".layers." in name)[-2:])
    gathered = head + max(largest, layers["model.embed_tokens.weight"])
    assert f"gathers at most {gathered / gib:.2f} GiB more at a time" in comment


def test_the_tiny_config_for_two_processes_is_the_demos() -> None:
    path = ROOT / "configs" / "tiny_fsdp.yaml"
    changes = ["output.dir=outputs/demo/qlora-fsdp", "train.device=cpu"]
    assert load_config(path) == parse_config(
        dump_config(load_config(ROOT / "configs" / "glm47_tiny_qlora.yaml")), changes
    )
    assert "torchrun --nproc-per-node 2 -m train --config configs/tiny_fsdp.yaml" in comment_of(path)


# --- runs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's checkpoint of each architecture that has a config for a real model, with a few rows."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("BASE_ROWS", 40), ("TUNING_ROWS", 20), ("HELD_OUT_ROWS", 4)):
            patch.setattr(demo, name, value)
        for model_type in {published["model_type"] for published in PUBLISHED.values()}:
            folders[model_type] = tmp_path_factory.mktemp(model_type)
            demo.prepare(folders[model_type], model_type)
    return folders


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow if "int8" in path.stem else ())
        for path in REAL
        if not path.stem.startswith("glm47")
    ],
    ids=named,
)
def test_configs_run_at_a_tiny_size(
    path: Path, prepared: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of GLM-4.7-Flash are run by tests/train/test_run.py."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    folder, out = prepared[PUBLISHED[values["model"]["path"]]["model_type"]], tmp_path / "run"
    changes = {
        "model.path": folder / "start",
        "data.train": folder / "data" / "tuning_train.jsonl",
        "data.sequence_length": 128,
        "train.max_steps": 2,
        "train.micro_batch_size": 1,
        "train.gradient_accumulation": 1,
        "train.device": "cpu",
        "train.tensorboard": "false",
        "output.dir": out,
    }
    overrides = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    assert main(["--config", str(path), *overrides]) == 0
    assert len([record for record in read_metrics(out / "metrics.jsonl") if record["kind"] == "train"]) == 2
    table = capsys.readouterr().out
    words = {"experts": "routed experts", "linear_attention": "linear attention"}
    for group in values["adapter"]["targets"]:
        stored = rf"{values['model']['storage']}.* LoRA r{values['adapter']['rank']}"
        assert re.search(rf"^  {words.get(group, group)} +[\d,]+ +{stored}$", table, re.M), group
    described = json.loads((out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert described["r"] == values["adapter"]["rank"]
