"""The config of a run: its keys, what may be combined, and reading it from YAML and `--set`.

Nothing heavy is imported here (no torch): a mistake in a config must show at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from quant.common.errors import NibbleError
from train.config import schema
from train.config import yaml_text as config_yaml
from train.config.errors import problems_of
from train.config.rules import FOUR_BIT, combination_problems
from train.config.yaml_text import Document, Place, Problem, dotted


def _from_home(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~/") else path


Text = Annotated[str, Field(min_length=1)]
# A shell leaves the ~ of `--set output.dir=~/runs` alone; a folder of that name would be made.
PathText = Annotated[Text, AfterValidator(_from_home)]
# YAML has lists only; a list becomes a tuple, while its items stay strictly typed.
Tuple = Strict(False)
Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


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
        description="Matrices that get LoRA: groups (attention, linear_attention, experts, shared_experts, dense_mlp, "
        "router) or names in the hub's spelling (o_proj, mlp.experts.gate_up_proj, mlp.gate.weight). One that matches "
        "nothing is an error.",
    )
    init_from: PathText | None = Field(
        default=None,
        description="Folder of an adapter in PEFT's format whose weights to start from; null: a fresh adapter.",
    )
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA).")
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Tuple, Field(min_length=1)] | None = Field(
        default=None, description="Numbers of the layers that get LoRA (PEFT's layers_to_transform); null: all."
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Type of the LoRA matrices.")


class DataConfig(Section):
    """the rows to learn from, JSONL or parquet; relative paths start at the current directory"""

    train: PathText = Field(description="File of training rows (.jsonl or .parquet).")
    eval: PathText | None = Field(
        default=None, description="File of held-out rows; null: data.eval_fraction of the training rows."
    )
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=0.1,
        description="Share of the training rows that is held out for evaluation; null: none. Left out beside data.eval "
        "it is null.",
    )
    format: Literal["messages", "prompt_completion", "text"] = Field(
        default="messages",
        description="What a row holds: messages (a chat: list of {role, content}; loss on the assistant's turns), "
        "prompt_completion (two texts; loss on the completion), text (loss on everything).",
    )
    fields: dict[str, Text] = Field(
        default_factory=dict,
        json_schema_extra={"default": {}},
        description="What the file calls a row's fields, where it differs: {prompt: question, completion: answer}. The "
        "names on the left are, by data.format: messages, tools, and role, content inside a message; prompt, "
        "completion; text.",
    )
    sequence_length: Annotated[int, Field(ge=2)] = Field(
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

    micro_batch_size: Annotated[int, Field(ge=1)] = Field(
        default=2, description="Sequences in one forward and backward pass; the most that a process gets at a time."
    )
    gradient_accumulation: Annotated[int, Field(ge=1)] = Field(
        default=4,
        description="Micro-batches in one optimiser step. The step's batch is train.micro_batch_size × this many "
        "sequences in all, dealt out over the processes, whatever their number: more processes make fewer passes each "
        "for the same step.",
    )
    epochs: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Passes over the training rows. Not used when train.max_steps is given."
    )
    max_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Optimiser steps of the whole run, over as many passes as that takes; null: train.epochs decides.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="adamw_8bit",
        description="adamw; with bitsandbytes' 8-bit state (adamw_8bit); with state that moves to host memory when the "
        "GPU's is short (paged_…, CUDA only).",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=2e-4, description="Peak learning rate, reached after the warm-up."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="After the warm-up: constant, or down to 0 at the last step (linear, cosine)."
    )
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="Share of the steps over which the learning rate rises from 0."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="AdamW's decoupled weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="Gradients are scaled down to this norm; null: no clipping."
    )
    betas: Annotated[tuple[Beta, Beta], Tuple] = Field(
        default=(0.9, 0.999), description="AdamW's decay rates of the two moments."
    )
    eps: Annotated[float, Field(gt=0)] = Field(
        default=1e-8, description="AdamW's epsilon, added to the root of the second moment."
    )
    activation_checkpointing: bool = Field(
        default=True, description="Recompute each layer in the backward pass instead of keeping its activations."
    )
    log_every: Annotated[int, Field(ge=1)] = Field(
        default=1, description="Steps between two log lines, which give the mean loss and gradient norm of these steps."
    )
    eval_every: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Steps between two evaluations; null: only before the first step and after the last one.",
    )
    save_every: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Steps between two checkpoints; null: only at the end, or when interrupted."
    )
    save_async: bool = Field(
        default=False,
        description="Write checkpoints in the background: training goes on after the tensors have been copied to host "
        "memory.",
    )
    keep_checkpoints: Annotated[int, Field(ge=1)] = Field(
        default=2, description="Newest checkpoints to keep; older ones are deleted."
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(
        default=0, description="Seed of the adapter's initial values, the held-out rows and the order of the data."
    )
    balance: Literal["none", "aux_loss", "bias_update"] = Field(
        default="none",
        description="Keep the load of experts even while routers are trained: aux_loss (an added loss, for softmax "
        "routers: Qwen), bias_update (the bias that takes part in choosing is moved after every step, for sigmoid "
        "routers: GLM, Trinity; full fine-tuning only), or not at all.",
    )
    balance_rate: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="aux_loss: what the added loss is multiplied by; null: router_aux_loss_coef of config.json, 0.001 "
        "where it has none. bias_update: how far a bias moves in a step; null: 0.001.",
    )
    resume: PathText = Field(
        default="auto",
        json_schema_extra={"x-wanted": "auto, never or the folder of a checkpoint"},
        description="auto: continue from the newest checkpoint in output.dir where there is one. never: start anew, "
        "refused while output.dir holds checkpoints. Otherwise the folder of the checkpoint to continue from (a folder "
        "named auto or never: ./auto, ./never).",
    )
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:[0-9]+)?)$")] | None = Field(
        default=None,
        json_schema_extra={"x-wanted": "cpu, cuda, cuda:N or null"},
        description="Where to train; null: cuda where there is one, else cpu.",
    )
    tensorboard: bool = Field(default=True, description="Write TensorBoard events into output.dir too.")


class ParallelConfig(Section):
    """how a run is spread over the processes that torchrun starts: replicate × expert × shard of them"""

    shard: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="In how many parts weights, gradients and optimiser state are cut (FSDP); a layer's parts are "
        "gathered when it is computed. null: what parallel.expert and parallel.replicate leave of the processes.",
    )
    expert: Annotated[int, Field(ge=1)] = Field(
        default=1,
        description="In how many ranges the experts are dealt out (expert parallelism): a process computes its own "
        "range only, and tokens travel to it. Above 1 where gathering the experts' weights takes longer than sending "
        "the tokens. Must divide the model's number of experts.",
    )
    replicate: Annotated[int, Field(ge=1)] = Field(
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
    lost_after: Annotated[float, Field(gt=0)] = Field(
        default=30.0,
        description="Seconds after which a process that gave no sign of life is taken for dead; the others then end "
        "with a message that names it.",
    )


class OutputConfig(Section):
    """where the run writes"""

    dir: PathText = Field(
        description="Folder for the adapter, checkpoints, metrics, plots and the resolved config. A relative path "
        "starts at the current directory."
    )


class Config(Section):
    """Config of a nibble training run"""

    model: ModelConfig
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    output: OutputConfig

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        found = combination_problems(self)
        if found:
            # The context takes the keys to `problems_of`, which knows the lines that they stand on.
            raise PydanticCustomError("combination", "{text}", {"text": "\n".join(t for _, t in found), "found": found})
        return self


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the config, as `--print-schema` writes it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Config of a YAML file with `KEY=VALUE` overrides laid over it.

    NibbleError with one line for each mistake: its file and line or its --set, the key, and what would be right.
    """
    if not Path(path).exists():
        near = schema.nearest(str(path), sorted(str(found) for found in Path(path).parent.glob("*.yaml")))
        raise NibbleError(f"{path}: no such file." + (f" Did you mean {near}?" if near else ""))
    return _validated(config_yaml.read_file(path), overrides)


