"""vLLM on a CPU against merged folders and exported adapters of every architecture, one group of matrices at a time.

float32 for GLM and Trinity. vLLM has Qwen3.5's linear attention in bfloat16 only; there every token chooses all
experts, as otherwise rounding would choose others.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.adapters.files import load_adapter
from models.adapters.servers import matrix_name
from models.adapters.targets import adaptable
from models.checkpoint.keymap import key_map_of
from models.export.__main__ import main as export
from models.merge.__main__ import main as merge
from tests.export_helpers import World
from tests.peft_helpers import logits_of, native
from tests.servers.checkpoints import VOCABULARY, served_world
from tests.servers.install import VLLM, VLLM_VERSION

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(not VLLM.is_file(), reason="vLLM isn't installed: make test-servers"),
]
TOKENS = torch.randint(16, 400, (1, 24), generator=torch.Generator().manual_seed(3))
WORKER = Path(__file__).parent / "vllm_worker.py"
LITE = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
QWEN = {
    "num_experts_per_tok": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    # What magnifies rounding: small epsilons, large weights.
    "rms_norm_eps": 1e-4,
    "initializer_range": 0.05,
}
# The sizes that vLLM's kernels for CPUs have, and what the engine is told.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "afmoe": ({"head_dim": 32}, {}),
    "glm4_moe": ({"head_dim": 32}, {}),
    # Its rotary operator for CPUs is wrong for latent attention.
    "glm4_moe_lite": (LITE, {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}),
    "qwen3_moe": ({"head_dim": 32}, {}),
    "qwen3_5_moe_text": (QWEN, {}),
    "qwen3_5_moe": (QWEN, {"limit_mm_per_prompt": {"image": 0, "video": 0}}),
}
# All but lm_head, with which vLLM gives no log-probabilities of a prompt.
QWEN_MODULES = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    *("gate_up_proj", "down_proj", "gate_proj", "up_proj", "experts", "shared_expert_gate", "gate"),
]
# What is refused, and left out here.
UNSERVED = {
    "glm4_moe_lite": ["kv_b_proj"],
    "qwen3_moe": ["router"],
    "qwen3_5_moe_text": ["router", "shared_expert_gate"],
    "qwen3_5_moe": ["router", "shared_expert_gate"],
}


def work(folder: Path, base: Path, adapters: dict[str, Path], model_type: str, **environment: str) -> None:
    """Runs vLLM, which leaves NAME.npy of the base and of each adapter in `folder`."""
    folder.mkdir(exist_ok=True)
    options = dict(CASES[model_type][1])
    if model_type.startswith("qwen3_5"):
        options["lora_target_modules"] = QWEN_MODULES
    job = {
        "base": str(base),
        "dtype": "bfloat16" if model_type.startswith("qwen3_5") else "float32",
        "tokens": TOKENS[0].tolist(),
        "adapters": {name: str(path) for name, path in adapters.items()},
        "options": options,
        "out": str(folder),
    }
    done = subprocess.run(
        [str(VLLM), str(WORKER)],
        input=json.dumps(job),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parent / "vllm_site"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = folder / "failed"
    assert done.returncode == 0, failed.read_text()[-3000:] if failed.exists() else done.stderr[-3000:]


def found(folder: Path, name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / f"{name}.npy"))[:, :VOCABULARY]


def expected(base: Path, adapter: Path | None) -> torch.Tensor:
    model = native(base)
    if adapter is not None:
        load_adapter(model, adapter)
    return logits_of(model, TOKENS)[0, :-1].log_softmax(-1)


def world_of(folder: Path, model_type: str) -> World:
    world = served_world(folder, model_type, **CASES[model_type][0])
    if model_type.startswith("qwen3_5"):
        weights = world.base / "model.safetensors"
        save_file({name: value.bfloat16() for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    return world


@pytest.mark.parametrize("model_type", CASES)
def test_adapters_and_merged(tmp_path: Path, model_type: str) -> None:
    world = world_of(tmp_path / "world", model_type)
    tolerance = 0.05 if model_type.startswith("qwen3_5") else 1e-4
    adapters, wanted = {}, {"base": expected(world.base, None)}
    unserved = UNSERVED.get(model_type, [])
    for group in ("everything", *(name for name in world.spec.targets if name not in unserved)):
        others = [name for name in world.spec.targets if group not in (name, "everything")]
        arguments = [part for name in (*others, *unserved) for part in ("--drop", name)]
        adapters[group] = tmp_path / group
        assert export([str(world.adapter), str(adapters[group]), "--for", "vllm", *arguments]) == 0
        assert export([str(world.adapter), str(adapters[group] / "peft"), "--for", "peft", *arguments]) == 0
        wanted[group] = expected(world.base, adapters[group] / "peft")
    work(tmp_path / "out", world.base, adapters, model_type)
    assert merge([str(world.base), str(world.adapter), str(tmp_path / "merged")]) == 0
    work(tmp_path / "out-merged", tmp_path / "merged", {}, model_type)
    differences = {name: (found(tmp_path / "out", name) - value).abs().max().item() for name, value in wanted.items()}
    whole = expected(world.base, world.adapter)
    differences["merged"] = (found(tmp_path / "out-merged", "base") - whole).abs().max().item()
    effects = {name: (value - wanted["base"]).abs().max().item() for name, value in wanted.items() if name != "base"}
    print(f"\n{model_type} (vLLM {VLLM_VERSION}): " + ", ".join(f"{n} {v:.1e}" for n, v in differences.items()))
    assert {name: value for name, value in differences.items() if not value <= tolerance} == {}
    assert {name: value for name, value in effects.items() if not value > 0.1} == {}, "otherwise nothing is shown"


@pytest.mark.parametrize("model_type", [name for name in UNSERVED if name != "qwen3_5_moe"])
def test_what_is_refused_has_no_effect(tmp_path: Path, model_type: str) -> None:
    """Were it exported all the same, vLLM would compute the base, and say nothing. Without MLA kv_b_proj is right."""
    world = world_of(tmp_path / "world", model_type)
    names = dict.fromkeys(matrix_name(key) for key in adaptable(key_map_of(native(world.base))))
    base, adapters, wanted = expected(world.base, None), {}, {}
    for name in UNSERVED[model_type]:
        kept = "mlp.gate" if name == "router" else name
        drop = [part for other in names if not other.endswith(kept) for part in ("--drop", other)]
        adapters[name] = tmp_path / name
        assert export([str(world.adapter), str(tmp_path / name), "--for", "vllm", "--keep", kept, *drop]) == 0
        assert export([str(world.adapter), str(tmp_path / name / "peft"), "--for", "peft", *drop]) == 0
        wanted[name] = expected(world.base, tmp_path / name / "peft")
        assert (wanted[name] - base).abs().max() > 0.1
    work(tmp_path / "out", world.base, adapters, model_type)
    for name in adapters:
        assert (found(tmp_path / "out", name) - found(tmp_path / "out", "base")).abs().max() < 1e-5
    if "kv_b_proj" in adapters:
        work(tmp_path / "mha", world.base, adapters, model_type, VLLM_MLA_DISABLE="1")
        assert (found(tmp_path / "mha", "kv_b_proj") - wanted["kv_b_proj"]).abs().max() < 1e-4
