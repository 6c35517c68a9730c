"""Which layers write into the residual stream: seen by running the model on the meta device, where nothing is computed.

Engines split these along their inputs over processors, and all others along their outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from tersor.anatomy.experts import find_experts
from tersor.contracts import Anatomy, Layer

_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)
_ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass(frozen=True)
class _Origin:
    """What a tensor was made of. ``layers``: linear modules whose outputs reach it, the last on each way. ``hidden``:
    it was also made of the residual stream itself, past all linear modules."""

    layers: frozenset[str]
    hidden: bool


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what tensors are made of, operation by operation.

    ``writers``: linear modules whose outputs were added to what is made of the residual stream alone. ``whole``: blocks
    that ran to their end.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.writers: set[str] = set()
        self.whole: set[str] = set()
        # By the address of a tensor, which is kept alive: an address means nothing without it.
        self._known: dict[int, tuple[Tensor, _Origin]] = {}

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [self._known[id(one)] for one in _tensors((args, kwargs or {})) if id(one) in self._known]
        if given:
            origin = self._merged(func, given)
            for tensor in _tensors(made):
                self.mark(tensor, origin)
        return made

    def mark(self, tensor: Tensor, origin: _Origin) -> None:
        self._known[id(tensor)] = (tensor, origin)

    def _merged(self, func: Any, given: Sequence[tuple[Tensor, _Origin]]) -> _Origin:
        if func in _ADDS and len(given) == 2 and given[0][0].shape == given[1][0].shape:
            for (_, stream), (_, other) in (given, given[::-1]):
                if stream.hidden and not stream.layers and other.layers:
                    self.writers |= other.layers
                    return _Origin(frozenset(), True)
        layers = frozenset[str]().union(*(origin.layers for _, origin in given))
        return _Origin(layers, any(origin.hidden for _, origin in given))


def mark_writers(model: nn.Module, anatomy: Anatomy) -> Anatomy:
    """The anatomy with ``writes`` of every linear layer in a block that could be run. ``model``: of ``skeleton``."""
    seen, writers = _run(model, anatomy.blocks, find_experts(model).owners)

    def marked(layer: Layer) -> Layer:
        known = layer.block is not None and anatomy.blocks[layer.block] in seen and layer.kind in ("linear", "conv1d")
        return replace(layer, writes=layer.name in writers) if known else layer

    return replace(anatomy, layers=tuple(map(marked, anatomy.layers)))


def _run(model: nn.Module, blocks: Sequence[str], experts: Iterable[str]) -> tuple[set[str], set[str]]:
    """The blocks that ran to their end, and the linear modules whose outputs were added to the residual stream.

    ``experts``: modules whose forward depends on data; they are passed over.
    """
    ghost = copy.deepcopy(model).to("meta")
    watch = _Watch()
    for path, module in ghost.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.register_forward_hook(_marker(watch, path))
    for path in blocks:
        block = ghost.get_submodule(path)
        block.register_forward_pre_hook(_beginner(watch), with_kwargs=True)
        block.register_forward_hook(_ender(watch, path))
    for path in experts:
        ghost.get_submodule(path).forward = _same_shape
    mask = torch.empty((1, 1, 8, 8), dtype=next(model.parameters()).dtype, device="meta")
    for extra in ({"attention_mask": mask}, {}):
        try:
            with torch.no_grad(), watch:
                ghost(input_ids=torch.zeros((1, 8), dtype=torch.int64, device="meta"), use_cache=False, **extra)
            break
        except _ERRORS:
            pass  # what was reached before is true all the same
    return watch.whole, watch.writers


def _marker(watch: _Watch, path: str) -> Any:
    def mark(_module: nn.Module, _args: Any, output: Any) -> None:
        for tensor in _tensors(output):
            watch.mark(tensor, _Origin(frozenset((path,)), False))

    return mark


def _beginner(watch: _Watch) -> Any:
    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden = next(_tensors((args, kwargs)), None)
        if hidden is not None:
            watch.mark(hidden, _Origin(frozenset(), True))

    return begin


def _ender(watch: _Watch, path: str) -> Any:
    def end(*_: Any) -> None:
        watch.whole.add(path)

    return end


def _same_shape(hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return torch.empty_like(hidden)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
