"""Peak memory of merging, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert_helpers import run


@pytest.mark.slow
def test_memory_is_less_than_a_shard_and_a_stack(tmp_path: Path) -> None:
    result = run("-m", "tests.measure_merge", tmp_path)
    assert result.returncode == 0, result.stderr
    grown, total, shard, stack = (int(word) for word in result.stdout.split())
    assert total > 30 * 2**20
    assert grown < shard + stack, f"peak grew by {grown / 2**20:.1f} MiB"
