"""What is sent to the hub, and what keeps it from being sent. The hub is a server on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.adapters.files import save_adapter
from models.adapters.lora import add_lora
from models.adapters.targets import AdapterSpec
from models.convert.__main__ import main as convert_main
from models.export.__main__ import main as export_main
from models.hub_contents import contents
from models.hub_push import check_push, main, push
from models.load import load_model
from models.merge.__main__ import main as merge_main
from quant.common.errors import NibbleError
from tests.helpers import save_tiny_glm
from tests.hub_server import Hub, local_hub

PUSH = ["--push", "somebody/mine"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the hub's format, an adapter and a converted checkpoint."""
    made = tmp_path_factory.mktemp("push")
    save_tiny_glm(made / "model", num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=2)
    model = load_model(made / "model", storage="none", dtype=torch.float32)
    add_lora(model, AdapterSpec(("attention",), 2, 4.0))
    save_adapter(model, made / "adapter", "zai-org/GLM-4.7-Flash")
    assert convert_main([str(made / "model"), str(made / "nf4")]) == 0
    return made


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with local_hub() as made:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield made


def said(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr().err
    return shown[shown.index("error: ") :]


@pytest.mark.parametrize("name", ["adapter", "model", "nf4"])
def test_a_folder_arrives_as_it_is(folders: Path, hub: Hub, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folders / name), "somebody/mine"]) == 0
    private, files = hub.repositories["somebody/mine"]
    assert private
    assert files == {path.name: path.read_bytes() for path in (folders / name).iterdir()}
    assert len(hub.commits) == 1
    assert capsys.readouterr().out.endswith(f"{hub.endpoint}/somebody/mine\n")


