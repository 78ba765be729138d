"""In which order a stack's lora_B keeps its columns, and the option of commands that says it. Without torch."""

from __future__ import annotations

import argparse
from typing import Literal, get_args

# peft: column r·E + e is column r of expert e. expert-major: column e·R + r, as unsloth kept it.
Packing = Literal["peft", "expert-major"]
PACKINGS: tuple[Packing, ...] = get_args(Packing)


def add_layout_option(parser: argparse.ArgumentParser) -> None:
    """--layout: a `Packing`, or None."""
    parser.add_argument(
        "--layout",
        choices=PACKINGS,
        help="order of the experts in the adapter's lora_B (default: what the adapter says, else peft); expert-major: "
        "unsloth's until September 2026 (docs/merge.md)",
    )
