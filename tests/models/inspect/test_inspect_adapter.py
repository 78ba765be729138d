"""python -m models.inspect on adapters: norms beside those of what PEFT merges."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.convert import convert
from models.inspect.__main__ import main
from models.load import load_model
from tests.inspect_helpers import compared, error_of, inspected
from tests.peft_helpers import packed_by_expert, peft_make
from tests.tiny import save_tiny

TARGETS = {
    "target_modules": ["o_proj", "kv_b_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    "r": 3,
    "lora_alpha": 7,
    "rank_pattern": {"experts.down_proj": 2, "mlp.gate.weight": 4},
    "alpha_pattern": {"mlp.gate.weight": 5, "kv_b_proj": 1},
}
DEAD = (1, 5)


class Made:
    """base, adapter: folders. deltas: by the base's names, what PEFT adds to a weight. weights: those of the base."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.base, self.adapter = folder / "base", folder / "adapter"
        reference = save_tiny(self.base, "glm4_moe_lite")
        peft = peft_make(reference, self.adapter, **{**TARGETS, **config})
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if ".experts." in name and "lora_B" in name:
                    for expert in DEAD:  # column j·E + e is expert e's
                        parameter[:, expert::8] = 0
        peft.save_pretrained(str(self.adapter))
        self.weights = {name.removesuffix(".weight"): value for name, value in reference.state_dict().items()}
        merged = peft.merge_and_unload().state_dict()
        merged = {name.removesuffix(".weight"): value for name, value in merged.items()}
        self.deltas = {
            name: merged[name].double() - value.double()
            for name, value in self.weights.items()
            if not torch.equal(merged[name], value)
        }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("adapter"))


def norms(report: dict[str, Any]) -> dict[str, list[float]]:
    return {one["name"]: one["expert_norms"] or [one["norm"]] for one in report["matrices"]}


