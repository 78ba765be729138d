"""Training on several processes is training on one: losses, gradient norms and the adapter that comes out.

The oracle is the run of one process, which the tests of each architecture hold against transformers and PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist_workers.training import saved_tensors, train_alone
from tests.processes import run_processes
from tests.tiny import TINY, save_tiny

ARCHITECTURES = [name for name in TINY if name != "qwen3_5_moe"]  # qwen3_5_moe_text with other keys: one case
# Where all layers after the first are alike, two of them do.
FEWER = {name: {"num_hidden_layers": 3} for name in ("glm4_moe_lite", "glm4_moe", "qwen3_moe")}
TOLERANCE = 1e-5

Case = dict[str, Any]

# Cases in which something is rounded to fewer digits than a float32 sum has; the tolerance of the first gradient norm.
ROUNDED = {f"{model_type}-bfloat16": TOLERANCE for model_type in ARCHITECTURES}
ROUNDED |= {"full bfloat16": 1e-2, "lora in bfloat16": 1e-2, "8-bit states": TOLERANCE}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    made: dict[str, Path] = {}

    def get(model_type: str, **changes: Any) -> str:
        key = f"{model_type}-{'-'.join(f'{name}={value}' for name, value in sorted(changes.items()))}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("checkpoint") / "model"
            biased = changes.pop("biased", False)
            save_tiny(made[key], model_type, **changes)
            if biased:
                _send_everything_to_one_expert(made[key])
        return str(made[key])

    return get


def _send_everything_to_one_expert(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor.zero_()[3] = 100.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# What every change is tried on; the others take minutes and are marked slow.
QUICK = {
    2: (
        "glm4_moe_lite-nf4", "glm_moe_dsa-experts", "afmoe-experts", "qwen3_moe-experts", "qwen3_5_moe_text-experts",
        "one expert-experts", "full bfloat16",
    ),
    4: (
        "glm4_moe-int8", "glm_moe_dsa-experts", "afmoe-replicated", "qwen3_5_moe-nf4", "replicated experts",
        "four owners",
    ),
}  # fmt: skip


def cases_for(ranks: int) -> dict[str, Case]:
    """What is trained on so many processes, by name. Those in bfloat16 say so in theirs."""
    cases: dict[str, Case] = {}

    def add(
        name: str, model_type: str, storage: str = "nf4", changes: dict[str, Any] | None = None, **sections: Any
    ) -> None:
        changed = {**FEWER.get(model_type, {}), **(changes or {})}
        model = {"path": (model_type, changed), "storage": storage, **sections.pop("model", {})}
        # Two passes on each process, the second without rows on all but one; fewer where an epoch ends.
        train = {"gradient_accumulation": ranks + 1, **sections.pop("train", {})}
        cases[name] = {"model": model, "train": train, **sections}

    for model_type in ARCHITECTURES:
        for storage in ("nf4", "int8", "none"):
            add(f"{model_type}-{storage}", model_type, storage)
        add(f"{model_type}-bfloat16", model_type, "none", model={"dtype": "bfloat16"})
        add(f"{model_type}-experts", model_type, parallel={"expert": 2})
    add("qwen3_5_moe-nf4", "qwen3_5_moe")
    lite, qwen = "glm4_moe_lite", "qwen3_5_moe_text"
    # Without normalisation, which would make the only weight one and leave the router without a gradient.
    one_expert = {"biased": True, "num_experts_per_tok": 1, "norm_topk_prob": False}
    tied, full = {"tie_word_embeddings": True}, {"kind": "none"}
    add("one expert", lite, changes=one_expert)
    add("one expert-experts", lite, changes=one_expert, parallel={"expert": 2})
    add("offload", lite, parallel={"cpu_offload": True})
    add("kept", lite, parallel={"reshard_after_forward": False})
    add("not recomputed", "afmoe", parallel={"expert": 2}, train={"activation_checkpointing": False})
    add("lora in bfloat16", lite, adapter={"dtype": "bfloat16"})
    add("8-bit states", lite, train={"optimizer": "adamw_8bit"})
    add("tied", lite, changes=tied)
    add("full", qwen, "none", adapter=full)
    add("full bfloat16", qwen, "none", adapter=full, model={"dtype": "bfloat16"})
    add("full tied experts", lite, "none", tied, adapter=full, parallel={"expert": 2})
    if ranks == 4:
        for model_type in ARCHITECTURES:
            add(f"{model_type}-replicated", model_type, parallel={"replicate": 2})
        add("replicated experts", lite, parallel={"replicate": 2, "expert": 2})
        add("four owners", lite, parallel={"expert": 4, "cpu_offload": True})
    return cases


class Trained:
    def __init__(self, ranks: int, names: tuple[str, ...] | None, checkpoint: Callable[..., str], folder: Path) -> None:
        cases = cases_for(ranks)
        self.cases = {name: cases[name] for name in names or cases}
        for case in self.cases.values():
            model_type, changes = case["model"]["path"]
            case["model"]["path"] = checkpoint(model_type, **changes)
        self.ranks, self.folder = ranks, folder
        listed = list(self.cases.values())
        self.ours = run_processes(ranks, "tests.dist_workers.training:train_all", listed, str(folder / "several"))
        self.alone = train_alone(listed, str(folder / "alone"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((2, True), id="2"),
        pytest.param((4, True), id="4", marks=pytest.mark.slow),
        pytest.param((2, False), id="2-all", marks=pytest.mark.slow),
        pytest.param((4, False), id="4-all", marks=pytest.mark.slow),
    ],
)
def trained(
    request: pytest.FixtureRequest, checkpoint: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    ranks, quick = request.param
    return Trained(ranks, QUICK[ranks] if quick else None, checkpoint, tmp_path_factory.mktemp("trained"))


def test_losses_and_results_are_those_of_one_process(trained: Trained) -> None:
    wrong = []
    for number, name in enumerate(trained.cases):
        ours, alone = [ranks[number] for ranks in trained.ours], trained.alone[number]
        assert all(of_rank["losses"] == ours[0]["losses"] for of_rank in ours), name
        assert alone["losses"][-1] < 0.999 * alone["losses"][0] or alone["norms"][0] > 0.01, f"{name} learns nothing"
        # Of what is frozen each process holds its part, and nothing of any size is on all of them.
        parts = trained.ranks // trained.cases[name].get("parallel", {}).get("replicate", 1)
        assert all(of_rank["frozen_bytes"] <= 1.02 * alone["frozen_bytes"] / parts for of_rank in ours), name
        loss = _differences(ours[0]["losses"], alone["losses"])
        norm = _differences(ours[0]["norms"], alone["norms"])
        several, one = (saved_tensors(trained.folder / which / str(number)) for which in ("several", "alone"))
        assert several.keys() == one.keys(), name
        tensor, where = max((_difference(several[key], one[key]), key) for key in one)
        print(f"{name:32} loss {max(loss):.1e} norm {max(norm):.1e} result {tensor:.1e} {where}")
        if name in ROUNDED:
            # The first losses are equal. Then a sum that is rounded otherwise changes a choice of experts, or an 8-bit
            # state. Gradients in bfloat16 are themselves rounded after each micro-batch: another number of them, here.
            good = loss[0] <= TOLERANCE and norm[0] <= ROUNDED[name] and max(loss) < 2e-2
        else:
            good = max(*loss, *norm, tensor) <= TOLERANCE
        if not good:
            wrong.append(name)
    assert not wrong


def _differences(ours: list[float], theirs: list[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the largest value."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
