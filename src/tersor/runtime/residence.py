"""Real tensors in the places of a model on the meta device, for as long as somebody needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import build_glob_alternation

from tersor.anatomy.structure import BASE
from tersor.errors import CorruptArtifact, ShapeMismatch

Load = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Parameter names to tensors, of any floating type and in the shapes of the model."""


class Residence:
    """Puts loaded tensors into ``model`` and takes them out again when nobody needs them; threads may share it.

    ``names``: parameters and persistent buffers as ``load`` knows them; a tied one stands for all its places. Floating
    tensors become ``dtype``, except where the model's class insists on a type of its own.
    """

    def __init__(self, model: nn.Module, load: Load, names: Collection[str], dtype: torch.dtype) -> None:
        self._load = load
        self._types = _types(model, names, dtype)
        self._places = _places(model, names)
        self._held: dict[str, int] = {}
        self._placeholders: dict[str, Any] = {}
        self._lock = threading.RLock()

    def names_under(self, prefix: str) -> tuple[str, ...]:
        """Names with at least one place inside the module at path ``prefix``."""
        return tuple(n for n, places in self._places.items() if any(p.startswith(f"{prefix}.") for p, _, _ in places))

    def names_outside(self, prefixes: Collection[str]) -> tuple[str, ...]:
        """Names with at least one place inside none of the modules at ``prefixes``."""
        heads = tuple(f"{prefix}." for prefix in prefixes)
        return tuple(n for n, places in self._places.items() if any(not p.startswith(heads) for p, _, _ in places))

    @contextmanager
    def holding(self, names: Sequence[str]) -> Iterator[None]:
        """Keep the named tensors in the model, loading those that nobody holds yet.

        Raises CorruptArtifact when ``load`` leaves one out, ShapeMismatch when one has the wrong shape.
        """
        with self._lock:
            self._acquire(names)
        try:
            yield
        finally:
            with self._lock:
                self._release(names)

    def close(self) -> None:
        """Take everything out, whoever holds it."""
        with self._lock:
            for name in list(self._placeholders):
                self._put(name, self._placeholders.pop(name))
            self._held.clear()

    def _acquire(self, names: Sequence[str]) -> None:
        wanted = [name for name in names if not self._held.get(name)]
        with torch.inference_mode(False), torch.no_grad():
            loaded = self._load(wanted) if wanted else {}
            ready = {name: self._checked(name, loaded) for name in wanted}
        for name, value in ready.items():
            _, module, leaf = self._places[name][0]
            self._placeholders[name] = getattr(module, leaf)
            self._put(name, value)
        for name in names:
            self._held[name] = self._held.get(name, 0) + 1

    def _release(self, names: Sequence[str]) -> None:
        for name in names:
            count = self._held.get(name, 0) - 1
            if count > 0:
                self._held[name] = count
            elif count == 0:
                del self._held[name]
                self._put(name, self._placeholders.pop(name))

    def _checked(self, name: str, loaded: Mapping[str, Tensor]) -> Tensor:
        tensor = loaded.get(name)
        if tensor is None:
            raise CorruptArtifact(f"The tensor {name}, which the model needs, was not found.")
        _, module, leaf = self._places[name][0]
        placeholder: Tensor = getattr(module, leaf)
        if tensor.shape != placeholder.shape:
            raise ShapeMismatch(
                f"The tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(placeholder.shape)}."
            )
        if tensor.is_floating_point():
            tensor = tensor.to(self._types[name])
        if isinstance(placeholder, nn.Parameter):
            return nn.Parameter(tensor, requires_grad=False)
        return tensor

    def _put(self, name: str, value: Any) -> None:
        for _, module, leaf in self._places[name]:
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = value


def _places(model: nn.Module, names: Collection[str]) -> dict[str, list[tuple[str, nn.Module, str]]]:
    """For each name: all (full path, module, attribute) where its tensor is."""
    named = {id(tensor): name for name, tensor in _tensors(model) if name in set(names)}
    places: dict[str, list[tuple[str, nn.Module, str]]] = {name: [] for name in names}
    for path, tensor in _tensors(model):
        if id(tensor) in named:
            parent, _, leaf = path.rpartition(".")
            places[named[id(tensor)]].append((path, model.get_submodule(parent), leaf))
    return {name: found for name, found in places.items() if found}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _types(model: nn.Module, names: Collection[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The type of each floating tensor for a model that runs in ``dtype``, as transformers chooses it on loading."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)  # type: ignore[operator]
    pattern, groups, _ = build_glob_alternation(list(plan))
    types = {}
    for name, tensor in _tensors(model):
        if name in names:
            match = pattern.search(name) if plan else None
            fixed = dtype if tensor.dtype == BASE else tensor.dtype
            types[name] = fixed if match is None else plan[groups[match.lastgroup]]
    return types