def parse_config(text: str, overrides: Sequence[str] = (), name: str = "config") -> Config:
    """Like `load_config`, from YAML text; `name` stands for the file in messages."""
    return _validated(config_yaml.read_text(text, name), overrides)


def dump_config(config: Config) -> str:
    """The config as YAML with every key written out; `parse_config` gives the same config back."""
    return config_yaml.write_text(config.model_dump(mode="json"))


def _validated(document: Document, overrides: Sequence[str]) -> Config:
    described = config_schema()
    if document.values is None:
        document.values = {}
    if not isinstance(document.values, dict):
        raise NibbleError(f"{document.name}: got {schema.got(document.values)}, wanted sections: {_section_names()}")
    for name in Config.model_fields:
        # A section whose keys are all commented out reads as null.
        if name in document.values and document.values[name] is None:
            document.values[name] = {}
    found = list(document.problems)
    for number, text in enumerate(overrides):
        found += _override(document, text, number, described)
    try:
        config = Config.model_validate(document.values)
        if not found:
            return config
    except ValidationError as error:
        found += problems_of(error, document, described)
    raise NibbleError("\n".join(str(problem) for problem in sorted(set(found))))


def _section_names() -> str:
    return ", ".join(Config.model_fields)


def _override(document: Document, text: str, number: int, described: dict[str, Any]) -> list[Problem]:
    """Lay one `KEY=VALUE` over the document; returns what is wrong with it."""
    place = Place(1, number, f"--set {text}")
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key:
        return [Problem(place, "expected KEY=VALUE, as in --set train.max_steps=3")]
    path = tuple(key.split("."))
    if len(path) == 1 and key in Config.model_fields:
        first = next(iter(schema.sections(described)[key]["properties"]))
        return [Problem(place, f"'{key}' is a section; set one of its keys, as in --set {key}.{first}=…")]
    entry = schema.keys(described).get(".".join(path[:2]))
    if entry is None or len(path) > (3 if schema.takes_mapping(entry) else 2):
        return [Problem(place, f"unknown key '{key}'. {schema.suggest_key(key, described)}")]
    try:
        value = config_yaml.parse_value(value_text, place.text)
    except NibbleError as error:
        return [Problem(place, str(error).removeprefix(f"{place.text}: "))]
    section = document.values.setdefault(path[0], {})
    if not isinstance(section, dict):
        return []  # `train: 5` in the file is an error of its own
    if len(path) == 3 and not isinstance(section.get(path[1]) or {}, dict):
        whole = dotted(path[:2])
        return [Problem(place, f"{whole} is not a mapping here; set it whole: --set '{whole}={{{path[2]}: …}}'")]
    document.override(path, value, place)
    return []


def check_files(config: Config, rows: bool = True) -> None:
    """NibbleError for each local file that the config names and that isn't there. (model.path is the loader's.)

    rows: whether this process reads data.train and data.eval; of several only the first does.
    """
    here = f"Relative paths start at the current directory ({Path.cwd()})."
    missing = [
        f"{key}: {value}: no such file. {here}"
        for key, value in (("data.train", config.data.train), ("data.eval", config.data.eval))
        if rows and value is not None and not Path(value).exists()
    ]
    folders = {"adapter.init_from": config.adapter.init_from}
    if config.train.resume not in ("auto", "never"):
        folders["train.resume"] = config.train.resume
    missing += [
        f"{key}: {value}: no such folder. {here}"
        for key, value in folders.items()
        if value is not None and not Path(value).is_dir()
    ]
    if missing:
        raise NibbleError("\n".join(missing))
