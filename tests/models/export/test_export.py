"""Exported adapters of every architecture: read back by a server's rule, they compute what base + adapter computes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.adapters.files import load_adapter, save_adapter
from models.adapters.lora import add_lora, trainable_parameters
from models.adapters.servers import Server
from models.adapters.targets import AdapterSpec
from models.export.__main__ import main
from models.export.verify import verify
from models.export.write import export_adapter
from models.inspect.adapter import inspect_adapter
from models.merge.__main__ import main as merge
from quant.common.errors import NibbleError
from tests.export_helpers import LATENT, PREFIX, TOKENS, World, copied, served
from tests.helpers import assert_close, relative_error
from tests.peft_helpers import config_of, logits_of, native, packed_by_expert, peft_load, randomise

MODEL_TYPES = ("glm4_moe_lite", "glm4_moe", "glm_moe_dsa", "afmoe", "qwen3_moe", "qwen3_5_moe_text", "qwen3_5_moe")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    made: dict[str, World] = {}

    class Lazy(dict[str, World]):
        def __missing__(self, model_type: str) -> World:
            made[model_type] = self[model_type] = World(tmp_path_factory.mktemp(model_type), model_type)
            return self[model_type]

    return Lazy()


def refused(model_type: str, server: str) -> list[str]:
    """Options without which an adapter of everything is refused."""
    latent = model_type in ("glm4_moe_lite", "glm_moe_dsa")
    names: tuple[str, ...] = ()
    if latent:
        names = LATENT if server == "llamacpp" else LATENT[3:]
    if server == "vllm":
        names += ("mlp.gate",) if model_type == "glm_moe_dsa" or model_type.startswith("qwen") else ()
        names += ("shared_expert_gate",) if model_type.startswith("qwen3_5") else ()
    return [option for name in names for option in ("--keep", name)]


@pytest.mark.parametrize("server", ["vllm", "sglang", "llamacpp"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_adapter_of_everything(worlds: dict[str, World], tmp_path: Path, model_type: str, server: str) -> None:
    world, out = worlds[model_type], tmp_path / "out"
    assert main([str(world.adapter), str(out), "--for", server, *refused(model_type, server)]) == 0
    if server == "vllm" and model_type == "qwen3_5_moe":
        peft, _ = peft_load(world.reference, out)
        assert_close(logits_of(peft, TOKENS), world.logits)
        config = config_of(out)
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})
        return
    names = set(load_file(out / "adapter_model.safetensors"))
    prefix = "model.language_model" if model_type == "qwen3_5_moe" else "model"
    for part in ("gate", "up", "down"):
        assert f"{PREFIX}{prefix}.layers.1.mlp.experts.3.{part}_proj.lora_A.weight" in names
    router = "mlp.router.gate" if model_type == "afmoe" and server != "vllm" else "mlp.gate"
    assert f"{PREFIX}{prefix}.layers.1.{router}.lora_B.weight" in names
    assert_close(logits_of(served(copied(world), out), TOKENS), world.logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_for_peft(worlds: dict[str, World], tmp_path: Path, model_type: str) -> None:
    world, out = worlds[model_type], tmp_path / "out"
    assert main([str(world.adapter), str(out), "--for", "peft"]) == 0
    peft, _ = peft_load(world.reference, out)
    assert_close(logits_of(peft, TOKENS), world.logits)


@pytest.mark.parametrize("model_type", ["glm4_moe_lite", "afmoe", "glm4_moe"])
def test_peft_too_reads_a_lora_per_expert(worlds: dict[str, World], tmp_path: Path, model_type: str) -> None:
    """Where no other matrix is called gate_proj, up_proj, down_proj or gate: those names it takes for the experts'."""
    world, out = worlds[model_type], tmp_path / "out"
    others = ["shared_experts", "dense_mlp", "router", *(["self_attn.gate_proj"] if model_type == "afmoe" else [])]
    drop = [option for name in others for option in ("--drop", name)]
    assert main([str(world.adapter), str(out), "--for", "vllm", *refused(model_type, "vllm"), *drop]) == 0
    expected = logits_of(served(copied(world), out), TOKENS)
    peft, _ = peft_load(world.reference, out)
    assert_close(logits_of(peft, TOKENS), expected)
    assert relative_error(expected, logits_of(world.reference, TOKENS)) > 0.1


@pytest.mark.parametrize(("server", "prefix"), [("vllm", "model"), ("peft", "model"), ("sglang", "model")])
def test_the_names_of_the_other_class(worlds: dict[str, World], tmp_path: Path, server: str, prefix: str) -> None:
    world, out = worlds["qwen3_5_moe"], tmp_path / "out"
    keep = refused("qwen3_5_moe", server)
    assert main([str(world.adapter), str(out), "--for", server, "--names", "text", *keep]) == 0
    names = list(load_file(out / WEIGHTS))
    assert all(name.startswith(f"{PREFIX}{prefix}.layers.") for name in names)
    assert any(".experts.3.up_proj." in name for name in names) == (server != "peft")


