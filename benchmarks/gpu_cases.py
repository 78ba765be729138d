"""What `benchmarks.gpu` trains at full size. Free of torch, so that `--help` and errors are instant."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

RANK, ALPHA = 32, 16  # axolotl's examples/glm47-flash


@dataclass(frozen=True)
class Case:
    """One measurement. storage: nf4 (with double quantisation) or int8. targets: of LoRA. adapter_dtype: of A and B.

    sequences of `length` tokens each are packed into one micro-batch. profile: also list the kernels of one step.
    memory_limit: GiB that torch may allocate, as on a smaller card.
    """

    storage: str
    targets: tuple[str, ...]
    adapter_dtype: str = "float32"
    optimizer: str = "adamw_8bit"
    sequences: int = 2
    length: int = 2048
    warmup: int = 2
    steps: int = 5
    device: str = "cuda"
    tiny: bool = False
    profile: bool = False
    memory_limit: float | None = None

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Case:
        given = json.loads(text)
        return Case(**given | {"targets": tuple(given["targets"])})


@dataclass(frozen=True)
class NamedCase:
    """published: peak GiB that axolotl's examples/glm47-flash states for 2 × 2048 tokens and rank 32.

    Its attention cases name q_proj, k_proj, v_proj and o_proj, of which this architecture has only o_proj; here all
    five attention projections are trained.
    """

    name: str
    published: str
    case: Case


BOTH = ("attention", "experts")
CASES = (
    NamedCase("nf4, attention", "24", Case("nf4", ("attention",))),
    NamedCase("nf4, attention + experts", "34", Case("nf4", BOTH)),
    NamedCase("int8, attention", "35", Case("int8", ("attention",))),
    NamedCase("int8, attention + experts", "45 to 50", Case("int8", BOTH)),
    NamedCase("nf4, attention + experts, bfloat16 LoRA", "34", Case("nf4", BOTH, "bfloat16")),
)
