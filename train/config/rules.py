"""Which values of a config can't stand together. Each message names the keys and the fix."""

from __future__ import annotations

from collections.abc import Iterator

from models.blocks.groups import TARGET_GROUPS
from train.config.fields import joined
from train.config.schema import nearest
from train.config.sections import (
    FOUR_BIT,
    JOINED,
    OPTIONAL,
    REQUIRED,
    AdapterConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)

Found = Iterator[tuple[tuple[str, ...], str]]


def combination_problems(
    model: ModelConfig, adapter: AdapterConfig, data: DataConfig, train: TrainConfig, parallel: ParallelConfig
) -> Found:
    """(keys concerned, message) for each pair of keys whose values can't stand together."""
    if adapter.kind == "none":
        if model.storage != "none":
            yield (
                ("adapter.kind", "model.storage"),
                f"adapter.kind: none with model.storage: {model.storage}: full fine-tuning needs unquantised "
                "weights. Set model.storage: none, or adapter.kind: lora.",
            )
        if adapter.init_from is not None:
            yield (
                ("adapter.init_from", "adapter.kind"),
                "adapter.init_from with adapter.kind: none: there is no adapter to start from it. Set "
                "adapter.init_from: null, or adapter.kind: lora.",
            )
        if adapter.layers is not None:
            yield (
                ("adapter.layers", "adapter.kind"),
                "adapter.layers with adapter.kind: none: full fine-tuning trains every layer. Set adapter.layers: "
                "null, or adapter.kind: lora.",
            )
    else:
        yield from _adapter_problems(adapter)
    if adapter.init_layout is not None and adapter.init_from is None:
        yield (
            ("adapter.init_layout", "adapter.init_from"),
            "adapter.init_layout without adapter.init_from: there is no adapter to read in it. Leave it out.",
        )
    if model.double_quant and model.storage not in FOUR_BIT:
        yield (
            ("model.double_quant", "model.storage"),
            f"model.double_quant: true with model.storage: {model.storage}: only the scales of nf4 and fp4 are "
            "quantised again. Set model.double_quant: false (or leave it out), or model.storage: nf4.",
        )
    if data.eval is not None and data.eval_fraction is not None:
        yield (
            ("data.eval_fraction", "data.eval"),
            "data.eval_fraction with data.eval: held-out rows come from one of them. Set data.eval_fraction: null "
            "(or leave it out), or data.eval: null.",
        )
    if data.eval is None and data.eval_fraction is None and train.eval_every is not None:
        yield (
            ("train.eval_every", "data.eval_fraction"),
            "train.eval_every without held-out rows: set data.eval or data.eval_fraction, or train.eval_every: null.",
        )
    for key, given in (("keep_best", train.keep_best), ("patience", train.patience is not None)):
        if given and train.eval_every is None:
            yield (
                (f"train.{key}", "train.eval_every"),
                f"train.{key} without train.eval_every: there are evaluations only before the first step and after the "
                f"last one. Set train.eval_every, or leave train.{key} out.",
            )
    if train.patience_delta and train.patience is None:
        yield (
            ("train.patience_delta", "train.patience"),
            "train.patience_delta without train.patience: nothing uses it. Set train.patience, or leave it out.",
        )
    if data.packing and data.sequence_length < 8:
        yield (
            ("data.sequence_length", "data.packing"),
            f"data.packing: true with data.sequence_length: {data.sequence_length}: nothing fits together in so "
            "few tokens. Set data.sequence_length to 8 or more, or data.packing: false.",
        )
    if data.template_variables and data.format == "text":
        yield (
            ("data.template_variables", "data.format"),
            "data.template_variables with data.format: text: no chat template is used. Leave one of them out.",
        )
    names = (*REQUIRED[data.format], *OPTIONAL.get(data.format, ()))
    for name in data.fields:
        if name not in names:
            yield (
                (f"data.fields.{name}", "data.format"),
                f"data.fields: '{name}' is not a field of data.format: {data.format} (its fields: "
                f"{', '.join(names)}). Rename it, or change data.format.",
            )
    for name, value in data.fields.items():
        try:
            joins = joined(value) is not None
        except ValueError as error:
            yield (f"data.fields.{name}",), f"data.fields.{name}: {error}."
            continue
        if joins and name in names and name not in JOINED:
            yield (
                (f"data.fields.{name}",),
                f"data.fields.{name} is no text that could join columns; name one column. (Columns are joined for "
                f"{', '.join(one for one in JOINED if one in names)}.)",
            )
    # (role and content are names inside a message: they may repeat one outside.)
    texts = [data.fields[name] for name in REQUIRED[data.format] if name in data.fields]
    if len(set(texts)) < len(texts):
        yield ("data.fields",), "data.fields: two fields are read from the same name; give each its own."
    if train.optimizer.startswith("paged_") and train.device == "cpu":
        yield (
            ("train.optimizer", "train.device"),
            f"train.optimizer: {train.optimizer} with train.device: cpu: paged state needs CUDA. Set "
            f"train.optimizer: {train.optimizer.removeprefix('paged_')}, or train.device: cuda.",
        )
    if train.optimizer.startswith("paged_") and parallel.cpu_offload:
        yield (
            ("train.optimizer", "parallel.cpu_offload"),
            f"train.optimizer: {train.optimizer} with parallel.cpu_offload: true: its state is in host memory "
            f"already and there is nothing to page. Set train.optimizer: {train.optimizer.removeprefix('paged_')}, or "
            "parallel.cpu_offload: false.",
        )
    if train.device is not None and ":" in train.device:
        for name, size in (("shard", parallel.shard), ("expert", parallel.expert), ("replicate", parallel.replicate)):
            if size is not None and size > 1:
                yield (
                    ("train.device", f"parallel.{name}"),
                    f"train.device: {train.device} with parallel.{name}: {size}: several processes can't share "
                    "one GPU; each takes one of its own. Set train.device: cuda (or leave it out).",
                )
                break
    if train.balance == "none" and train.balance_rate is not None:
        yield (
            ("train.balance_rate", "train.balance"),
            "train.balance_rate with train.balance: none: there is nothing that it would be the rate of. Set "
            "train.balance_rate: null (or leave it out), or train.balance: aux_loss or bias_update.",
        )
    if train.balance == "bias_update" and adapter.kind == "lora":
        yield (
            ("train.balance", "adapter.kind"),
            "train.balance: bias_update with adapter.kind: lora: it changes the routers' bias, which an adapter "
            "can't hold, so the saved adapter would not compute what was trained. Set train.balance: none, or "
            "adapter.kind: none.",
        )


