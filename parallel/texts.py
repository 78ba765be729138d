"""Short texts exchanged between processes: errors, manifests, names of checkpoints."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_texts(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """The texts of all processes of `group`, by rank; all of them must call it. Without a process group: [text].

    They are sent as bytes, so that nothing is unpickled.
    """
    if not dist.is_initialized():
        return [text]
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = _gather(torch.tensor([len(data)]), group)
    width = max(1, int(torch.cat(lengths).max()))
    rows = _gather(torch.nn.functional.pad(data, (0, width - len(data))), group)
    return [bytes(row[: int(length)].tolist()).decode() for row, length in zip(rows, lengths, strict=True)]


def _gather(tensor: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, tensor, group)
    return rows
