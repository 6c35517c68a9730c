"""Which layers read the very same input, and in which order they are computed: seen by running the model on the meta
device, where nothing is computed, and by names where that cannot be seen (layers chosen by data)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_FAMILIES = (
    ("q_proj", "k_proj", "v_proj", "q", "k", "v", "query", "key", "value", "wq", "wk", "wv", "q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj", "gate", "up", "w1", "w3", "wi_0", "wi_1"),
)
"""Names that layers of one parent with one input carry, for what cannot be traced."""

_TRACE_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)

Rows = tuple[int, int, int, int]


def trace(model: nn.Module, layers: Mapping[str, nn.Module], experts: set[str]) -> dict[str, int]:
    """Module paths of ``layers`` and ``experts`` in the order they are first called, each with a number for its input.

    Equal numbers mean the same rows of the same tensor. Modules that the run did not reach are left out.
    ``experts``: module paths whose forward depends on data; they are passed over.
    """
    mask = torch.empty((1, 1, 8, 8), dtype=next(model.parameters()).dtype, device="meta")
    # With a ready-made mask most classes need not look at any value; some want none. The run that sees more counts.
    runs = (_run(model, layers, experts, {"attention_mask": mask}), _run(model, layers, experts, {}))
    return max(runs, key=len)


def family(path: str, in_features: int) -> str:
    """A key that layers share when their names say that they read the same input."""
    parent, _, leaf = path.rpartition(".")
    number = next((i for i, names in enumerate(_FAMILIES) if leaf in names), None)
    return path if number is None else f"{parent} {number} {in_features}"


def _run(
    model: nn.Module, layers: Mapping[str, nn.Module], experts: set[str], extra: Mapping[str, Tensor]
) -> dict[str, int]:
    """One run on the meta device, as far as it gets."""
    ghost = copy.deepcopy(model).to("meta")
    seen: dict[str, int] = {}
    numbers: dict[Rows, int] = {}
    alive: list[Tensor] = []  # an address means nothing once its tensor is gone

    def note(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tensor is not None and path not in seen:
            alive.append(tensor)
            seen[path] = numbers.setdefault(_rows(tensor), len(numbers))

    for path in layers:
        ghost.get_submodule(path).register_forward_pre_hook(_hook(note, path), with_kwargs=True)
    for path in experts:
        module = ghost.get_submodule(path)
        module.register_forward_pre_hook(_hook(note, path), with_kwargs=True)
        module.forward = _same_shape
    try:
        with torch.no_grad():
            ghost(input_ids=torch.zeros((1, 8), dtype=torch.int64, device="meta"), use_cache=False, **extra)
    except _TRACE_ERRORS:
        pass  # what was reached before is true all the same
    return seen


def _rows(tensor: Tensor) -> Rows:
    """The same for a tensor and its views with the same rows, different otherwise (while all are alive)."""
    return (tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel(), tensor.shape[-1])


def _hook(note: Any, path: str) -> Any:
    return lambda _module, args, kwargs: note(path, args, kwargs)


def _same_shape(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return torch.empty_like(hidden)
