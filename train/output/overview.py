"""The texts that a run prints before its first step and after its last one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from models.adapters.targets import layer_of
from models.attention.delta_kernels import usable
from models.attention.fla import uses_fla
from models.checkpoint.native import describe
from models.decoder import CausalLM
from parallel.device import device_name
from parallel.mesh import MeshSizes
from parallel.shards import local_tensor
from quant.common.words import counted, format_bytes, format_seconds, table
from train.config.load import Config
from train.data.load import Data
from train.output.parameter_table import GroupRow, WholeTensor, parameter_table, whole_tensors
from train.schedule import learns

_GROUP_NAMES = {
    "linear_attention": "linear attention",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "dense_mlp": "dense layers",
    "router": "routers",
    "norm": "norms",
}


def model_text(
    model: CausalLM,
    name: str,
    folder: Path,
    device: torch.device,
    sizes: MeshSizes | None = None,
    machines: int = 1,
) -> str:
    """Name, storage and device of the model, then the table of its parameter groups.

    sizes: how the model is sharded over processes, None when it isn't. machines: that the processes run on.
    """
    sizes = sizes or MeshSizes()
    processes = sizes.replicate * sizes.parts
    where = f"{processes} × {device_name(device)}"
    if device.type == "cpu":
        threads = counted(torch.get_num_threads(), "thread")
        where = f"{where}, {threads} each" if processes > 1 else f"{device_name(device)}, {threads}"
    if machines > 1:
        where += f" ({machines} machines)"
    stored = describe(model.spec, model.dtype).removeprefix("none, ")
    title = f"{Path(name).name} ({model.model_type}) from {folder} · {stored} · {where}"
    header = ("group", "parameters", "stored", "size", "trained", "")
    groups = parameter_table(model)
    text = f"{title}\n\n{table([header, *map(_cells, groups)], right=(1, 3, 4))}\n"
    if processes > 1:
        share = "holds the whole model" if sizes.parts == 1 else f"holds 1/{sizes.parts} of the weights"
        text += (
            f"\n  processes {processes} = {sizes.replicate} replicate × {sizes.expert} expert × {sizes.shard} shard; "
            f"each {share}\n"
        )
    if device.type == "cuda" and any(row.group == "linear_attention" for row in groups):
        way = "torch, slower than flash-linear-attention (pip install -e '.[fla]')"
        if uses_fla(device, model.dtype):
            way = "flash-linear-attention"
        elif usable(device, model.dtype):
            way = "kernels of this project"
        text += f"\n  gated delta rule by {way}\n"
    return text


def _cells(row: GroupRow) -> tuple[str, ...]:
    ranks = ", ".join(f"r{rank}" for rank in row.ranks)
    return (
        _GROUP_NAMES.get(row.group, row.group),
        f"{row.parameters:,}",
        "" if row.group == "total" else " + ".join(row.stored),
        format_bytes(row.nbytes),
        f"{row.trained:,}" if row.trained else "–",
        f"LoRA {ranks}" if ranks and row.group != "total" else "",
    )


def data_text(data: Data, config: Config, skipped_path: Path) -> str:
    """How many rows are trained on, held out, skipped, cut or split."""
    length, examples = config.data.sequence_length, data.examples
    sequences = counted(len(data.packing), "packed sequence" if config.data.packing else "sequence")
    text = (
        f"  data      {counted(examples.total_rows, 'row')} → {sequences} of at most {length:,} tokens "
        f"({data.packing.fill:.1%} filled)"
    )
    text += f"; {counted(data.held_out_rows, 'row')} held out" if data.held_out is not None else "; no rows held out"
    text += f"; {data.skipped:,} skipped (see {skipped_path})" if data.skipped else ""
    cut, split, lost = (sum(getattr(report, name) for report in data.reports) for name in ("cut", "split", "lost"))
    text += f"; {cut:,} cut to {length:,} tokens" if cut else ""
    text += f"; {counted(split, 'row')} split into documents of at most {length:,} tokens" if split else ""
    text += f"; {counted(lost, 'turn')} left out, with nothing to learn within {length:,} tokens" if lost else ""
    return text + (
        f"\n            {examples.total_tokens:,} tokens to train on, {examples.total_labelled:,} of them carry loss"
    )


def plan_text(
    model: CausalLM,
    data: Data,
    config: Config,
    total_steps: int,
    sizes: MeshSizes | None = None,
    extended_from: int = 0,
) -> str:
    """Number of steps and tokens, warnings, and the memory that can be computed.

    sizes: as in `model_text`. extended_from: as in `train.schedule.rate_of`.
    """
    train = config.train
    per_step = round(data.examples.total_tokens / data.train.steps_per_epoch)
    epochs = total_steps / data.train.steps_per_epoch
    method = "" if model.balance is None else f"  balance   {train.balance}, rate {model.balance.rate:g}\n"
    return (
        f"  plan      {counted(total_steps, 'step')} × about {per_step:,} tokens ({counted(epochs, 'epoch')})\n"
        f"{method}{_warnings(config, total_steps, sizes or MeshSizes(), extended_from)}"
        f"  memory    {_memory_text(model, config, sizes)}\n"
    )


def _warnings(config: Config, total_steps: int, sizes: MeshSizes, extended_from: int) -> str:
    train, text = config.train, ""
    if not learns(train.schedule, total_steps, train.warmup_ratio, extended_from):
        text += (
            f"  warning   nothing will be learnt: the first step of a warm-up has learning rate 0, and this run has no "
            f"other.\n            Set train.warmup_ratio: 0 (it is {train.warmup_ratio:g}), or train for more steps.\n"
        )
    # As train/data/batches.py distributes them.
    sequences, processes = train.micro_batch_size * train.gradient_accumulation, sizes.replicate * sizes.parts
    at_a_time = min(train.micro_batch_size, math.ceil(sequences / processes))
    idle = processes - math.ceil(sequences / at_a_time)
    if idle > 0:
        text += (
            f"  warning   {idle} of {processes} processes get no rows: {counted(sequences, 'sequence')} a step, "
            f"distributed {at_a_time} at a time.\n            Raise train.gradient_accumulation (it is "
            f"{train.gradient_accumulation}), or start fewer processes.\n"
        )
    return text


def _memory_text(model: CausalLM, config: Config, sizes: MeshSizes | None) -> str:
    """Bytes that a process holds during the whole run and, of a sharded model, the most that it gathers at a time."""
    tensors, held = whole_tensors(model), dict((*model.named_parameters(), *model.named_buffers()))
    eight_bit = config.train.optimizer.endswith("8bit")
    weights = gradients = lora = state = 0
    for tensor in tensors:
        local = local_tensor(held[tensor.name])
        size = local.numel() * local.element_size()
        weights += 0 if tensor.lora else size
        lora += size if tensor.lora else 0
        if tensor.trained:
            gradients += size
            state += _state_bytes(local.numel(), eight_bit and tensor.numel >= 4096)
    adapter = f"LoRA {format_bytes(lora)}, " if config.adapter.kind == "lora" else ""
    own = (
        f"weights {format_bytes(weights)}, {adapter}gradients {format_bytes(gradients)}, optimiser "
        f"{format_bytes(state)}"
    )
    if sizes is None:
        return f"{own}; activations come on top"
    gathered = format_bytes(_gathered_bytes(tensors, sizes, config.parallel.reshard_after_forward))
    each = "each process: " if sizes.replicate * sizes.parts > 1 else ""
    where = ",\n{}in host memory; on the device are " if config.parallel.cpu_offload else "; on top come\n{}"
    where = where.format(" " * 12)
    return f"{each}{own}{where}at most {gathered} of gathered layers and their gradients, and activations"


def _gathered_bytes(tensors: list[WholeTensor], sizes: MeshSizes, reshard_after_forward: bool) -> int:
    """The most bytes of gathered weights and their gradients that a process has at a time, by parallel/plan.py.

    That is two layers, since the next one is gathered while one computes, and what stays gathered: the head, the final
    norm, and with `reshard_after_forward` false everything. Of distributed experts, a process gathers its own.
    """
    weights: dict[int | str, int] = {}
    gradients: dict[int | str, int] = {}
    for tensor in tensors:
        layer = layer_of(tensor.name)
        unit = tensor.key.group if layer is None else layer
        size = tensor.nbytes // sizes.expert if tensor.key.group == "experts" else tensor.nbytes
        weights[unit] = weights.get(unit, 0) + size
        gradients[unit] = gradients.get(unit, 0) + (size if tensor.trained else 0)

    def at_a_time(units: dict[int | str, int]) -> int:
        layers = sum(sorted(size for unit, size in units.items() if isinstance(unit, int))[-2:])
        kept = sum(size for unit, size in units.items() if isinstance(unit, str) and unit != "embedding")
        # A tied head is the embedding, which then stays gathered all the time.
        return kept + (max(units["embedding"], layers) if "head" in units else units["embedding"] + layers)

    return (at_a_time(weights) if reshard_after_forward else sum(weights.values())) + at_a_time(gradients)


def _state_bytes(count: int, eight_bit: bool) -> int:
    """Two moments per value: float32, or 8 bits and a float32 scale for 256 of them."""
    return 2 * (count + 4 * math.ceil(count / 256)) if eight_bit else 8 * count


def summary_text(result: dict[str, Any], config: Config, folder: Path) -> str:
    """The block at the end of a run; `result` is what run.json holds, "saved" from the current directory."""
    before, after = result["held_out_loss_before"], result["held_out_loss_after"]
    seconds = max(result["seconds"], 1e-9)
    lines = ["", f"done      {result['steps']:,} steps in {folder}"]
    if after is not None:
        first = f"{before:.4f} before → " if before is not None else ""
        lines.append(f"loss      {first}{after:.4f} after, per labelled token of the held-out rows")
    best = result.get("best")
    if best is not None:
        here = Path(best["saved"]).is_dir()
        where = f" in {best['saved']}" if here else ", gone since"
        when = f"after step {best['step']:,}" if best["step"] else "before the first step, and never lower"
        lines.append(f"best      {best['loss']:.4f} {when}{where}")
    early = result.get("stopped_early")
    if early is not None:
        lines.append(f"early     ended by train.patience: {early.get('patience')}, before the last step")
    lines += [
        f"tokens    {result['tokens']:,}, {result['labelled_tokens']:,} of them labelled",
        f"time      {format_seconds(seconds)} in steps ({result['tokens'] / seconds:,.0f} tokens/s)",
        f"memory    {format_bytes(result['peak_memory_bytes'])} at most in training ({result['memory_of']})",
        f"{'adapter' if config.adapter.kind == 'lora' else 'model':<10}{result['saved']}",
        f"metrics   {folder / 'metrics.jsonl'}, {folder / 'loss.png'}"
        + (f"; tensorboard --logdir {folder / 'tensorboard'}" if config.train.tensorboard else ""),
        f"log       {folder / 'run.log'}",
    ]
    model, saved = config.model, best["saved"] if best is not None and here else result["saved"]
    if config.adapter.kind == "lora":
        lines += [
            "next      use it in Python:",
            "            import torch; from models import load_model",
            f'            model = load_model("{model.path}", storage="{model.storage}", dtype=torch.{model.dtype}, '
            f'adapter="{saved}")',
        ]
    else:
        lines.append(f"next      python -m models.convert {saved} {saved}-nf4 --storage nf4")
    return "\n".join(lines)
