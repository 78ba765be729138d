"""What `benchmarks.gpu` trains at full size. Free of torch, so that `--help` and errors are instant, and of
all that the peer's environment hasn't.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

# Why an operation has no timing though nothing is wrong.
NOT_HERE = NOT_INSTALLED, NEEDS_CUDA = ("not installed", "needs CUDA")

OUT_OF_MEMORY = "out of memory"
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
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
}
GLM, QWEN35, TRINITY, QWEN3 = MODELS


def config_of(model: str, tiny: bool) -> dict[str, Any]:
    """config.json of one of MODELS; with `tiny` of the demo's model of that architecture."""
    if not tiny:
        return MODELS[model]
    from train.demo.models import demo_model

    return demo_model(MODELS[model]["model_type"]).config


@dataclass(frozen=True)
class Case:
    """One measurement on a model that is there: sequences of `length` tokens each in one micro-batch.

    targets, rank, adapter_dtype: of LoRA. kernels: as train.kernels. graph: passes are replayed as a CUDA graph.
    words: of the peer, see gpu_peer.py.
    published: peak GiB that axolotl's examples/glm47-flash states for 2 × 2048 tokens and rank 32; "" for others. Its
    attention cases name q_proj, k_proj, v_proj and o_proj, of which this architecture has only o_proj; here all five
    attention projections are trained.
    """

    targets: tuple[str, ...]
    adapter_dtype: str = "float32"
    rank: int = RANK
    sequences: int = 2
    length: int = 2048
    kernels: str = "auto"
    graph: bool = False
    words: tuple[str, ...] = ()
    published: str = ""

    @property
    def name(self) -> str:
        parts = [f"{' + '.join(self.targets)} r{self.rank}", f"{self.adapter_dtype} LoRA"]
        parts += [f"{self.sequences} × {self.length}", *self.words]
        parts += ["torch's forms"] if self.kernels == "torch" else []
        return ", ".join([*parts, "CUDA graph"] if self.graph else parts)


@dataclass(frozen=True)
class Group:
    """Cases on one model, which one process builds once. storage: nf4 (with double quantisation) or int8. seconds: its
    share of the time. peer: made and trained by transformers, PEFT and bitsandbytes.
    """

    model: str
    storage: str
    seconds: float
    cases: tuple[Case, ...]
    peer: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}, {self.storage}{', the peer' if self.peer else ''}"


@dataclass(frozen=True)
class Request:
    """What a process is given. warmup: steps before the measured ones. profile: also list the kernels of one step.
    memory_limit: GiB that torch may allocate, as on a smaller card.
    """

    group: Group
    device: str = "cuda"
    tiny: bool = False
    warmup: int = 2
    steps: int = 5
    profile: bool = False
    memory_limit: float | None = None

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Request:
        given = json.loads(text)
        group = given["group"]
        cases = (case | {"targets": tuple(case["targets"]), "words": tuple(case["words"])} for case in group["cases"])
        return Request(**given | {"group": Group(**group | {"cases": tuple(Case(**case) for case in cases)})})


ATTENTION, BOTH = ("attention",), ("attention", "experts")
MIXERS_TOO = ("linear_attention", *BOTH)
LONG: dict[str, Any] = {"sequences": 1, "length": 8192}
# The first process also compiles the kernels for its sizes, some 45. flash-linear-attention tunes its own for a minute
# or longer: what uses it comes last.
GROUPS = (
    Group(
        GLM, "nf4", 155,
        (
            Case(ATTENTION, published="24"),
            Case(BOTH, published="34"),
            Case(BOTH, "bfloat16", published="34"),
            Case(BOTH, **LONG),
            Case(BOTH, "bfloat16", graph=True),
            Case(BOTH, "bfloat16", **LONG),
            Case(BOTH, "bfloat16", **LONG, graph=True),
            Case(BOTH, "bfloat16", kernels="torch", published="34"),
        ),
    ),
    Group(GLM, "int8", 30, (Case(BOTH, published="45 to 50"), Case(BOTH, "bfloat16"), Case(ATTENTION, published="35"))),
    Group(QWEN3, "nf4", 30, (Case(BOTH, rank=16), Case(BOTH, "bfloat16", rank=16))),
    Group(TRINITY, "nf4", 20, (Case(BOTH), Case(BOTH, "bfloat16"), Case(BOTH, **LONG))),
    Group(
        QWEN35, "nf4", 40,
        (Case(MIXERS_TOO), Case(MIXERS_TOO, "bfloat16"), Case(MIXERS_TOO, "bfloat16", graph=True)),
    ),
)  # fmt: skip
PEER = Group(
    GLM, "nf4", 80,
    (
        Case(ATTENTION, published="24"),
        Case(BOTH, published="34"),
        Case(BOTH, words=("autocast",)),
        Case(BOTH, **LONG),
        Case(BOTH, words=("repaired",)),
    ),
    peer=True,
)  # fmt: skip
