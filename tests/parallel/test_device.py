"""The device of a run: choice, name, memory."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import reset_peak_memory
from parallel.device import choose_device, device_name, peak_memory_bytes
from quant.common.errors import NibbleError

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without CUDA")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is reset through Linux's /proc")


def test_cpu_is_a_choice() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cpu:0") == torch.device("cpu")


def test_none_takes_cuda_where_there_is_one() -> None:
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@without_cuda
def test_missing_cuda_is_named() -> None:
    with pytest.raises(NibbleError, match=r"device 'cuda' is not available: .*CUDA.*\n.*train\.device: cpu"):
        choose_device("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the message is for machines with CUDA")
def test_missing_cuda_index_is_named() -> None:
    with pytest.raises(NibbleError, match=r"device 'cuda:99' is not available: this machine has"):
        choose_device("cuda:99")


@pytest.mark.parametrize("name", ["gpu", "meta", "mps", "cuda:x"])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(NibbleError, match=rf"device '{name}' is not supported"):
        choose_device(name)


def test_device_name_is_the_makers() -> None:
    name = device_name(torch.device("cpu"))
    assert name
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "model name" in cpuinfo.read_text():
        assert name in cpuinfo.read_text()


@linux
def test_peak_memory_sees_an_allocation() -> None:
    device = torch.device("cpu")
    size = 64 * 2**20
    if not reset_peak_memory(device):
        pytest.skip("/proc/self/clear_refs is not writable here")
    before = peak_memory_bytes(device)
    with mmap.mmap(-1, size) as block:  # goes back to the system at once, unlike malloc's
        for _ in range(size // 2**20):
            block.write(b"x" * 2**20)
    assert size * 0.9 < peak_memory_bytes(device) - before < size * 1.5
    assert reset_peak_memory(device)
    assert peak_memory_bytes(device) - before < size * 0.5
