"""Records of expert usage, and their heat map."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch

from models.blocks.usage import Usage
from models.load import open_folder
from quant.common.errors import NibbleError
from tests.balance_helpers import CPU, config_of
from tests.tiny import save_tiny
from train.model import check_model, load_trainable_model
from train.output.usage import HELD_OUT, TRAINING, usage_map, usage_record

USED = Usage([1, 3], [[4, 0, 2, 2], [2, 2, 2, 2]], [1.0, 0.5], 4)


def test_a_record() -> None:
    record = usage_record(USED, TRAINING, 20)
    assert json.loads(json.dumps(record)) == {
        "kind": "train_usage",
        "step": 20,
        "tokens": 4,
        "router_entropy": 0.75,
        "dead_experts": 0.125,
        "layers": [1, 3],
        "entropy": [1.0, 0.5],
        "dead": [0.25, 0.0],
        "counts": [[4, 0, 2, 2], [2, 2, 2, 2]],
    }


def test_the_picture(tmp_path: Path) -> None:
    """Red is an expert without a token."""
    path = tmp_path / "usage.png"
    usage_map([{"kind": "train", "step": 1, "loss": 2.0}], path, "a run")
    assert not path.exists()
    even = usage_record(Usage([1], [[2, 2]], [0.1], 4), HELD_OUT, 0)
    sizes = {}
    for records in ([even], [even, even, usage_record(USED, TRAINING, 20)]):
        usage_map(records, path, "a run")
        pixels = torch.from_numpy(matplotlib.image.imread(path))[..., :3]
        sizes[len(records)] = pixels.shape[0]
        red = int((pixels == torch.tensor([1.0, 0.0, 0.0])).all(-1).sum())
        assert (red > 500) == (len(records) > 1)
    assert sizes[1] < sizes[3]


def test_models_with_and_without_experts(tmp_path: Path) -> None:
    save_tiny(tmp_path, "glm4_moe_lite", num_hidden_layers=2)
    setting = "output.expert_usage=2"
    model = load_trainable_model(config_of(tmp_path, setting), open_folder(tmp_path), CPU).model
    assert model.usage is not None and list(model.usage.routers) == ["model.layers.1.mlp.gate"]
    assert load_trainable_model(config_of(tmp_path), open_folder(tmp_path), CPU).model.usage is None
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_layer_types": ["dense"] * 2}))
    with pytest.raises(NibbleError, match="expert_usage is set, but no layer of this glm4_moe_lite has experts"):
        check_model(config_of(tmp_path, setting), open_folder(tmp_path), CPU)
