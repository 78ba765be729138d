"""lm-eval's tasks on models of this project: python -m train.evaluate.harness run --model nibble --tasks …

The command is lm-eval's own, with all its options, in a process in which the model class `nibble` is registered;
lm-eval (0.4.13) finds model classes in its registry alone, which is public. In Python: `register()`, and then
lm_eval.simple_evaluate(model="nibble", model_args={"pretrained": …}, …).
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take their time
    from quant.common.interrupts import end_on_interrupt

    end_on_interrupt()

import os
import sys

from quant.common.errors import NibbleError
from quant.common.interrupts import raise_on_interrupt
from quant.common.terminal import exit_code, run_command


def register() -> None:
    """Make `nibble` a model of lm-eval. Raises NibbleError where lm-eval isn't installed."""
    try:
        import lm_eval.models  # noqa: F401  lm-eval's own, which it registers only while there are none
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise NibbleError(f"lm-eval can't be imported ({error}).\nInstall it: pip install 'nibble[eval]'") from error
    model_registry.register("nibble", target="train.evaluate.harness_model:NibbleLM")


def main() -> int:
    """Returns the exit code: 0, 2 for an error that the user can fix, 130 after Ctrl-C."""

    def body() -> int:
        register()
        raise_on_interrupt()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
        return 0

    return exit_code(body)


if __name__ == "__main__":
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as in train.__main__
    sys.exit(run_command(main))
