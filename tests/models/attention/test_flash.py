"""Which flash attention is used on CUDA: one that is absent, wrong or raises leaves torch's own in place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import attention

from models import use_kernels
from models.attention import flash
from quant.kernels.language import recording

CPU = torch.device("cpu")


def test_the_trial_accepts_rounding_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU every trial compares bfloat16 with float32, by torch's scaled_dot_product_attention."""
    monkeypatch.setattr(flash, "use", lambda name: None)
    assert flash.failure("FA3", CPU) is None
    whole = flash.causal_attention

    def wider(query: torch.Tensor, *rest: object) -> torch.Tensor:
        window = 41 if rest[-1] == 40 and query.dtype == torch.bfloat16 else rest[-1]
        return whole(query, *rest[:-1], window)  # type: ignore[arg-type]

    monkeypatch.setattr(flash, "causal_attention", wider)
    assert str(flash.failure("FA3", CPU)).startswith("trial ")


def test_a_package_that_is_absent_is_what_is_wrong() -> None:
    """By torch's own registration, which knows both."""
    assert {"FA3", "FA4"} <= set(attention.list_flash_attention_impls())
    if flash.installed("FA3") is not None:
        pytest.skip("flash-attn-3 is installed")
    assert flash.failure("FA3", CPU) == "ModuleNotFoundError: No module named 'flash_attn_interface'"
    assert attention.current_flash_attention_impl() is None


@pytest.mark.parametrize(
    ("major", "versions", "expected"),
    [
        (9, {"FA3": "3.0.0", "FA4": "4.0.0b36"}, "FA3"),
        (9, {"FA4": "4.0.0b36"}, None),
        (10, {"FA3": "3.0.0", "FA4": "4.0.0b36"}, "FA4"),
        (8, {"FA3": "3.0.0", "FA4": "4.0.0b36"}, None),
        (9, {}, None),
    ],
)
def test_what_is_offered(
    major: int, versions: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "installed", versions.get)
    with recording((major, 0)):
        assert flash.offered(torch.device("cuda", 0)) == expected
    assert flash.offered(CPU) is None


@pytest.mark.parametrize("wrong", [{}, {"FA3": "trial 3 differs"}, "raises now"])
def test_what_a_run_uses_and_says(
    wrong: dict[str, str] | str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    used: list[str | None] = []
    tried: list[str] = []

    def use(name: str | None) -> None:
        if name is not None and wrong == "raises now":
            raise ImportError("undefined symbol")
        used.append(name)

    monkeypatch.setattr(flash, "offered", lambda device: "FA3")
    monkeypatch.setattr(flash, "use", use)
    monkeypatch.setattr(use_kernels, "_record", lambda device: SimpleNamespace())
    monkeypatch.setattr(use_kernels, "_recall", lambda path, names: None)
    monkeypatch.setattr(use_kernels, "_remember", lambda path, names, found: None)
    monkeypatch.setattr(use_kernels, "use", tried.extend)
    monkeypatch.setattr(use_kernels, "try_apart", lambda command, names: dict(wrong) if wrong != "raises now" else {})
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an H100")
    with caplog.at_level("INFO", logger="nibble"):
        use_kernels.use_kernels(torch.device("cuda", 0))
    assert set(tried) == set(use_kernels.KERNELS)
    assert used == [None, "FA3"] if not wrong else [None]
    said = caplog.text
    if not wrong:
        assert "attention on an H100: FA3" in said and "not used" not in said
    else:
        assert "torch's FlashAttention 2" in said
        reason = "trial 3 differs" if isinstance(wrong, dict) else "ImportError: undefined symbol"
        assert f"FA3 is not used on an H100, where torch's FlashAttention 2 is: {reason}" in said
