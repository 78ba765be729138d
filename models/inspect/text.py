"""A report as a person reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from models.inspect.diff import Difference
from models.inspect.heatmap import Panel
from quant.common.words import counted, format_bytes, shown, some, table


def checkpoint_text(report: dict[str, Any]) -> str:
    """The parts of a checkpoint's report, each under its name."""
    stored = f"{report['storage']} with double quantisation" if report["double_quant"] else report["storage"]
    kind = "hub checkpoint" if report["kind"] == "hub" else f"converted checkpoint ({stored})"
    rows = [["group", "parameters", "stored", "size"]]
    for group in (*report["groups"], {"words": "total", "stored": [], **report}):
        stored = " + ".join(group["stored"])
        rows.append([group["words"], f"{group['parameters']:,}", stored, format_bytes(group["bytes"])])
    lines = [
        f"{report['path']}: {kind}, {report['model_type']}, {report['dtype']}, {report['parameters']:,} parameters",
        table(rows, right=(1, 3)),
        f"source    {report['source']}" + (f", fingerprint {report['fingerprint']}" if report["fingerprint"] else ""),
        *_files(report["files"]),
    ]
    if report["carried"]["summary"]:
        lines.append(f"carried   not computed with: {report['carried']['summary']}")
    read, defaults, unread = (report["settings"][name] for name in ("read", "defaults", "unread"))
    lines.append(_pairs("settings", read))
    if defaults:
        lines.append(_pairs("absent", defaults))
    lines.append(_wrapped("not read", list(unread) or ["nothing"]))
    return "\n".join(lines)


def _files(files: list[dict[str, Any]]) -> list[str]:
    weights = [file for file in files if file["tensors"]]
    others = [file["name"] for file in files if not file["tensors"]]
    size = format_bytes(sum(file["bytes"] for file in weights))
    named = some([file["name"] for file in weights], 3)
    lines = [f"weights   {counted(len(weights), 'file')}, {size}: {named}", f"others    {', '.join(others) or 'none'}"]
    matching = sum(file["checksum"] == "matches" for file in weights)
    changed = [file["name"] for file in files if file["checksum"] == "changed"]
    what = f"{matching} of {counted(len(weights), 'file')} of weights match" if matching else "none compared"
    lines.append(f"checksums {what}" + (f"; changed since the conversion: {', '.join(changed)}" if changed else ""))
    return lines


def adapter_text(report: dict[str, Any], *, experts: bool = False) -> str:
    """The parts of an adapter's report. experts: the norm of every expert, also where there are many of them."""
    matrices = report["matrices"]
    count = counted(len(matrices), "matrix").replace("matrixs", "matrices")
    lines = [
        f"{report['path']}: adapter of {report['base_model'] or 'a base that it does not name'}, {count} or stacks, "
        f"{report['parameters']:,} parameters ({report['dtype']}, {format_bytes(report['bytes'])})",
        f"base      {report['base'] or 'not read'}",
        f"peft      {report['peft_version'] or 'version not given'}" + (", rsLoRA" if report["rslora"] else ""),
    ]
    for kind, found in by_kind(matrices).items():
        ranks, alphas = (
            " and ".join(f"{value:g}" for value in sorted({one[key] for one in found})) for key in _NUMBERS
        )
        lines.append(f"target    {kind}: rank {ranks}, alpha {alphas}, in {counted(len(found), 'layer')}")
    if report["others"]:
        lines.append(f"others    tensors that are no LoRA's: {some(report['others'])}")
    lines += ["", "Norm of B·A, scaled; of a stack, of all its experts (the smallest to the largest expert's):"]
    lines.append(_by_layer(matrices, _norm))
    if report["base"]:
        lines += ["", "Share of the base's norm:", _by_layer(matrices, lambda one: f"{one['share']:.3%}")]
    for kind, found in by_kind(matrices).items():
        wide = max(len(one["expert_norms"] or ()) for one in found)
        if 0 < wide <= (10**9 if experts else _FEW):
            rows = [["layer", *map(str, range(wide))]]
            rows += [
                [str(one["layer"]), *(f"{norm:.3g}" if norm else "dead" for norm in one["expert_norms"])]
                for one in found
            ]
            lines += ["", f"{kind}, by expert:", table(rows, right=range(wide + 1))]
    dead = [one for one in matrices if one["dead"]]
    lines += ["", f"dead      {counted(report['dead_experts'], 'expert')} with a norm of 0" + (":" if dead else "")]
    lines += [f"  layer {one['layer']}, {one['kind']}: {some(list(map(str, one['dead'])), 40)}" for one in dead]
    return "\n".join(lines)


