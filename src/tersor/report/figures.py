"""Numbers behind the charts: where the bytes go, the grid of blocks and layers, curves, shares of the loss.

Pure functions of the report's data. The page's script draws what these return and decides nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tersor.contracts import Layer, RatePoint
from tersor.report.data import LayerReport, ReportData
from tersor.report.words import number_text, percent_text, size_text

_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_EXPERTS = re.compile(r"expert|moe", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|^ff$|^fc\d?$", re.IGNORECASE)
KEPT, HEADERS = "Kept as they are", "File headers"
OTHERS = 6
"""Colour number shared by kinds beyond the six largest; 7 is for layers outside the blocks."""


@dataclass(frozen=True)
class SizePart:
    """A share of the file. ``source``: bytes of the same weights in the source, None when unknown."""

    name: str
    source: int | None
    stored: int
    weights: int | None

    @property
    def bits_per_weight(self) -> float | None:
        return 8 * self.stored / self.weights if self.weights else None


def kind_of(layer: Layer) -> str:
    """The layer's path inside its block; its name when it stands outside.

    >>> kind_of(Layer("model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj.weight", "linear", (8, 4), 3, "x"))
    'mlp.up_proj'
    """
    if layer.block is not None:
        parts = layer.name.split(".")
        if str(layer.block) in parts[:-1]:
            return ".".join(parts[parts.index(str(layer.block)) + 1 :])
    return layer.name


def group_of(layer: Layer, head: str | None) -> str:
    """Which part of a model the layer belongs to, from its kind and path."""
    if layer.kind == "embedding":
        return "Embedding and tied head" if layer.tied else "Embedding"
    if layer.name == head:
        return "Output head"
    if layer.block is None:
        return "Other layers"
    path = kind_of(layer)
    first = path.split(".")[0]
    if _ATTENTION.search(path):
        return "Attention"
    if layer.kind == "experts" or _EXPERTS.search(path):
        return "Experts"
    return "MLP" if _MLP.search(first) else first


def size_parts(data: ReportData) -> tuple[SizePart, ...]:
    """The file's bytes by group, in the order of the model; kept tensors and headers last. They add up to the file."""
    source_of = _source_bytes(data)
    groups: dict[str, list[LayerReport]] = {}
    for report in data.layers:
        groups.setdefault(group_of(report.layer, data.head), []).append(report)
    parts = []
    for name, members in groups.items():
        known = [source_of.get(m.layer.parameter) for m in members]
        source = None if None in known else sum(n for n in known if n is not None)
        weights = sum(m.layer.parameters for m in members)
        parts.append(SizePart(name, source, sum(m.nbytes for m in members), weights))
    encoded = {report.layer.parameter for report in data.layers}
    kept_source = sum(n for target, n in source_of.items() if target not in encoded)
    kept_weights = data.parameters - sum(report.layer.parameters for report in data.layers)
    parts.append(SizePart(KEPT, kept_source if source_of else None, data.kept_bytes, max(0, kept_weights)))
    parts.append(SizePart(HEADERS, None, data.file_bytes - sum(part.stored for part in parts), None))
    return tuple(part for part in parts if part.stored or part.source)


def _source_bytes(data: ReportData) -> dict[str, int]:
    """Bytes in the source by target parameter; tied and dropped tensors are left out.

    So are dequantized ones: the source's size counts what they stand for, not what its files hold.
    """
    found: dict[str, int] = {}
    for tensor in data.tensors:
        digits = re.search(r"\d+", tensor.dtype)
        if tensor.target is None or tensor.fate in ("tied", "dropped") or tensor.reason.startswith("dequantized"):
            continue
        bits = int(digits.group()) if digits else 8
        found[tensor.target] = found.get(tensor.target, 0) + math.prod(tensor.shape) * bits // 8
    return found


def lower_hull(points: Sequence[RatePoint]) -> list[int]:
    """Indices of the points on the lower convex hull of (bytes, distortion), fewest bytes first.

    Only these can be chosen at some price per byte.

    >>> lower_hull([RatePoint(1, 9.0, "a"), RatePoint(2, 8.5, "b"), RatePoint(3, 1.0, "c"), RatePoint(4, 1.0, "d")])
    [0, 2]
    """
    finite = [i for i, p in enumerate(points) if math.isfinite(p.distortion)]
    hull: list[int] = []
    best = math.inf
    for i in sorted(finite, key=lambda i: (points[i].nbytes, points[i].distortion)):
        here = points[i]
        if here.distortion >= best:
            continue
        best = here.distortion
        while len(hull) >= 2:
            a, b = points[hull[-2]], points[hull[-1]]
            if (b.distortion - a.distortion) * (here.nbytes - a.nbytes) < (here.distortion - a.distortion) * (
                b.nbytes - a.nbytes
            ):
                break
            hull.pop()
        hull.append(i)
    return hull


def chosen_index(report: LayerReport) -> int | None:
    """Which point of the layer's curve was chosen; None when the curve does not hold the codec."""
    return next((i for i, point in enumerate(report.curve) if point.choice == report.codec), None)


def view(data: ReportData) -> dict[str, Any]:
    """What the script needs besides the data: texts, places in the grid, hulls. JSON-able, deterministic.

    ``kinds``, ``labels``: rows of the grid; ``colours``: number of each row's colour; ``blocks``: columns of the grid.
    ``layers``: one entry for each of ``data.layers``.
    """
    kinds = _ordered_kinds(data)
    total = _total_predicted(data)
    layers = [_layer_view(report, kinds, total) for report in data.layers]
    shares = [0.0] * len(kinds)
    for layer in layers:
        if layer["kind"] is not None:
            shares[layer["kind"]] += layer["share"] or 0.0
    return {
        "kinds": kinds,
        "labels": short_labels(kinds),
        "colours": kind_colours(shares),
        "blocks": sorted({r.layer.block for r in data.layers if r.layer.block is not None}),
        "layers": layers,
    }


