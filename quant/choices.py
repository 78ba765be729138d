"""The dtype and the device of a model, as a user names them."""

from __future__ import annotations

import torch

from quant.common.errors import FLOAT16, NibbleError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def named_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """float32 or bfloat16, given itself or by its name. Raises NibbleError for any other."""
    name = str(dtype).removeprefix("torch.")
    if name == "float16":
        raise NibbleError(f"{FLOAT16}.")
    if name not in DTYPES:
        raise NibbleError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def named_device(device: torch.device | str) -> torch.device:
    """The CPU or a GPU ("cpu", "cuda", "cuda:1"), with its index, so that it equals the device of its tensors.

    Raises NibbleError for a name that means nothing here or a device that this machine does not have.
    """
    name = str(device)
    try:
        device = torch.device(device)
    except RuntimeError:
        device = torch.device("meta")  # falls through to the error below
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise NibbleError(f"device '{name}' is not supported.\nChoose cpu, cuda or cuda:<number>.")
    if not torch.cuda.is_available():
        reason = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise NibbleError(
            f"device '{name}' is not available: {reason} (torch {torch.__version__}).\n"
            "Use cpu (in a config train.device: cpu), or install a torch with CUDA on a machine with an NVIDIA GPU."
        )
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise NibbleError(f"device '{name}' is not available: this machine has {count} (cuda:0 to cuda:{count - 1}).")
    return torch.device("cuda", index)
