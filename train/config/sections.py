"""The sections of a config: every key with its type, its default and what it does.

Nothing heavy is imported in this folder (no torch): a mistake in a config must show at once.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, Strict, WithJsonSchema, model_validator

from models.adapters.packing import Packing
from models.blocks.groups import TARGET_GROUPS

FOUR_BIT = ("nf4", "fp4")


def _from_home(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~/") else path


Text = Annotated[str, Field(min_length=1)]
# A shell leaves the ~ of `--set output.dir=~/runs` alone; a folder of that name would be made.
PathText = Annotated[Text, AfterValidator(_from_home)]
# YAML has lists only; a list becomes a tuple, while its items stay strictly typed.
Tuple = Strict(False)
Rank = Annotated[int, Field(ge=1, le=2**16)]
Alpha = Annotated[float, Field(gt=0, le=1e6)]
# Beyond these a value is a slip of the pen: no run takes as many steps, or waits as long.
Steps = Annotated[int, Field(ge=1, le=10**9)]
Count = Annotated[int, Field(ge=1, le=2**16)]
Minutes = Annotated[float, Field(gt=0, le=1e6)]
Small = Annotated[float, Field(gt=0, le=1e3)]
Beta = Annotated[float, Field(ge=0, lt=1)]

Format = Literal["messages", "prompt_completion", "text"]

# Names that `data.fields` can map, per format; the first ones must be there in a row.
REQUIRED: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("tools", "role", "content", "system"),
    "prompt_completion": ("tools", "role", "content"),
}
# Those that are text, for which `data.fields` can join columns.
JOINED = ("prompt", "completion", "text", "system")


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """the checkpoint and how its frozen weights are kept"""

    path: PathText = Field(
        description="Hub id (zai-org/GLM-4.7-Flash), folder in the hub's format, or folder written by models.convert."
    )
    storage: Literal["none", "nf4", "fp4", "int8"] = Field(
        default="nf4",
        description="How frozen matrices are stored: none (as model.dtype), nf4 or fp4 (4 bit, blocks of 64), int8 (by "
        "row). Routers, norms, embedding and head are never quantised.",
    )
    double_quant: Annotated[bool, WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "null"}]})] = Field(
        default=True,
        description="Quantise the scales of the 4-bit blocks too (0.516 instead of 0.5625 bytes a weight). Left out or "
        "null it is true for nf4 and fp4, false otherwise.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Type of activations and of weights that are not quantised."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_double_quant(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("double_quant") is None:
            return {**values, "double_quant": values.get("storage", "nf4") in FOUR_BIT}
        return values


class AdapterConfig(Section):
    """what is trained: LoRA on chosen matrices, or everything"""

    kind: Literal["lora", "none"] = Field(
        default="lora",
        description="lora: train low-rank adapters on the frozen model. none: full fine-tuning; the other adapter keys "
        "are then not used, and model.storage must be none.",
    )
    rank: Rank | dict[str, Rank] = Field(
        default=32,
        description="LoRA rank: one number, or one per group of adapter.targets: {attention: 32, experts: 8}.",
    )
    alpha: Alpha | dict[str, Alpha] = Field(
        default=16.0, description="LoRA is scaled by alpha / rank. One number or one per group, like adapter.rank."
    )
    targets: Annotated[tuple[Text, ...], Tuple] = Field(
        default=("attention", "experts"),
        description=f"Matrices that get LoRA: groups ({', '.join(TARGET_GROUPS)}) or names in the hub's spelling "
        "(o_proj, mlp.experts.gate_up_proj, mlp.gate.weight). One that matches nothing is an error.",
    )
    init_from: PathText | None = Field(
        default=None,
        description="Folder of an adapter in PEFT's format whose weights to start from, or of a run that made one; "
        "null: a fresh adapter.",
    )
    init_layout: Packing | None = Field(
        default=None,
        description="Order of the experts in lora_B of adapter.init_from (docs/merge.md); null: as it says, or peft.",
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA).")
    layers: Annotated[tuple[Annotated[int, Field(ge=0, le=10**4)], ...], Tuple, Field(min_length=1)] | None = Field(
        default=None, description="Numbers of the layers that get LoRA (PEFT's layers_to_transform); null: all."
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Type of the LoRA matrices.")
    serve_with: Literal["vllm", "llamacpp"] | None = Field(
        default=None,
        description="Leave out of the groups of adapter.targets the matrices that this server can't serve LoRA on "
        "(docs/serving.md); null: train them, after a warning.",
    )


class WeightedFile(Section):
    """an entry of a list of files whose rows are to be repeated or sampled"""

    path: PathText
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0


RowFiles = PathText | Annotated[tuple[PathText | WeightedFile, ...], Tuple, Field(min_length=1)]
_ROW_FILES = "a file, a glob, or a non-empty list of these, each a path or {path: …, weight: a number > 0}"


class DataConfig(Section):
    """the rows to learn from; relative paths start at the current directory"""

    train: RowFiles = Field(
        json_schema_extra={"x-wanted": _ROW_FILES},
        description="File of training rows (.jsonl, .json or .csv, also with .gz, or .parquet), a glob, or a list of "
        "these. In a list, {path: more.jsonl, weight: 2.0} repeats the rows of a file; a weight below 1 takes that "
        "share of them, drawn by train.seed.",
    )
    eval: RowFiles | None = Field(
        default=None,
        json_schema_extra={"x-wanted": _ROW_FILES + ", or null"},
        description="Held-out rows, like data.train; null: data.eval_fraction of the training rows.",
    )
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=0.1,
        description="Share of the training rows that is held out for evaluation; null: none. Left out beside data.eval "
        "it is null.",
    )
    format: Format = Field(
        default="messages",
        description="What a row holds: messages (a chat: list of {role, content}; loss on the assistant's turns), "
        "prompt_completion (two texts; loss on the completion), text (loss on everything).",
    )
    fields: dict[str, Text] = Field(
        default_factory=dict,
        json_schema_extra={"default": {}},
        description="What the file calls a row's fields, where it differs: {prompt: question, completion: answer}. The "
        "names on the left are, by data.format: messages, tools, system, and role, content inside a message; prompt, "
        "completion (and of lists of messages tools, role, content); text. What is on the right of prompt, completion, "
        'text and system may join columns: "{instruction}\\n\\n{input}" (a brace: {{ or }}).',
    )
    template_variables: dict[Text, Annotated[JsonValue, WithJsonSchema({})]] = Field(
        default_factory=dict,
        json_schema_extra={"default": {}, "x-wanted": "a mapping of name to value"},
        description="Variables of the chat template, for every text that it writes: {enable_thinking: false}. One that "
        "the template doesn't read is an error, which lists those that it reads.",
    )
    sequence_length: Annotated[int, Field(ge=2, le=2**24)] = Field(
        default=2048,
        description="Tokens in a training sequence; a longer row is cut, with data.format: text split into several.",
    )
    packing: bool = Field(
        default=True,
        description="Fill each sequence with several rows; attention never crosses from one to another. false: one row "
        "a sequence.",
    )
    on_bad_row: Literal["skip", "error"] = Field(
        default="skip",
        description="A row that is malformed, empty or has nothing to learn: skip (reported and counted) or error.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("eval") is not None:
            values.setdefault("eval_fraction", None)
        if values.get("format") == "prompt/completion":
            values["format"] = "prompt_completion"
        return values


class TrainConfig(Section):
    """the optimisation"""

    micro_batch_size: Count = Field(
        default=2, description="Sequences in one forward and backward pass; the most that a process gets at a time."
    )
    gradient_accumulation: Count = Field(
        default=4,
        description="Micro-batches in one optimiser step. The step's batch is train.micro_batch_size × this many "
        "sequences in all, distributed over the processes, whatever their number: more processes make fewer passes "
        "each for the same step.",
    )
    epochs: Annotated[int, Field(ge=1, le=10**6)] = Field(
        default=1, description="Passes over the training rows. Not used when train.max_steps is given."
    )
    max_steps: Steps | None = Field(
        default=None,
        description="Optimiser steps of the whole run, over as many passes as that takes; null: train.epochs decides.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="adamw_8bit",
        description="adamw; with bitsandbytes' 8-bit state (adamw_8bit); with state that moves to host memory when the "
        "GPU's is short (paged_…, CUDA only).",
    )
    learning_rate: Small = Field(default=2e-4, description="Peak learning rate, reached after the warm-up.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="After the warm-up: constant, or down to 0 at the last step (linear, cosine)."
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Share of the steps over which the learning rate rises from 0."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = Field(
        default=0.0, description="AdamW's decoupled weight decay."
    )
    max_grad_norm: Annotated[float, Field(gt=0, le=1e12)] | None = Field(
        default=1.0, description="Gradients are scaled down to this norm; null: no clipping."
    )
    betas: Annotated[tuple[Beta, Beta], Tuple] = Field(
        default=(0.9, 0.999), description="AdamW's decay rates of the two moments."
    )
    eps: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1e-8, description="AdamW's epsilon, added to the root of the second moment."
    )
    activation_checkpointing: bool = Field(
        default=True, description="Recompute each layer in the backward pass instead of keeping its activations."
    )
    kernels: Literal["auto", "torch"] = Field(
        default="auto",
        description="On CUDA: auto uses this project's Triton kernels, each of which is first tried on the GPU against "
        "what it computes in torch's operations (the first run on a card takes a minute longer); torch uses none.",
    )
    cuda_graph: Literal["auto", "off"] = Field(
        default="auto",
        description="On one CUDA device with data.packing: auto records a micro-batch's pass as a CUDA graph and "
        "replays it, if the first replay gives the loss and gradient norm of the usual pass; off doesn't.",
    )
    log_every: Steps = Field(
        default=1, description="Steps between two log lines, which give the mean loss and gradient norm of these steps."
    )
    eval_every: Steps | None = Field(
        default=None,
        description="Steps between two evaluations; null: only before the first step and after the last one.",
    )
    keep_best: bool = Field(
        default=False,
        description="Keep the result of the evaluation with the lowest held-out loss in output.dir too: adapter-best, "
        "or model-best in full fine-tuning.",
    )
    patience: Count | None = Field(
        default=None,
        description="Finish early, after so many evaluations in a row without a lower held-out loss; null: never.",
    )
    patience_delta: Annotated[float, Field(ge=0, le=1e3)] = Field(
        default=0.0, description="By how much more than this a loss must be lower to count as such for train.patience."
    )
    save_every: Steps | None = Field(
        default=None,
        description="Steps between two checkpoints; null: by the clock alone (save_minutes), at the end and when "
        "interrupted.",
    )
    save_minutes: Minutes | None = Field(
        default=10.0,
        description="Minutes after the last checkpoint at which the next one is written, at the end of a step; null: "
        "never by the clock.",
    )
    save_async: bool = Field(
        default=False,
        description="Write checkpoints in the background: training goes on after the tensors have been copied to host "
        "memory.",
    )
    keep_checkpoints: Steps = Field(default=2, description="Newest checkpoints to keep; older ones are deleted.")
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(
        default=0, description="Seed of the adapter's initial values, the held-out rows and the order of the data."
    )
    balance: Literal["none", "aux_loss", "bias_update"] = Field(
        default="none",
        description="Keep the load of experts even while routers are trained: aux_loss (an added loss, for softmax "
        "routers: Qwen), bias_update (the bias that takes part in choosing is moved after every step, for sigmoid "
        "routers: GLM, Trinity; full fine-tuning only), or not at all.",
    )
    balance_rate: Small | None = Field(
        default=None,
        description="aux_loss: what the added loss is multiplied by; null: router_aux_loss_coef of config.json, 0.001 "
        "where it has none. bias_update: how far a bias moves in a step; null: 0.001.",
    )
    resume: PathText = Field(
        default="auto",
        json_schema_extra={"x-wanted": "auto, never or the folder of a checkpoint"},
        description="auto: continue from the newest checkpoint in output.dir if there is one. never: start at step 0; "
        "refused while output.dir holds checkpoints. Otherwise the folder of the checkpoint to continue from (a folder "
        "named auto or never: ./auto, ./never).",
    )
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]{1,4})?)$")] | None = Field(
        default=None,
        json_schema_extra={"x-wanted": "cpu, cuda, cuda:N or null"},
        description="Where to train; null: cuda where there is one, else cpu.",
    )
    tensorboard: bool = Field(default=True, description="Write TensorBoard events into output.dir too.")


class ParallelConfig(Section):
    """how a run is spread over the processes that torchrun starts: replicate × expert × shard of them"""

    shard: Count | None = Field(
        default=None,
        description="In how many parts weights, gradients and optimiser state are cut (FSDP); a layer's parts are "
        "gathered when it is computed. null: what parallel.expert and parallel.replicate leave of the processes.",
    )
    expert: Count = Field(
        default=1,
        description="In how many ranges the experts are distributed (expert parallelism): a process computes its own "
        "range only, and tokens travel to it. Above 1 where gathering the experts' weights takes longer than sending "
        "the tokens. Must divide the model's number of experts.",
    )
    replicate: Count = Field(
        default=1,
        description="Copies of the model, each cut over the other processes (HSDP). The number of machines, where a "
        "model fits one machine and the network between them is slow: only gradients cross it then.",
    )
    reshard_after_forward: bool = Field(
        default=True,
        description="Free a layer's gathered weights after its forward pass and gather them again for the backward "
        "pass. false: keep them in between, which is faster and takes the memory of the whole model.",
    )
    cpu_offload: bool = Field(
        default=False,
        description="Keep this process's weights, gradients and optimiser state in host memory; weights go to the GPU "
        "layer by layer. Slower; for a model that is larger than the memory of the GPUs, with one process too.",
    )
    lost_after: Minutes = Field(
        default=20.0,
        description="Seconds that a process waits in a training step or an evaluation for another one before it takes "
        "it for lost and ends with an error. Raise it where processes differ that much in speed.",
    )


class OutputConfig(Section):
    """where the run writes"""

    dir: PathText = Field(
        description="Folder for the adapter, checkpoints, metrics, plots and the resolved config. A relative path "
        "starts at the current directory."
    )
    expert_usage: Steps | None = Field(
        default=None,
        description="Steps between two training steps in which the tokens of each expert are counted; those of every "
        "evaluation then are too. In metrics.jsonl, and as expert_usage.png. null: not at all.",
    )
