"""Mixture-of-experts parts of a model: stacked expert matrices, which way round they are, and the routers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

_ROUTER = re.compile(r"(^|_)(router|gate|gating|wg)$")
_READS_HIDDEN = re.compile(r"(^|_)(gate|up|w1|w3|wi|fc1|input)(_|$)")
_WRITES_HIDDEN = re.compile(r"(^|_)(down|w2|wo|fc2|output)(_|$)")


@dataclass(frozen=True)
class Experts:
    """``owners``: paths of modules that own stacked expert matrices. ``parents``: the modules around experts."""

    owners: frozenset[str]
    parents: frozenset[str]
    hidden: int | None

    def is_router(self, path: str) -> bool:
        """Whether a matrix at ``path`` chooses or weighs experts: it is beside them and is called a gate or router."""
        beside = (path[len(parent) + 1 :] for parent in self.parents if path.startswith(f"{parent}."))
        return any(_ROUTER.search(rest.partition(".")[0]) for rest in beside)


def find_experts(model: nn.Module) -> Experts:
    """Where the experts of ``model`` are; nothing anywhere for a dense model."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    counts = {v for k, v in text.to_dict().items() if "expert" in k and type(v) is int and v > 1}
    owners: set[str] = set()
    parents: set[str] = set()
    for path, module in model.named_modules():
        stacked = any(_stacked(path, module, parameter, counts) for parameter in module._parameters.values())
        if stacked:
            owners.add(path)
        if stacked or (isinstance(module, nn.ModuleList) and "expert" in path.rpartition(".")[2].lower()):
            parents.add(path.rpartition(".")[0])
    return Experts(frozenset(owners), frozenset(parents), getattr(text, "hidden_size", None))


def is_transposed(module: nn.Module, path: str, hidden: int | None) -> bool | None:
    """Whether each expert matrix in ``module`` is stored ``(in, out)``; None when that cannot be told.

    The module says so itself, or the width of the model shows which of the two dimensions is the input.
    """
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    votes = set()
    for name, parameter in module.named_parameters(recurse=False):
        label = name if name != "weight" else path.rpartition(".")[2]
        reads, writes = bool(_READS_HIDDEN.search(label)), bool(_WRITES_HIDDEN.search(label))
        first, second = tuple(parameter.shape[-2:]) if parameter.ndim == 3 else (0, 0)
        if reads == writes or (first == hidden) == (second == hidden):
            continue
        votes.add((first == hidden) == reads)
    return votes.pop() if len(votes) == 1 else None


def _stacked(path: str, module: nn.Module, parameter: nn.Parameter | None, counts: set[int]) -> bool:
    if parameter is None or parameter.ndim != 3 or isinstance(module, _ConvNd) or min(parameter.shape[1:]) < 2:
        return False
    return "expert" in path.lower() or parameter.shape[0] in counts
