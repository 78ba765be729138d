"""What `benchmarks.gpu` trains at full size. Free of torch, so that `--help` and errors are instant."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

# Why an operation has no timing though nothing is wrong.
NOT_HERE = NOT_INSTALLED, NEEDS_CUDA = ("not installed", "needs CUDA")

RANK, ALPHA = 32, 16  # axolotl's examples/glm47-flash

# Sizes as config.json spells them; what is absent has the defaults of models/.
MODELS: dict[str, dict[str, Any]] = {
    "GLM-4.7-Flash": {"model_type": "glm4_moe_lite"},
    "Qwen3.5-35B-A3B, 8 of 40 layers": {"model_type": "qwen3_5_moe_text", "num_hidden_layers": 8},
    "Trinity-Mini, 10 of 32 layers": {
        "model_type": "afmoe",
        "num_hidden_layers": 10,
        "num_dense_layers": 2,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 1024,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "route_scale": 2.826,
        "sliding_window": 2048,
        "vocab_size": 200192,
        "mup_enabled": True,
    },
}
GLM, QWEN, TRINITY = MODELS


@dataclass(frozen=True)
class Case:
    """One measurement. storage: nf4 (with double quantisation) or int8. targets: of LoRA. adapter_dtype: of A and B.
    model: of MODELS; with `tiny`, the demo's model of that architecture.

    sequences of `length` tokens each are packed into one micro-batch. profile: also list the kernels of one step.
    memory_limit: GiB that torch may allocate, as on a smaller card. kernels: as train.kernels.
    """

    storage: str
    targets: tuple[str, ...]
    adapter_dtype: str = "float32"
    model: str = GLM
    optimizer: str = "adamw_8bit"
    sequences: int = 2
    length: int = 2048
    warmup: int = 2
    steps: int = 5
    device: str = "cuda"
    tiny: bool = False
    profile: bool = False
    memory_limit: float | None = None
    kernels: str = "auto"

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Case:
        given = json.loads(text)
        return Case(**given | {"targets": tuple(given["targets"])})


@dataclass(frozen=True)
class NamedCase:
    """published: peak GiB that axolotl's examples/glm47-flash states for 2 × 2048 tokens and rank 32; "" for others.

    Its attention cases name q_proj, k_proj, v_proj and o_proj, of which this architecture has only o_proj; here all
    five attention projections are trained.
    """

    name: str
    published: str
    case: Case


BOTH = ("attention", "experts")
# The commonest first, since the time may run out.
CASES = (
    NamedCase("nf4, attention", "24", Case("nf4", ("attention",))),
    NamedCase("nf4, attention + experts", "34", Case("nf4", BOTH)),
    NamedCase(f"{QWEN}: nf4, all mixers + experts", "", Case("nf4", ("linear_attention", *BOTH), model=QWEN)),
    NamedCase(f"{TRINITY}: nf4, attention + experts", "", Case("nf4", BOTH, model=TRINITY)),
    NamedCase("int8, attention", "35", Case("int8", ("attention",))),
    NamedCase("int8, attention + experts", "45 to 50", Case("int8", BOTH)),
    NamedCase("nf4, attention + experts, bfloat16 LoRA", "34", Case("nf4", BOTH, "bfloat16")),
)
