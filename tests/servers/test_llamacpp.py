"""llama.cpp against merged folders and exported adapters of every architecture, in float32."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.export.__main__ import main as export
from models.merge.__main__ import main as merge
from tests.export_helpers import LATENT, World
from tests.peft_helpers import logits_of, native
from tests.servers.checkpoints import MODEL_TYPES, VOCABULARY, served_world
from tests.servers.install import LIBRARIES, LLAMA_CPP, SOURCE

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(not (LIBRARIES / "libllama.so").exists(), reason="llama.cpp isn't built: make test-servers"),
]
TOKENS = torch.randint(16, 400, (1, 24), generator=torch.Generator().manual_seed(3))
PRE = {"glm4": "glm4", "glm_": "glm4", "afmo": "afmoe", "qwen": "qwen35"}
TOLERANCE = 2e-4  # of logits, whose deviation is about 1
WORKER = Path(__file__).parent / "llamacpp_worker.py"


def work(*jobs: dict[str, Any]) -> list[str]:
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(LIBRARIES), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(LLAMA_CPP)],
        input=json.dumps(jobs),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said: list[str] = json.loads(done.stdout.splitlines()[-1])
    return said


def model_jobs(folder: Path, out: Path, model_type: str) -> list[dict[str, Any]]:
    return [
        {"do": "convert", "folder": str(folder), "out": f"{out}.gguf", "pre": PRE[model_type[:4]]},
        {"do": "logits", "model": f"{out}.gguf", "tokens": TOKENS[0].tolist(), "out": f"{out}.npy"},
    ]


def difference(path: Path, expected: Tensor) -> float:
    found = torch.from_numpy(np.load(f"{path}.npy"))[:, :VOCABULARY]
    return (found - expected[0]).abs().max().item()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    made: dict[str, World] = {}

    def world(model_type: str) -> World:
        if model_type not in made:
            made[model_type] = served_world(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return world


def adapted_logits(base: Path, adapter: Path) -> Tensor:
    from models.adapters.files import load_adapter

    model = native(base)
    load_adapter(model, adapter)
    return logits_of(model, TOKENS)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_merged_and_adapted(
    worlds: Callable[[str], World], tmp_path: Path, model_type: str, record_property: Callable[[str, object], None]
) -> None:
    """The base, everything merged, and what llama.cpp applies of the adapter, at once and group by group."""
    world = worlds(model_type)
    assert merge([str(world.base), str(world.adapter), str(tmp_path / "merged")]) == 0
    base = logits_of(native(world.base), TOKENS)
    expected = {"base": base, "merged": adapted_logits(world.base, world.adapter)}
    folders = {"base": world.base, "merged": tmp_path / "merged"}
    jobs = [job for name, folder in folders.items() for job in model_jobs(folder, tmp_path / name, model_type)]
    latent = model_type in ("glm4_moe_lite", "glm_moe_dsa")
    unserved = LATENT if latent else ()
    for group in ("everything", *world.spec.targets):
        # An adapter of one group is what is left when all others are dropped.
        others = [name for name in world.spec.targets if group not in (name, "everything")]
        dropped = [*others, *(unserved if "attention" not in others else ())]
        arguments = [part for name in dropped for part in ("--drop", name)]
        out = tmp_path / group
        assert export([str(world.adapter), str(out), "--for", "llamacpp", *arguments]) == 0
        assert export([str(world.adapter), str(out / "peft"), "--for", "peft", *arguments]) == 0
        expected[group] = adapted_logits(world.base, out / "peft")
        run = {"do": "logits", "model": f"{tmp_path / 'base'}.gguf", "tokens": TOKENS[0].tolist()}
        jobs += [
            {"do": "lora", "adapter": str(out), "base": str(world.base), "out": f"{out}-lora.gguf"},
            {**run, "lora": f"{out}-lora.gguf", "out": f"{out}.npy"},
        ]
    failed = [said for said in work(*jobs) if said]
    assert not failed, "\n".join(failed)
    found = {name: difference(tmp_path / name, logits) for name, logits in expected.items()}
    effects = {name: (logits - base).abs().max().item() for name, logits in expected.items() if name != "base"}
    print(f"\n{model_type} (llama.cpp of {SOURCE.name}): " + ", ".join(f"{n} {v:.1e}" for n, v in found.items()))
    record_property(model_type, {name: f"{value:.1e}" for name, value in found.items()})
    assert {name: value for name, value in found.items() if not value <= TOLERANCE} == {}
    assert {name: value for name, value in effects.items() if not value > 0.1} == {}, "otherwise nothing is shown"


@pytest.mark.parametrize("model_type", ["glm4_moe_lite", "glm_moe_dsa"])
@pytest.mark.parametrize("name", LATENT)
def test_what_is_refused_has_no_effect_or_fails(
    worlds: Callable[[str], World], tmp_path: Path, name: str, model_type: str
) -> None:
    """Of latent attention: were it exported all the same, llama.cpp would compute the base, or not convert it."""
    world = worlds(model_type)
    others = [group for group in world.spec.targets if group != "attention"]
    others += [other for other in (*LATENT, "o_proj") if other != name]
    drop = [part for other in others for part in ("--drop", other)]
    assert export([str(world.adapter), str(tmp_path / "lora"), "--for", "llamacpp", "--keep", name, *drop]) == 0
    lora = f"{tmp_path / 'lora'}.gguf"
    run = {"do": "logits", "model": f"{tmp_path / 'base'}.gguf", "tokens": TOKENS[0].tolist()}
    said = work(
        *model_jobs(world.base, tmp_path / "base", model_type),
        {"do": "lora", "adapter": str(tmp_path / "lora"), "base": str(world.base), "out": lora},
        {**run, "lora": lora, "out": f"{tmp_path / 'with'}.npy"},
    )
    assert said[:2] == ["", ""]
    if name == "kv_b_proj":
        assert "NotImplementedError" in said[2]
    else:
        assert said[2:] == ["", ""]
        assert np.array_equal(np.load(tmp_path / "with.npy"), np.load(tmp_path / "base.npy"))


def lose_route_norm(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["route_norm"]
    (folder / "config.json").write_text(json.dumps(config))


def lose_prediction_layers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    left = {name: value for name, value in tensors.items() if not name.startswith("mtp.")}
    assert len(left) < len(tensors)
    save_file(left, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("model_type", "mutate"), [("afmoe", lose_route_norm), ("qwen3_5_moe_text", lose_prediction_layers)]
)
def test_what_a_merge_must_not_lose(
    worlds: Callable[[str], World], tmp_path: Path, model_type: str, mutate: Callable[[Path], None]
) -> None:
    """Mutations that must fail: without these nobody would notice a merge that loses them."""
    world = worlds(model_type)
    shutil.copytree(world.base, tmp_path / "base")
    mutate(tmp_path / "base")
    said = work(*model_jobs(tmp_path / "base", tmp_path / "found", model_type))
    if model_type == "afmoe":
        assert said == ["", ""]
        assert difference(tmp_path / "found", logits_of(native(world.base), TOKENS)) > 0.1
    else:
        assert any(said), "it can't be converted or loaded"
