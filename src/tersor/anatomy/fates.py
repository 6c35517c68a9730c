"""What becomes of each tensor of a source: encoded, kept, tied or dropped, with the reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tersor.anatomy.layers import Findings
from tersor.anatomy.shards import TensorInfo
from tersor.anatomy.source import Source
from tersor.anatomy.weights import WeightLoader
from tersor.contracts import TensorFate
from tersor.errors import CorruptArtifact

_COMPUTED = re.compile(r"(rotary_emb|rotary|rope)[\w.]*inv_freq$|(^|\.)position_ids$|(^|\.)(masked_bias|attn\.bias)$")
_AHEAD = re.compile(r"(^|\.)(mtp|nextn|eh_proj|enorm|hnorm)\w*(\.|$)")

Kept = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def kept_tensors(model: nn.Module, loader: WeightLoader, found: Findings) -> Kept:
    """Parameters and persistent buffers that are no layers: name -> type and shape as they are in the source.

    Raises CorruptArtifact, naming it, for one that no file holds; layers are checked too.
    """
    state: Mapping[str, Any] = model.state_dict()
    layers = {layer.parameter for layer in found.layers}
    kept: Kept = {}
    for name in state:
        if name in found.ties:
            continue
        provider = loader.provider(name)
        if provider is None:
            raise CorruptArtifact(
                f"No file of the model holds the tensor {name}, which {type(model).__name__} needs; "
                "the checkpoint is incomplete or belongs to another architecture."
            )
        if name not in layers:
            target = loader.targets[provider]
            kept[name] = (target.dtype, target.shape)
    return kept


def fates(
    source: Source, loader: WeightLoader, found: Findings, kept: Kept, class_name: str
) -> tuple[tuple[TensorFate, ...], tuple[str, ...]]:
    """One fate for each tensor in the files of ``source``, and what a user should know about dropped ones."""
    made: dict[str, list[str]] = {}
    for target, entry in loader.targets.items():
        for name in entry.sources:
            made.setdefault(name, []).append(target)
    reasons = {**dict.fromkeys(kept, "a buffer"), **found.reasons}
    layers = {layer.parameter for layer in found.layers}
    result = []
    for name, info in source.tensors.items():
        targets = made.get(name, [])
        if not targets:
            result += _fates(info, "dropped", None, _why_dropped(name, class_name))
            continue
        canonical = [found.ties.get(target, target) for target in targets]
        duplicate = all(t in found.ties and loader.provider(c) != t for t, c in zip(targets, canonical, strict=True))
        made_of = f"split into {', '.join(canonical)}" if len(canonical) > 1 else ""
        if duplicate:
            result += _fates(info, "tied", canonical[0], f"the same tensor as {canonical[0]}")
        elif any(target in layers for target in canonical):
            result += _fates(info, "encoded", canonical[0], made_of)
        else:
            result += _fates(info, "kept", canonical[0], reasons[canonical[0]])
    lost = [fate for fate in result if fate.fate == "dropped" and not _COMPUTED.search(fate.name)]
    if not lost:
        return tuple(result), ()
    sizes = {part.name: part.nbytes for info in source.tensors.values() for part in info.stored}
    nbytes = sum(sizes[fate.name] for fate in lost)
    note = f"{len(lost)} tensors ({nbytes} bytes) of the source are not used by {class_name}, first {lost[0].name}"
    return tuple(result), (note,)


def _fates(info: TensorInfo, fate: Any, target: str | None, reason: str) -> list[TensorFate]:
    """The fate of a tensor; of a computed one, that of each of the tensors it is made of."""
    if info.stored != (info,):
        reason = "; ".join(part for part in ("dequantized", reason) if part)
    return [
        TensorFate(part.name, str(part.dtype).removeprefix("torch."), part.shape, fate, target, reason)
        for part in info.stored
    ]


def _why_dropped(name: str, class_name: str) -> str:
    if _COMPUTED.search(name):
        return "a buffer that transformers computes itself"
    if _AHEAD.search(name):
        return f"part of a head that predicts further tokens ahead, which {class_name} does not have"
    return f"{class_name} has no parameter for it"
