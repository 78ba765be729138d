"""README.md of an adapter's folder: what huggingface_hub reads of it, and whose it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.config_helpers import MINIMAL
from tests.hub_server import local_hub
from tests.run_helpers import World, losses, make_world, settings
from train.__main__ import main
from train.config.load import parse_config
from train.output.model_card import Trained, model_card, write_card

SHORT = {"model__storage": "none", "train__max_steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Path]:
    folder = tmp_path_factory.mktemp("card")
    world = make_world(folder)
    assert main(settings(world, folder / "run", **SHORT)) == 0
    return world, folder / "run"


def test_the_hub_reads_it() -> None:
    rows = "data.train=[a/rows.jsonl, {path: b|.csv, weight: 2}]"
    config = parse_config(MINIMAL, ["adapter.rank={attention: 8, experts: 4}", rows])
    losses = (("before the first step", 2.5), ("of this result", 1.25))
    unserved = ["vLLM can't serve LoRA on x."]
    text = model_card(config, Trained("zai-org/GLM-4.7-Flash", 30, 40, losses, unserved=unserved))
    card = ModelCard(text)
    assert card.data.base_model == "zai-org/GLM-4.7-Flash"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["lora", "qlora", "mixture-of-experts", "nibble"]
    assert "| held-out loss, nats per labelled token | |" in card.text
    assert "| of this result | 1.2500 |" in card.text
    assert "Step 30 of 40" in card.text
    assert "| training rows | `rows.jsonl`, `b\\|.csv` × 2 (messages) |" in card.text
    assert "| rank | attention 8, experts 4 |" in card.text
    assert "- vLLM can't serve LoRA on x.\n" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("zai-org/GLM-4.7-Flash"), "ADAPTER")' in card.text
    assert "python -m models.merge zai-org/GLM-4.7-Flash ADAPTER OUT\n" in card.text


def test_a_base_that_is_a_folder_is_no_hub_id(tmp_path: Path) -> None:
    text = model_card(parse_config(MINIMAL), Trained(str(tmp_path / "my base"), 1, 1, vision_language=True))
    card = ModelCard(text)
    assert card.data.base_model is None
    assert "Base model: `my base`." in card.text
    assert str(tmp_path) not in text
    assert 'AutoModelForImageTextToText.from_pretrained("BASE"), "ADAPTER")' in card.text


def test_a_checkpoint_and_a_run_that_was_extended() -> None:
    config = parse_config(MINIMAL, ["adapter.kind=none", "model.storage=none", "train.learning_rate=1e-5"])
    card = ModelCard(model_card(config, Trained("runs/base/model", 3, 3, extension="extended from step 2 to 3: …")))
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["mixture-of-experts", "nibble"]
    assert "# `base/model`, fully fine-tuned\n" in card.text
    assert "| adapted | nothing: all weights are trained |" in card.text
    assert "| learning rate, then | extended from step 2 to 3: … |" in card.text
    assert "rank" not in card.text and "PeftModel" not in card.text and "BASE" not in card.text
    assert 'model = AutoModelForCausalLM.from_pretrained("MODEL")' in card.text


def test_a_run_writes_it(run: tuple[World, Path]) -> None:
    world, out = run
    text = (out / "adapter" / "README.md").read_text()
    before, after = losses(out, "eval")
    assert f"| before the first step | {before:.4f} |\n| of this result | {after:.4f} |\n" in text
    assert "Step 2 of 2" in text and "`rows.jsonl`" in text
    assert str(world.rows.parent) not in text
    # GLM-4.7-Flash's latent attention.
    assert "\n- vLLM computes without LoRA on `kv_b_proj`: " in text
    assert "\n- llama.cpp computes without LoRA on `q_a_proj`, `q_b_proj`, `kv_a_proj_with_mqa`: " in text


def test_what_somebody_wrote_stays(tmp_path: Path) -> None:
    notes: list[str] = []
    readme = tmp_path / "README.md"
    write_card(tmp_path, "# one\n", notes.append)
    write_card(tmp_path, "# two\n", notes.append)
    assert notes == [] and readme.read_text().startswith("# two\n")
    for text in ("# mine\n", readme.read_text().replace("two", "too"), readme.read_text() + "more\n"):
        readme.write_text(text)
        write_card(tmp_path, "# three\n", notes.append)
        assert readme.read_text() == text
        assert notes.pop() == f"{readme} was not written here, or was changed: it stays, and no model card is written"
    successor = tmp_path / "successor"
    successor.mkdir()
    write_card(successor, "# four\n", notes.append, before=tmp_path)
    assert (successor / "README.md").read_text() == readme.read_text()


def test_a_changed_card_makes_no_other_result(run: tuple[World, Path], capsys: pytest.CaptureFixture[str]) -> None:
    world, out = run
    (out / "adapter" / "README.md").write_text("# mine\n")
    assert main(settings(world, out, **SHORT)) == 0
    assert "; there is nothing left to do." in capsys.readouterr().out


def test_the_result_of_a_run_is_pushed(
    run: tuple[World, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world, out = run
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with local_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        assert main([*settings(world, out, **SHORT), "--push", "somebody/mine"]) == 0
        assert hub.repositories["somebody/mine"] == (
            True,
            {path.name: path.read_bytes() for path in (out / "adapter").iterdir()},
        )
        # Nothing is trained for a repository that can't be pushed to.
        assert main([*settings(world, out.with_name("other"), **SHORT), "--push", "nobody/mine"]) == 2
    assert "the token is somebody's, and nobody is none of their organisations" in capsys.readouterr().err
    assert not (out.with_name("other") / "metrics.jsonl").exists()
    with pytest.raises(SystemExit):
        main([*settings(world, out, **SHORT), "--push", "somebody/mine", "--check"])


def test_a_run_starts_from_the_folder_of_another(run: tuple[World, Path], tmp_path: Path) -> None:
    world, out = run
    assert main(settings(world, tmp_path / "second", **SHORT, adapter__init_from=str(out))) == 0
    assert losses(tmp_path / "second", "eval")[0] == losses(out, "eval")[-1]
