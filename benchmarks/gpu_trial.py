"""The trial of our kernels before `benchmarks.gpu` measures, as every run does first: `python -m benchmarks.gpu_trial
DEVICE`. What it finds is remembered for the processes that come after. Prints what a run would say.
"""

from __future__ import annotations

import logging
import sys

from models.use_kernels import use_kernels
from parallel.device import choose_device


def main(device: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    use_kernels(choose_device(device))


if __name__ == "__main__":
    main(sys.argv[1])