def stack_only(world: World, folder: Path, targets: tuple[str, ...], dtype: torch.dtype, alpha: float) -> torch.Tensor:
    """Saves an adapter of `targets` alone, with rank 3, and returns the logits with it."""
    model = native(world.base)
    add_lora(model, AdapterSpec(targets, 3, alpha, layers=(1,), dtype=dtype))
    randomise(trainable_parameters(model))
    save_adapter(model, folder, str(world.base))
    return logits_of(model, TOKENS)


@pytest.mark.parametrize("target", ["experts.down_proj", "experts.gate_up_proj"])
@pytest.mark.parametrize("model_type", ["glm4_moe", "qwen3_5_moe"])
def test_a_layers_other_stack_is_filled_with_zeros(
    worlds: dict[str, World], tmp_path: Path, model_type: str, target: str
) -> None:
    world = worlds[model_type]
    logits = stack_only(world, tmp_path / "adapter", (target,), torch.float32, 5.0)
    assert main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--for", "vllm"]) == 0
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert all(".layers.1.mlp.experts" in name for name in tensors), "the other layers have none"
    assert len(tensors) == (4 if model_type == "qwen3_5_moe" else 4 * 3 * 2)
    if model_type == "qwen3_5_moe":
        assert_close(logits_of(peft_load(world.reference, tmp_path / "out")[0], TOKENS), logits)
    else:
        zeros = {name.split(".")[-3] for name, value in tensors.items() if not value.any()}
        assert zeros == ({"down_proj"} if "gate_up" in target else {"gate_proj", "up_proj"})
        assert_close(logits_of(served(copied(world), tmp_path / "out"), TOKENS), logits)


@pytest.mark.parametrize(("alpha", "dtype"), [(6.0, torch.bfloat16), (5.0, torch.float32)])
def test_folding_never_rounds(worlds: dict[str, World], tmp_path: Path, alpha: float, dtype: torch.dtype) -> None:
    """A bfloat16 adapter of rank 3 stays one with the scale 2; with 5/3 it becomes float32."""
    world = worlds["glm4_moe"]
    logits = stack_only(world, tmp_path / "adapter", ("o_proj", "experts"), torch.bfloat16, alpha)
    assert main([str(tmp_path / "adapter"), str(tmp_path / "out"), "--for", "vllm"]) == 0
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {value.dtype for value in tensors.values()} == {dtype}
    save_file({name: value.float() for name, value in tensors.items()}, tmp_path / "out" / WEIGHTS)
    assert_close(logits_of(served(copied(world), tmp_path / "out"), TOKENS), logits)


def truncated(folder: Path, out: Path, lost: str, excluded: bool) -> Path:
    """A copy without those tensors that `lost` fits, with exclude_modules or without."""
    shutil.copytree(folder, out)
    tensors = {name: value for name, value in load_file(folder / WEIGHTS).items() if not re.search(lost, name)}
    save_file(tensors, out / WEIGHTS)
    config = config_of(folder)
    (out / "adapter_config.json").write_text(
        json.dumps({**config, "exclude_modules": config["exclude_modules"] if excluded else None})
    )
    return out