def _ordered_kinds(data: ReportData) -> list[str]:
    """Kinds in the order they first appear, those of one group together (models that mix two kinds of attention)."""
    group_by_kind = {kind_of(r.layer): group_of(r.layer, data.head) for r in data.layers if r.layer.block is not None}
    groups = list(dict.fromkeys(group_by_kind.values()))
    return sorted(group_by_kind, key=lambda kind: groups.index(group_by_kind[kind]))


def kind_colours(shares: Sequence[float]) -> list[int]:
    """A colour number for each kind: 0 to 6, and where there are more kinds, 6 for all but the six largest.

    >>> kind_colours([0.1, 0.2]), kind_colours([0.1, 0.0, 0.2, 0.3, 0.1, 0.1, 0.1, 0.0])
    ([0, 1], [0, 6, 1, 2, 3, 4, 5, 6])
    """
    if len(shares) <= OTHERS + 1:
        return list(range(len(shares)))
    largest = sorted(sorted(range(len(shares)), key=lambda k: -shares[k])[:OTHERS])
    return [largest.index(k) if k in largest else OTHERS for k in range(len(shares))]


def short_labels(kinds: Sequence[str]) -> list[str]:
    """The last component of each kind where that tells them apart, else the whole.

    >>> short_labels(["self_attn.q_proj", "mlp.up_proj"]), short_labels(["a.w", "b.w"])
    (['q_proj', 'up_proj'], ['a.w', 'b.w'])
    """
    last = [kind.split(".")[-1] for kind in kinds]
    return [short if last.count(short) == 1 else kind for short, kind in zip(last, kinds, strict=True)]


def _total_predicted(data: ReportData) -> float:
    return sum(r.predicted for r in data.layers if r.predicted is not None and math.isfinite(r.predicted))


def _layer_view(report: LayerReport, kinds: list[str], total: float) -> dict[str, Any]:
    layer, predicted = report.layer, report.predicted
    share = predicted / total if predicted is not None and math.isfinite(predicted) and total > 0 else None
    return {
        "kind": kinds.index(kind_of(layer)) if layer.block is not None else None,
        "bits": report.bits_per_weight,
        "share": share,
        "facts": _facts(report, share),
        "hull": lower_hull(report.curve),
        "chosen": chosen_index(report),
        "sizes": [size_text(point.nbytes) for point in report.curve],
    }


def _facts(report: LayerReport, share: float | None) -> list[tuple[str, str]]:
    """What is said about a layer when it is pointed at."""
    layer = report.layer
    facts = [
        ("Codec", report.codec),
        ("Bits per weight", f"{report.bits_per_weight:.2f}"),
        ("Bytes", f"{report.nbytes:,}"),
    ]
    if report.relative_error is not None:
        facts.append(("Relative error", number_text(report.relative_error)))
    if report.predicted is not None:
        facts.append(("Predicted loss", f"{number_text(report.predicted)} nats"))
    if share is not None:
        facts.append(("Share of predicted loss", percent_text(share)))
    copies = f"{layer.copies} × " if layer.copies > 1 else ""
    facts.append(("Shape", f"{copies}{layer.shape[0]} × {layer.shape[1]}"))
    return facts


def kind_shares(data: ReportData) -> list[tuple[str, int, float, float]]:
    """Kinds of layers by their share of the predicted loss: name, how many, that share, share of the layers' bytes."""
    total = _total_predicted(data)
    stored = sum(report.nbytes for report in data.layers)
    if total <= 0 or stored <= 0:
        return []
    kinds = _ordered_kinds(data)
    label = dict(zip(kinds, short_labels(kinds), strict=True))
    members: dict[str, list[LayerReport]] = {}
    for report in data.layers:
        if report.predicted is not None and math.isfinite(report.predicted):
            name = kind_of(report.layer)
            members.setdefault(name if report.layer.block is None else label[name], []).append(report)
    rows = [
        (name, len(group), sum(r.predicted or 0.0 for r in group) / total, sum(r.nbytes for r in group) / stored)
        for name, group in members.items()
    ]
    return sorted(rows, key=lambda row: -row[2])


def size_bars(data: ReportData, parts: Sequence[SizePart]) -> list[tuple[str, int, list[tuple[int, str, int]]]]:
    """Bars of the size chart: label, total bytes, and segments (colour number, name, bytes)."""
    stored = [(i, part.name, part.stored) for i, part in enumerate(parts) if part.stored > 0]
    bars = [("Compressed", data.file_bytes, stored)] if data.file_bytes else []
    if data.source_bytes and all(part.source is not None for part in parts if part.name != HEADERS):
        source = [(i, part.name, part.source) for i, part in enumerate(parts) if part.source]
        bars.insert(0, ("Original", data.source_bytes, source))
    return bars


def loss_scale(data: ReportData) -> float:
    """What the longest bar of the loss chart stands for, nats per token."""
    quality = data.quality
    ends = [data.predicted or 0.0] + ([quality.kl + quality.kl_error] if quality else [])
    return max((end for end in ends if math.isfinite(end) and end > 0), default=1.0)