def _adapter_problems(adapter: AdapterConfig) -> Found:
    if not adapter.targets:
        text = (
            "adapter.targets: [] with adapter.kind: lora: nothing would be trained. Name targets, e.g. [attention, "
            "experts], or set adapter.kind: none for full fine-tuning."
        )
        yield ("adapter.targets", "adapter.kind"), text
    for name in sorted({target for target in adapter.targets if adapter.targets.count(target) > 1}):
        yield ("adapter.targets",), f"adapter.targets: '{name}' is listed twice."
    if adapter.layers is not None and len(set(adapter.layers)) < len(adapter.layers):
        yield ("adapter.layers",), "adapter.layers: a layer is listed twice."
    listed = [target for target in adapter.targets if target in TARGET_GROUPS]
    for key, value in (("adapter.rank", adapter.rank), ("adapter.alpha", adapter.alpha)):
        if not isinstance(value, dict):
            continue
        for group in value:
            if group not in TARGET_GROUPS:
                near = nearest(group, TARGET_GROUPS)
                hint = f"Did you mean '{near}'?" if near else f"The groups are {', '.join(TARGET_GROUPS)}."
                yield (f"{key}.{group}",), f"{key}: '{group}' is not a group. {hint}"
            # A target named in the hub's spelling belongs to a group that only the model knows.
            elif group not in listed and len(listed) == len(adapter.targets):
                text = f"{key} gives a value for '{group}', which adapter.targets does not list. Add or drop it."
                yield (f"{key}.{group}", "adapter.targets"), text
        for group in dict.fromkeys(listed):
            if group not in value:
                text = (
                    f"{key} has no value for '{group}', which adapter.targets lists. Add {group}: N, or use one number."
                )
                yield (key, "adapter.targets"), text