def check_norms(found: dict[str, list[float]], deltas: dict[str, Tensor]) -> None:
    assert found.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert found[name] == pytest.approx(delta.reshape(-1, *delta.shape[-2:]).norm(dim=(1, 2)).tolist(), rel=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_norms(made: Made, rslora: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(tmp_path, use_rslora=True) if rslora else made
    assert len(made.deltas) == 4 * 2 + 3 * 3
    report = inspected(capsys, made.adapter, "--quick")
    check_norms(norms(report), made.deltas)
    assert {one["kind"]: (one["rank"], one["alpha"]) for one in report["matrices"]} == {
        "self_attn.o_proj": (3, 7),
        "self_attn.kv_b_proj": (3, 1),
        "mlp.experts.gate_up_proj": (3, 7),
        "mlp.experts.down_proj": (2, 7),
        "mlp.gate": (4, 5),
    }
    assert all(one["dead"] == (list(DEAD) if "experts" in one["kind"] else []) for one in report["matrices"])
    assert report["dead_experts"] == 3 * 2 * len(DEAD)
    assert report["parameters"] == sum(tensor.numel() for tensor in tensors(made.adapter).values())
    assert (report["base"], report["matrices"][0]["share"], report["rslora"]) == (None, None, rslora)


def test_a_single_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(tmp_path, target_parameters=["mlp.experts.down_proj"])
    check_norms(norms(inspected(capsys, made.adapter)), made.deltas)


def tensors(adapter: Path) -> dict[str, Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def rewritten(
    made: Made, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any
) -> Path:
    """The adapter with other tensors and entries of its config."""
    shutil.copytree(made.adapter, folder)
    values = {name: tensor.contiguous() for name, tensor in change(tensors(made.adapter)).items()}
    save_file(values, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_other_layouts(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = packed_by_expert(made.adapter, tmp_path / "packed", 8)
    check_norms(norms(inspected(capsys, packed, "--layout", "expert-major")), made.deltas)
    assert norms(inspected(capsys, packed)) != norms(inspected(capsys, made.adapter))

    def one_by_one(found: dict[str, Tensor]) -> dict[str, Tensor]:
        """gate and up each have A and their half of B's rows."""
        split = {name: value for name, value in found.items() if ".experts." not in name}
        for name in (name for name in found if ".experts." in name and "lora_A" in name):
            a, b = found[name].unflatten(0, (8, -1)), found[name.replace("_A", "_B")].unflatten(1, (-1, 8))
            stem = name.partition(".experts.")[0]
            rows = {"gate_proj": slice(0, 64), "up_proj": slice(64, 128)} if "base_layer" in name else {}
            for expert in range(8):
                for part, half in (rows or {"down_proj": slice(None)}).items():
                    split[f"{stem}.experts.{expert}.{part}.lora_A.weight"] = a[expert].clone()
                    split[f"{stem}.experts.{expert}.{part}.lora_B.weight"] = b[half, :, expert].clone()
        return split

    patterns = {"rank_pattern": {r".*\.experts\.\d+\.down_proj": 2, "mlp.gate.weight": 4}}
    single = rewritten(made, tmp_path / "single", one_by_one, **patterns)
    expected = {name: delta for name, delta in made.deltas.items() if "gate_up" not in name}
    base = dict(made.weights)
    for name in (name for name in made.deltas if "gate_up" in name):
        for number, part in enumerate(("gate_proj", "up_proj")):
            expected[name.replace("gate_up_proj", part)] = made.deltas[name].chunk(2, dim=1)[number]
            base[name.replace("gate_up_proj", part)] = made.weights[name].chunk(2, dim=1)[number]
    report = inspected(capsys, single, "--model", made.base)
    check_norms(norms(report), expected)
    assert all(
        one["base_norm"] == pytest.approx(base[one["name"]].norm().item(), rel=1e-5) for one in report["matrices"]
    )


def test_the_share_of_the_base(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made.adapter / "adapter_config.json"
    named = rewritten(made, tmp_path / "named", dict, base_model_name_or_path=str(made.base))
    report = inspected(capsys, named)
    assert report["base"] == str(made.base)
    for one in report["matrices"]:
        expected = made.weights[one["name"]].norm().item()
        assert one["base_norm"] == pytest.approx(expected, rel=1e-5)
        assert one["share"] == pytest.approx(made.deltas[one["name"]].norm().item() / expected, rel=1e-5)
    assert json.loads(path.read_text())["base_model_name_or_path"] != str(made.base)

    convert(made.base, tmp_path / "nf4", "nf4", "float32")
    model = load_model(tmp_path / "nf4", "nf4", "float32")
    report = inspected(capsys, made.adapter, "--model", tmp_path / "nf4")
    for one in report["matrices"]:
        weight: Any = model.get_submodule(one["name"]).weight
        assert one["base_norm"] == pytest.approx(weight.dense().double().norm().item(), rel=1e-6), one["name"]


def test_the_text_and_the_picture(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "norms.png"
    assert main([str(made.adapter), "--model", str(made.base), "--png", str(png)]) == 0
    text = capsys.readouterr().out
    assert "target    mlp.experts.down_proj: rank 2, alpha 7, in 3 layers\n" in text
    assert "\n  layer 2, mlp.experts.down_proj: 1, 5\n" in text and "dead      12 experts with a norm of 0:\n" in text
    expert = made.deltas["model.layers.1.mlp.experts.down_proj"].norm(dim=(1, 2)).tolist()
    row = "   ".join(f"{norm:.3g}" if norm else "dead" for norm in expert)
    assert " ".join(row.split()) in " ".join(text.partition("mlp.experts.down_proj, by expert:")[2].split())
    assert "Share of the base's norm:" in text
    assert reds(png) > 1000

    alive = rewritten(made, tmp_path / "alive", lambda found: {name: value + 1 for name, value in found.items()})
    assert main([str(alive), "--quick", "--png", str(png)]) == 0
    assert "dead      0 experts with a norm of 0\n" in capsys.readouterr().out
    assert reds(png) == 0


def reds(path: Path) -> int:
    """How many pixels of a picture are red."""
    pixels = torch.from_numpy(matplotlib.image.imread(path))[..., :3]
    return int((pixels == torch.tensor([1.0, 0.0, 0.0])).all(-1).sum())


def test_differences(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"

    def scaled(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return found | {name: 2 * found[name]}

    other = rewritten(made, tmp_path / "other", scaled, lora_dropout=0.1)
    assert compared(capsys, made.adapter, made.adapter) == []
    settings, norm, tensor = compared(capsys, made.adapter, other)
    assert settings == ("config", "lora_dropout", 0.0, 0.1)
    assert norm[:2] == ("norm", "model.layers.0.self_attn.o_proj") and norm[3] == pytest.approx(2 * norm[2])
    assert tensor == ("tensor", name, "F32 [64, 3]", "other values")
    assert "is an adapter, " in error_of(capsys, made.adapter, "--diff", made.base)


def test_errors(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = sorted(tensors(made.adapter))[0]

    def changed(name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        return rewritten(made, tmp_path / name, change)

    single = changed("single", lambda found: {name: value for name, value in found.items() if name != first})
    assert "layers.0.self_attn.kv_b_proj has no lora_A. The file isn't complete." in error_of(capsys, single)
    short = changed("short", lambda found: found | {first: found[first][:1]})
    assert "lora_A and lora_B of model.layers.0.self_attn.kv_b_proj don't fit" in error_of(capsys, short)
    broken = changed("broken", lambda found: found | {first: found[first] * torch.inf})
    assert "are inf or NaN" in error_of(capsys, broken)
    extra = changed("extra", lambda found: found | {"lm_head.weight": torch.zeros(2)})
    assert inspected(capsys, extra)["others"] == ["lm_head.weight"]
    wrong = rewritten(made, tmp_path / "rank", dict, r=5)
    assert "has 24 rows, no multiple of its rank, 5" in error_of(capsys, wrong)
    save_tiny(tmp_path / "qwen", "qwen3_moe")
    assert "which the adapter adapts.\n" in error_of(capsys, made.adapter, "--model", tmp_path / "qwen")
    save_tiny(tmp_path / "wide", "glm4_moe_lite", n_routed_experts=4)
    assert "8 experts.\n" in error_of(capsys, made.adapter, "--model", tmp_path / "wide")
    assert "--model is for looking at one" in error_of(capsys, made.adapter, "--diff", wrong, "--model", made.base)
