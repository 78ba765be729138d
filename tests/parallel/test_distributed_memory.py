"""A model cut over several processes: what each holds, what loading takes, and what a step moves.

The sizes are those of real tensors and of the processes' own accounts (VmHWM), measured in processes of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoint import ensure_checkpoint
from benchmarks.setting import SETTINGS
from models.checkpoint.conversion import convert
from quant.storage import Kind, StorageSpec
from tests.dist_workers import memory
from tests.processes import run_processes

pytestmark = pytest.mark.slow  # four processes, 50 s of CPU

MiB = 2**20
# Large enough for a few percent to mean something: 24 million parameters, most of them experts'.
CONFIG = {
    "num_hidden_layers": 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "vocab_size": 2048,
    "intermediate_size": 1024,
    "n_routed_experts": 16,
}
HIDDEN, LAYERS, EXPERTS, WIDTH, CHOSEN = 512, 2, 16, 384, 4  # layers: with experts
MAPPED = 2 * MiB
ALLOCATOR = 2 * MiB
STORAGES: tuple[Kind, ...] = ("nf4", "int8")


class Measured:
    def __init__(self, ranks: int, folder: Path) -> None:
        hub = ensure_checkpoint(SETTINGS["glm4_moe_lite"].config | CONFIG, folder)
        self.cases: dict[str, dict[str, Any]] = {}
        for storage in STORAGES:
            # Not beside the hub's folder, where loading would take it instead.
            converted = folder / "converted" / storage
            convert(hub, converted, StorageSpec(storage))
            for source, path in (("hub", hub), ("converted", converted)):
                self.cases[f"{storage} {source}"] = {
                    "model": {"path": str(path), "storage": storage, "dtype": "bfloat16"},
                    "adapter": {"targets": ["attention", "experts"]},
                    "parallel": {"expert": 2 if source == "hub" else 1},
                    # One kind of storage takes steps with experts owned as well.
                    "step": source == "converted" or storage == "nf4",
                }
        # LoRA in bfloat16 is reduced in float32.
        as_bfloat16 = {
            **self.cases["nf4 converted"],
            "adapter": {"targets": ["attention", "experts"], "dtype": "bfloat16"},
        }
        self.cases["nf4 converted, LoRA in bfloat16"] = as_bfloat16
        # So that freed memory is the system's again, and one load does not fill what another has left behind.
        self.ranks = run_processes(
            ranks, "tests.dist_workers.memory:measure_all", list(self.cases.values()), MAPPED,
            env={"MALLOC_MMAP_THRESHOLD_": str(64 * 1024)},
        )  # fmt: skip

    def each(self) -> list[tuple[str, int, dict[str, Any]]]:
        """Name of a case, rank and what it found."""
        return [(name, rank, found[i]) for i, name in enumerate(self.cases) for rank, found in enumerate(self.ranks)]


RANKS = 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(RANKS, tmp_path_factory.mktemp("memory"))


def test_frozen_weights_are_held_in_parts(measured: Measured) -> None:
    for name, rank, found in measured.each():
        share = found["total"] / RANKS
        after = found.get("alive_after", 0)
        print(
            f"{name} rank {rank}: of {share / MiB:.1f} MiB", *(round(found[k] / share, 4) for k in ("frozen", "alive"))
        )
        assert found["total"] > 10 * MiB
        assert found["frozen"] <= 1.02 * share, name
        # Nor does anything else keep weights alive, after loading or after a step.
        assert found["alive"] <= 1.02 * share, name
        assert after <= 1.02 * share, (name, after / share)


def test_loading_needs_the_share_and_one_tensor(measured: Measured) -> None:
    for name, rank, found in measured.each():
        over, largest = found["peak"] - found["share"], found["largest"]
        print(
            f"{name} rank {rank}: share {found['share'] / MiB:.1f} MiB, peak {over / MiB:.2f} over, {largest / MiB:.2f}"
        )
        assert found["peak"] >= 0.7 * found["share"], "the peak is one of loading; a little memory was there before"
        assert over <= largest + MAPPED + ALLOCATOR, name


def test_buffers_are_the_same_everywhere(measured: Measured) -> None:
    for i, name in enumerate(measured.cases):
        buffers = [found[i]["buffers"] for found in measured.ranks]
        assert len([key for key in buffers[0] if key.endswith("e_score_correction_bias")]) == LAYERS
        assert all(other == buffers[0] for other in buffers), name
    assert len({tuple(found[0]["buffers"].values()) for found in measured.ranks}) == 1


def test_what_is_gathered_is_packed(measured: Measured) -> None:
    stepped = [(name, found) for name, _, found in measured.each() if "gathered" in found]
    assert len(stepped) == 4 * RANKS
    for name, found in stepped:
        print(f"{name}: gathered {found['gathered']:,}, planned {found['planned']:,}, dense {found['dense']:,}")
        assert found["gathered"] == pytest.approx(found["planned"], rel=0.01), name
        # All that has gradients, in float32, and nothing frozen.
        wide = 2 if "bfloat16" in name else 1
        assert found["reduced"] == pytest.approx((RANKS - 1) * found["trained"] * wide, rel=0.01) or "hub" in name, name
    weights = dict(stepped)
    assert weights["nf4 converted"]["gathered"] < 0.5 * weights["nf4 converted"]["dense"]
    assert weights["int8 converted"]["gathered"] < 0.7 * weights["int8 converted"]["dense"]


def test_planned_bytes_are_those_of_the_checkpoint(measured: Measured) -> None:
    """Worked out by hand: the experts of nf4 with double quantisation, LoRA, and what is not quantised."""
    found = measured.ranks[0][list(measured.cases).index("nf4 converted")]
    experts = LAYERS * EXPERTS * 3 * WIDTH * HIDDEN
    lora = LAYERS * EXPERTS * 4 * ((HIDDEN + 2 * WIDTH) + (WIDTH + HIDDEN)) * 4
    embedding_and_head = 2 * CONFIG["vocab_size"] * HIDDEN * 2  # type: ignore[operator]
    least = 2 * (experts * 0.515869 + lora) * (RANKS - 1) / RANKS + embedding_and_head * (RANKS - 1) / RANKS
    assert least < found["gathered"] < 1.3 * least, "attention, the dense layer and shared experts are little"


def test_owned_experts_are_not_gathered(measured: Measured) -> None:
    owned = measured.ranks[0][list(measured.cases).index("nf4 hub")]
    experts = LAYERS * EXPERTS * 3 * WIDTH * HIDDEN
    assert owned["gathered"] < 2 * experts * 0.515869 * (RANKS - 1) / RANKS, "less than the experts alone"
    # Five ways per layer of this process's tokens and the others', in bfloat16, about half of which stay.
    rows = 5 * LAYERS * memory.TOKENS * CHOSEN * HIDDEN * 2
    assert 0.25 * rows < owned["exchanged"] < rows