def test_a_dry_run_lists_and_connects_to_nothing(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.__init__", lambda *a, **k: pytest.fail("it looked for the hub"))
    folder = Path(shutil.copytree(folders / "adapter", tmp_path / "adapter"))
    (folder / "README.md").write_text("# mine")
    (folder / "notes.txt").write_text("private")
    assert main([str(folder), "somebody/mine", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{folder}: an adapter, 3 files, ")
    for name in (*ADAPTER, "README.md"):
        assert f"  {name} " in shown
    assert "not sent: notes.txt\n" in shown
    assert shown.endswith("nothing was sent; a new repository somebody/mine would be private\n")


def test_a_base_that_only_this_machine_knows_is_named(folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "adapter", tmp_path / "adapter"))
    config = json.loads((folder / ADAPTER[0]).read_text())
    assert contents(folder).remarks == ()
    (folder / ADAPTER[0]).write_text(json.dumps({**config, "base_model_name_or_path": "/home/me/base"}))
    assert contents(folder).remarks == (
        "adapter_config.json names /home/me/base as its base: others need the base's hub id there",
    )


def test_what_is_not_whole_stays_here(
    folders: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = {name: Path(shutil.copytree(folders / name, tmp_path / name)) for name in ("adapter", "model", "nf4")}

    def error(folder: Path) -> str:
        assert main([str(folder), "somebody/mine"]) == 2
        return said(capsys)

    tensors = load_file(copies["adapter"] / ADAPTER[1])
    name = next(name for name in tensors if ".lora_A." in name)
    save_file({other: value for other, value in tensors.items() if other != name}, copies["adapter"] / ADAPTER[1])
    assert f", but not {name}." in error(copies["adapter"])
    tensors[name].view(-1)[0] = float("inf")
    save_file(tensors, copies["adapter"] / ADAPTER[1])
    assert f"{name} has values that are inf or NaN" in error(copies["adapter"])
    (copies["adapter"] / ADAPTER[1]).unlink()
    assert f"is no adapter: it has no {ADAPTER[1]}" in error(copies["adapter"])
    weights = copies["nf4"] / "rest.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "1 file missing or changed since it was written: rest.safetensors" in error(copies["nf4"])
    weights.write_bytes(data[:-1])
    assert "rest.safetensors has" in error(copies["nf4"])
    manifest = json.loads((copies["nf4"] / "nibble.json").read_text())
    (copies["nf4"] / "nibble.json").write_text(json.dumps({**manifest, "complete": False}))
    assert "the conversion isn't finished" in error(copies["nf4"])
    (copies["model"] / "model.safetensors").unlink()
    assert str(copies["model"]) in error(copies["model"])
    secret = tmp_path / "secret"
    secret.write_text("{}")
    linked = Path(shutil.copytree(folders / "model", tmp_path / "linked"))
    (linked / "generation_config.json").unlink()
    (linked / "generation_config.json").symlink_to(secret)
    assert "generation_config.json is a link out of the folder, and isn't sent" in error(linked)
    assert "is neither an adapter nor a checkpoint.\n" in error(tmp_path)
    assert f"Did you mean {copies['adapter']}?" in error(tmp_path)
    assert "is no folder.\n" in error(tmp_path / "gone")
    assert hub.repositories == {}


def test_without_a_token_nothing_is_begun(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert convert_main([str(folders / "model"), str(tmp_path / "out"), "--push", "somebody/mine"]) == 2
    message = said(capsys)
    assert message.startswith("error: there is no token for the Hugging Face hub, so that nothing can be pushed.\n")
    assert "`hf auth login`, or set HF_TOKEN" in message
    assert not (tmp_path / "out").exists()


def test_what_the_token_may_not_do_shows_before_the_work(hub: Hub) -> None:
    check_push("somebody/mine")
    check_push("Team/ours")
    with pytest.raises(
        NibbleError, match=r"the token is somebody's, and other is none of their organisations \(team\)"
    ):
        check_push("other/thing")
    hub.role = "read"
    with pytest.raises(NibbleError, match=r"^somebody/mine can't be pushed to: the token may only read\.\nLog in"):
        check_push("somebody/mine")
    hub.fails_at = "whoami"
    with pytest.raises(NibbleError, match=r"^somebody/mine can't be pushed to: HfHubHTTPError: .*500"):
        check_push("somebody/mine")
    for name in ("mine", "a/b/c", "some body/mine", "somebody/mi--ne"):
        with pytest.raises(NibbleError, match=r"is no name of a repository\. Wanted: USER/NAME"):
            check_push(name)
    check_push(None)
    with pytest.raises(NibbleError, match="--public is about --push"):
        check_push(None, public=True)


def test_a_repository_that_is_there(folders: Path, hub: Hub) -> None:
    hub.repositories["somebody/mine"] = (False, {"README.md": b"# theirs"})
    with pytest.raises(NibbleError, match=r"somebody/mine is public\. Give --public to push to it"):
        push(folders / "adapter", "somebody/mine")
    assert push(folders / "adapter", "somebody/mine", public=True) == f"{hub.endpoint}/somebody/mine"
    assert sorted(hub.repositories["somebody/mine"][1]) == ["README.md", *ADAPTER]
    # transformers would load model.safetensors in place of shards.
    hub.repositories["team/ours"] = (True, {"model.safetensors": b"old"})
    with pytest.raises(
        NibbleError, match=r"team/ours holds other weights, .*: model\.safetensors\.\nDelete them there"
    ):
        push(folders / "nf4", "team/ours")
    assert list(hub.repositories["team/ours"][1]) == ["model.safetensors"]


def test_a_hub_that_fails_on_the_way(folders: Path, hub: Hub) -> None:
    hub.fails_at = "/commit/"
    with pytest.raises(NibbleError, match="somebody/mine can't be pushed to: HfHubHTTPError: "):
        push(folders / "adapter", "somebody/mine")
    assert hub.repositories["somebody/mine"][1] == {}


@pytest.mark.parametrize(
    ("command", "written"),
    [
        (lambda made, out: merge_main([str(made / "model"), str(made / "adapter"), str(out), *PUSH]), "config.json"),
        (
            lambda made, out: export_main(
                [str(made / "adapter"), str(out), "--for", "peft", "--model", str(made / "model"), *PUSH]
            ),
            ADAPTER[1],
        ),
    ],
    ids=["merge", "export"],
)
def test_other_commands_push_what_they_made(
    folders: Path, hub: Hub, tmp_path: Path, command: Callable[[Path, Path], int], written: str
) -> None:
    out = tmp_path / "out"
    hub.role = "read"
    assert command(folders, out) == 2 and not out.exists()
    hub.role = "write"
    assert command(folders, out) == 0
    files = hub.repositories["somebody/mine"][1]
    assert written in files and files == {path.name: path.read_bytes() for path in out.iterdir()}


def test_convert_pushes_what_it_made(
    folders: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "int8"
    arguments = [str(folders / "model"), str(out), "--storage", "int8", "--json"]
    assert convert_main([*arguments, "--push", "somebody/mine", "--public"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["destination"] == str(out)
    assert f"pushed {out} to {hub.endpoint}/somebody/mine\n" in shown.err
    private, files = hub.repositories["somebody/mine"]
    assert not private and set(files) == {path.name for path in out.iterdir()}
    assert convert_main(["--verify", str(out), "--push", "somebody/mine"]) == 2
    assert f"python -m models.hub_push {out} USER/NAME" in said(capsys)