@pytest.mark.parametrize("server", ["vllm", "sglang", "llamacpp"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_servers_read_is_read_here_too(
    worlds: dict[str, World], tmp_path: Path, model_type: str, server: str
) -> None:
    """Experts, attention and router: the experts' names fit the dense and shared MLPs too, which have no tensors."""
    if server == "vllm" and model_type == "qwen3_5_moe":
        pytest.skip("it is in PEFT's layout")
    world, out = worlds[model_type], tmp_path / "out"
    drop = [
        option for name in ("shared_experts", "dense_mlp") if name in world.spec.targets for option in ("--drop", name)
    ]
    keep = refused(model_type, server)
    keep = keep if "shared_expert_gate" not in keep else keep[:-2]
    assert main([str(world.adapter), str(out), "--for", server, *keep, *drop]) == 0
    expected = logits_of(served(copied(world), out), TOKENS)
    assert relative_error(expected, logits_of(world.reference, TOKENS)) > 0.1
    for excluded in (True, False):  # without, as older files and those of others are
        model = native(world.base)
        load_adapter(model, truncated(out, tmp_path / f"{excluded}", "^$", excluded))
        assert_close(logits_of(model, TOKENS), expected)


def test_what_is_missing_is_still_told(
    worlds: dict[str, World], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world, out = worlds["glm4_moe"], tmp_path / "out"
    assert main([str(world.adapter), str(out), "--for", "vllm", "--drop", "shared_experts", "--drop", "dense_mlp"]) == 0
    everywhere = (
        r"experts\.3\.",
        r"experts\.3\.up_proj",
        r"experts\.0\.down_proj\.lora_B",
        r"0\.self_attn\.o_proj",
        "q_proj",
    )
    cases = [(lost, excluded) for lost in everywhere for excluded in (True, False)]
    # Of a whole kind only the file's own list of what it leaves out tells.
    cases += [(r"experts\..*up_proj", True)]
    for number, (lost, excluded) in enumerate(cases):
        with pytest.raises(NibbleError, match=r"adapter_model\.safetensors lacks base_model\.model\.model\.layers\."):
            load_adapter(native(world.base), truncated(out, tmp_path / str(number), lost, excluded))
    caplog.clear()
    load_adapter(native(world.base), truncated(out, tmp_path / "older", "^$", False))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'older'}: target_modules also fit mlp.gate_proj, mlp.up_proj, mlp.down_proj, "
        "mlp.shared_experts.gate_proj, mlp.shared_experts.up_proj and 1 more, of which the file has no tensors; they "
        "stay the base's"
    ]


def test_matrices_of_some_layers_are_read_again(worlds: dict[str, World], tmp_path: Path) -> None:
    world, adapter, out = worlds["qwen3_moe"], tmp_path / "adapter", tmp_path / "out"
    model = native(world.base)
    targets = ("q_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.experts.down_proj")
    add_lora(model, AdapterSpec(targets, 3, 5.0))
    randomise(trainable_parameters(model))
    save_adapter(model, adapter, str(world.base))
    assert main([str(adapter), str(out), "--for", "vllm"]) == 0
    again = native(world.base)
    load_adapter(again, out)
    assert_close(logits_of(again, TOKENS), logits_of(model, TOKENS))


def test_trinity_for_vllm_is_merged_and_inspected(worlds: dict[str, World], tmp_path: Path) -> None:
    world, out = worlds["afmoe"], tmp_path / "out"
    assert main([str(world.adapter), str(out), "--for", "vllm", "--drop", "shared_experts"]) == 0
    expected = logits_of(served(copied(world), out), TOKENS)
    report = inspect_adapter(out, base=world.base)
    assert [one["share"] > 0 for one in report["matrices"] if one["kind"] == "mlp.gate"] == [True]
    assert merge([str(world.base), str(out), str(tmp_path / "merged")]) == 0
    assert_close(logits_of(native(tmp_path / "merged"), TOKENS), expected)


def test_an_adapter_of_others_with_experts_one_by_one(worlds: dict[str, World], tmp_path: Path) -> None:
    """What was written for a server is read again, and written for PEFT."""
    world = worlds["glm4_moe"]
    assert main([str(world.adapter), str(tmp_path / "served"), "--for", "sglang"]) == 0
    assert main([str(tmp_path / "served"), str(tmp_path / "back"), "--for", "peft"]) == 0
    assert_close(logits_of(peft_load(world.reference, tmp_path / "back")[0], TOKENS), world.logits)


def test_unsloths_order_of_b(worlds: dict[str, World], tmp_path: Path) -> None:
    world, out = worlds["qwen3_5_moe"], tmp_path / "out"
    packed = packed_by_expert(world.adapter, tmp_path / "packed", 4)
    for layout, same in (("expert-major", True), ("peft", False)):
        assert main([str(packed), str(out / layout), "--for", "peft", "--layout", layout]) == 0
        logits = logits_of(peft_load(world.reference, out / layout)[0], TOKENS)
        assert (relative_error(logits, world.logits) < 1e-5) == same


# --- --verify


@pytest.mark.parametrize(
    ("model_type", "server"), [("afmoe", "vllm"), ("qwen3_5_moe", "vllm"), ("glm4_moe_lite", "peft")]
)
def test_verify(
    worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str, server: str
) -> None:
    world, out = worlds[model_type], tmp_path / "out"
    keep = refused(model_type, server)
    assert main([str(world.adapter), str(out), "--for", server, "--verify", "--json", *keep]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["largest_difference"] < 1e-5 * world.logits.abs().max()
    assert found["effect"] > 0.1


@pytest.mark.parametrize("server", ["vllm", "peft"])
def test_verify_finds_what_is_wrong(worlds: dict[str, World], tmp_path: Path, server: Server) -> None:
    world, adapter, out = worlds["glm4_moe"], tmp_path / "adapter", tmp_path / "out"
    stack_only(world, adapter, ("experts",), torch.float32, 5.0)
    done = export_adapter(adapter, out, server)
    assert verify(adapter, out, done).difference < 1e-5
    tensors = load_file(out / WEIGHTS)
    last = max(name for name in tensors if ".lora_B." in name)
    tensors[last] = tensors[last] * 0.9
    save_file(tensors, out / WEIGHTS)
    with pytest.raises(NibbleError) as caught:
        verify(adapter, out, done)
    assert f"{out} doesn't compute what {adapter} computes, " in str(caught.value)
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: value * 1e-4 for name, value in tensors.items()}, adapter / WEIGHTS)
    with pytest.raises(NibbleError, match="shows nothing, as the adapter hardly has an effect"):
        verify(adapter, out, done)