_NUMBERS = ("rank", "alpha")
_FEW = 16  # experts whose norms fit a line


def by_kind(matrices: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Those of each kind of matrix, by layers."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in matrices:
        kinds.setdefault(one["kind"], []).append(one)
    return kinds


def _norm(one: dict[str, Any]) -> str:
    norms = one["expert_norms"]
    return f"{one['norm']:.3g}" + (f" ({min(norms):.3g} to {max(norms):.3g})" if norms else "")


def _by_layer(matrices: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    kinds = by_kind(matrices)
    cells = {(one["layer"], one["kind"]): cell(one) for one in matrices}
    short = {kind: kind.partition(".")[2] for kind in kinds}
    if len(set(short.values())) < len(kinds):
        short = {kind: kind for kind in kinds}
    rows = [["layer", *short.values()]]
    for layer in dict.fromkeys(one["layer"] for one in matrices):
        rows.append(["–" if layer is None else str(layer), *(cells.get((layer, kind), "") for kind in kinds)])
    return table(rows, right=range(len(rows[0])))


def panels(report: dict[str, Any]) -> list[Panel]:
    """Heat maps of an adapter's report: one of each kind of stack, by layer and expert; one of all else, by kind."""
    found, others = [], {}
    for kind, ones in by_kind(report["matrices"]).items():
        if ones[0]["expert_norms"] is None:
            others[kind] = ones
        else:
            found.append(
                Panel(kind, [f"{one['layer']}" for one in ones], [one["expert_norms"] for one in ones], (), _UNIT)
            )
    if others:
        layers = sorted(
            {one["layer"] for ones in others.values() for one in ones}, key=lambda layer: (layer is None, layer)
        )
        norms = {(kind, one["layer"]): one["norm"] for kind, ones in others.items() for one in ones}
        rows = [[norms.get((kind, layer)) for kind in others] for layer in layers]
        found.append(Panel("other matrices", [f"{layer}" for layer in layers], rows, tuple(others), _UNIT))
    return found


_UNIT = "norm of B·A"


def differences_text(found: Sequence[Difference], here: str, there: str) -> str:
    """A line for each, up to so many of a kind."""
    if not found:
        return f"{here} and {there} are equal"
    lines, shown_of = [f"{here} | {there}"], Counter[str]()
    for difference in found:
        shown_of[difference.what] += 1
        if shown_of[difference.what] <= _LISTED:
            lines.append(str(difference))
    lines += [f"{what:<8} and {count - _LISTED} more" for what, count in shown_of.items() if count > _LISTED]
    return "\n".join([*lines, counted(len(found), "difference")])


_LISTED = 50  # differences of a kind; --json has all


def _pairs(name: str, values: dict[str, Any]) -> str:
    return _wrapped(name, [f"{key}: {shown(value, 60)}" for key, value in values.items()])


def _wrapped(name: str, words: list[str]) -> str:
    """Under its name, separated by commas, in lines of 110 characters that no entry is broken by."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > 100:
            lines.append("")
        lines[-1] += f", {word}" if lines[-1] else word
    return f"{name:<10}" + f",\n{'':<10}".join(lines)
