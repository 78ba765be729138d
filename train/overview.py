"""What a run shows before its first step and after its last one. Every number is counted, measured or computed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from models.decoder import CausalLM
from models.delta_rule import uses_fla
from models.lora import trainable_parameters
from models.native import describe
from models.parameter_table import GroupRow, parameter_table
from parallel.device import device_name
from train.config import Config
from train.data import Data
from train.report import counted, format_bytes, format_seconds, table
from train.schedule import learns

_GROUP_NAMES = {
    "linear_attention": "linear attention",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "dense_mlp": "dense layers",
    "router": "routers",
    "norm": "norms",
}


def model_text(model: CausalLM, name: str, folder: Path, device: torch.device) -> str:
    """Which model, how it is kept, on what; then the table of its groups."""
    where = f"1 × {device_name(device)}"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        where = f"{device_name(device)}, {counted(threads, 'thread')}"
    stored = describe(model.spec, model.dtype).removeprefix("none, ")
    title = f"{Path(name).name} ({model.model_type}) from {folder} · {stored} · {where}"
    header = ("group", "parameters", "stored", "size", "trained", "")
    groups = parameter_table(model)
    text = f"{title}\n\n{table([header, *map(_cells, groups)], right=(1, 3, 4))}\n"
    if device.type == "cuda" and any(row.group == "linear_attention" for row in groups):
        fused = uses_fla(device, model.dtype)
        ways = ("flash-linear-attention", "torch, slower than flash-linear-attention (pip install -e '.[fla]')")
        text += f"\n  gated delta rule by {ways[0] if fused else ways[1]}\n"
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
    """What became of the rows: those trained on, those held out, and those that could not be used as they are."""
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


def plan_text(model: CausalLM, data: Data, config: Config, total_steps: int) -> str:
    """How long the run is, and the memory that is known beforehand."""
    train = config.train
    per_step = round(data.examples.total_tokens / data.train.steps_per_epoch)
    epochs = total_steps / data.train.steps_per_epoch
    trained = [parameter for _, parameter in trainable_parameters(model)]
    weights = parameter_table(model)[-1].nbytes
    own = sum(p.numel() * p.element_size() for p in trained)
    state = sum(_state_bytes(p.numel(), train.optimizer.endswith("8bit")) for p in trained)
    lora = f"LoRA {format_bytes(own)}, " if config.adapter.kind == "lora" else ""
    method = "" if model.balance is None else f"  balance   {train.balance}, rate {model.balance.rate:g}\n"
    warning = ""
    if not learns(train.schedule, total_steps, train.warmup_ratio):
        warning = (
            f"  warning   nothing will be learnt: the first step of a warm-up has learning rate 0, and this run has no "
            f"other.\n            Set train.warmup_ratio: 0 (it is {train.warmup_ratio:g}), or train for more steps.\n"
        )
    return (
        f"  plan      {counted(total_steps, 'step')} × about {per_step:,} tokens ({counted(epochs, 'epoch')})\n"
        f"{method}{warning}  memory    weights {format_bytes(weights)}, {lora}gradients {format_bytes(own)}, optimiser "
        f"{format_bytes(state)}; activations come on top\n"
    )


def _state_bytes(count: int, eight_bit: bool) -> int:
    """Two moments per value: float32, or 8 bits and a float32 scale for 256 of them (from 4096 values on)."""
    if not eight_bit or count < 4096:
        return 8 * count
    return 2 * (count + 4 * math.ceil(count / 256))


def summary_text(result: dict[str, Any], config: Config, folder: Path) -> str:
    """The block at the end of a run; `result` is what run.json holds."""
    before, after = result["held_out_loss_before"], result["held_out_loss_after"]
    seconds = max(result["seconds"], 1e-9)
    lines = ["", f"done      {result['steps']:,} steps in {folder}"]
    if after is not None:
        first = f"{before:.4f} before → " if before is not None else ""
        lines.append(f"loss      {first}{after:.4f} after, per labelled token of the held-out rows")
    lines += [
        f"tokens    {result['tokens']:,}, {result['labelled_tokens']:,} of them labelled",
        f"time      {format_seconds(seconds)} in steps ({result['tokens'] / seconds:,.0f} tokens/s)",
        f"memory    {format_bytes(result['peak_memory_bytes'])} at most in training ({result['memory_of']})",
        f"{'adapter' if config.adapter.kind == 'lora' else 'model':<10}{result['saved']}",
        f"metrics   {folder / 'metrics.jsonl'}, {folder / 'loss.png'}"
        + (f"; tensorboard --logdir {folder / 'tensorboard'}" if config.train.tensorboard else ""),
        f"log       {folder / 'run.log'}",
    ]
    model, saved = config.model, result["saved"]
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
