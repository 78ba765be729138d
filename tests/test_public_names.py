"""What `from models import …` and `from train import …` give, and what they say to arguments that can't work."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import models
import train
from models import AdapterSpec, convert, load_adapter, load_model, save_adapter
from models.adapters.lora import add_lora
from quant.choices import named_device, named_dtype
from quant.common.errors import FLOAT16, NibbleError
from tests.helpers import random_tokens, save_tiny_glm

ROOT = Path(__file__).parent.parent
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without CUDA")
NO_CUDA = r"^device 'cuda' is not available: .*CUDA.*\nUse cpu \(in a config train\.device: cpu\), or install a torch"


def python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout.strip()


@pytest.mark.parametrize("package", [models, train])
def test_names_are_those_of_their_modules(package: ModuleType) -> None:
    """The same in the table of modules and for type checkers."""
    homes = package._HOMES
    for name, home in homes.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name)
    typed = {
        alias.name: node.module
        for block in ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == homes
    assert homes.keys() <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'lode_model'"):
        package.lode_model  # noqa: B018


def test_naming_them_imports_no_torch() -> None:
    assert python(
        "import sys, models, train; dir(models), dir(train), models.convert; print('torch' in sys.modules)"
    ) == ("False")


@pytest.mark.parametrize(
    "first",
    [
        "pass",
        "import models.convert",
        "import models, models.convert",
        "from models.convert import convert",
        "import models.convert.__main__",
        "import models.convert as module",
        "import importlib; importlib.import_module('models.convert')",
        "import runpy, sys; sys.argv = ['', '']; runpy.run_module('models.convert')",
    ],
)
def test_convert_is_the_function_whatever_was_imported_before(first: str) -> None:
    code = (
        f"{first}\nimport models\nfrom models import convert\nprint(convert is models.convert, type(convert).__name__)"
    )
    assert python(code) == "True function"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "inner" / "tiny"
    save_tiny_glm(folder)
    return folder


def test_dtypes_by_name(hub: Path, tmp_path: Path) -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert named_dtype(name) == named_dtype(dtype) == dtype
        assert AdapterSpec(("attention",), 2, 4, dtype=name) == AdapterSpec(("attention",), 2, 4, dtype=dtype)
        convert(hub, tmp_path / name, "int8", name)
        model = load_model(tmp_path / name, "int8", name)
        assert model.dtype == dtype
        add_lora(model, AdapterSpec(("attention",), 2, 4, dtype=name))
        lora = model.get_submodule("model.layers.0.self_attn.o_proj").lora
        assert isinstance(lora, torch.nn.Module) and {p.dtype for p in lora.parameters()} == {dtype}
    save_adapter(model, tmp_path / "adapter", "base")
    again = load_model(hub, "none", "float32")
    assert load_adapter(again, tmp_path / "adapter", dtype="float32").dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("float16", f"^{re.escape(FLOAT16)}\\.$"),
        (torch.float16, f"^{re.escape(FLOAT16)}\\.$"),
        ("bf16", r"^unknown dtype 'bf16': choose one of float32, bfloat16$"),
        (torch.int8, r"^unknown dtype 'int8': choose one of float32, bfloat16$"),
        (None, r"^unknown dtype 'None': choose one of float32, bfloat16$"),
    ],
)
def test_other_dtypes_are_refused(dtype: Any, message: str, hub: Path, tmp_path: Path) -> None:
    with pytest.raises(NibbleError, match=message):
        load_model(hub, "none", dtype)
    with pytest.raises(NibbleError, match=message):
        convert(hub, tmp_path / "x", "nf4", dtype)
    with pytest.raises(NibbleError, match=message):
        AdapterSpec(("attention",), 2, 4, dtype=dtype)
    assert not (tmp_path / "x").exists()


def test_other_storages_are_refused(hub: Path, tmp_path: Path) -> None:
    message = r"^unknown storage 'nf5': choose one of none, nf4, fp4, int8$"
    with pytest.raises(NibbleError, match=message):
        load_model(hub, "nf5")
    with pytest.raises(NibbleError, match=message):
        convert(hub, tmp_path / "x", "nf5")


@without_cuda
def test_cuda_where_there_is_none(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(NibbleError, match=NO_CUDA):
        load_model(hub, device="cuda")
    with pytest.raises(NibbleError, match=NO_CUDA):
        convert(hub, tmp_path / "x", device=torch.device("cuda"))


def test_devices_by_name() -> None:
    assert named_device("cpu") == named_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(NibbleError, match=r"^device 'mps' is not supported\.\nChoose cpu, cuda or cuda:<number>\.$"):
        named_device(torch.device("mps"))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            torch.zeros(5, dtype=torch.int64),
            r"^tokens are int64 \[5\]; the model takes int64 \[B, T\], a document per row\."
            r"\nA single document is tokens\[None\]\.$",
        ),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"^tokens are int64 \[1, 2, 3\]; .* a document per row\.$"),
        (torch.zeros(2, 0, dtype=torch.int64), r"^tokens are int64 \[2, 0\]; the model takes int64 \[B, T\]"),
        (torch.zeros(2, 3), r"^tokens are float32 \[2, 3\]; the model takes int64 \[B, T\]"),
        (
            torch.tensor([[3, 128]]),
            r"^tokens are 3 to 128; the model's vocabulary has 0 to 127\.\nDo tokenizer and model belong together\?$",
        ),
        (torch.tensor([[-100, 7]]), r"^tokens are -100 to 7; the model's vocabulary has 0 to 127\.\n"),
    ],
)
def test_tokens_that_are_no_batch(tokens: torch.Tensor, message: str, hub: Path) -> None:
    model = load_model(hub, "none", "float32")
    with pytest.raises(NibbleError, match=message):
        model(tokens)


@torch.no_grad()
def test_int32_tokens_are_tokens(hub: Path) -> None:
    model, tokens = load_model(hub, "none", "float32"), random_tokens((2, 5))
    assert torch.equal(model(tokens.to(torch.int32)), model(tokens))
