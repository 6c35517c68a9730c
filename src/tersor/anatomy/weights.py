"""Parameters of an instantiated model out of the tensors of its source, one at a time.

Checkpoints do not always name and shape things as transformers' classes do (experts one by one, prefixes left out, old
names). transformers keeps the rules for that in its conversion mapping; they are applied here per parameter, so that
nothing else needs to be read. The order of the rules follows ``convert_and_load_state_dict_in_model``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from tersor.anatomy.shards import TensorInfo, map_tensor
from tersor.anatomy.source import Source
from tersor.errors import CorruptArtifact

_CONVERSION_ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError)


@dataclass(frozen=True)
class Target:
    """A parameter that the source provides, as it will be: ``sources`` are the tensors it is made of, in order.

    ``plain``: it is a tensor of the source as it stands there, perhaps under another name.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    plain: bool


@dataclass
class _Assembly:
    """Tensors that go together through one converter (or just under a new name, when there is none)."""

    first: str
    converter: WeightConverter | None
    parts: list[tuple[str, str]] = field(default_factory=list)
    """(tensor in the source, pattern it matched)"""


class WeightLoader:
    """Loads parameters of ``model`` (which may be on the meta device) from ``source``, memory-mapped.

    ``targets``: what the source can provide, by parameter name. ``unused``: tensors of the source that no parameter
    of the model takes. Safe to use from several threads.
    """

    def __init__(self, source: Source, model: nn.Module) -> None:
        self._tensors = source.tensors
        self._model = model
        self._assemblies, self.unused = _plan(source.tensors, model)
        self._made_by: dict[str, _Assembly] = {}
        self.targets: dict[str, Target] = {}
        for assembly in self._assemblies:
            made = self._assemble(assembly, lambda info: torch.empty(info.shape, dtype=info.dtype, device="meta"))
            names = tuple(name for name, _ in assembly.parts)
            for parameter, tensor in made.items():
                self.targets[parameter] = Target(tensor.dtype, tuple(tensor.shape), names, assembly.converter is None)
                self._made_by[parameter] = assembly
        self._aliases = aliases(model)

    def provider(self, parameter: str) -> str | None:
        """What to load for ``parameter``: itself, or what it is tied to if the source has only that, or None."""
        return next((n for n in (parameter, *self._aliases.get(parameter, ())) if n in self._made_by), None)

    def load(self, parameters: Sequence[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The named parameters (or persistent buffers), floating ones cast to ``dtype`` when given.

        Tensors that need no conversion stay memory-mapped. Raises CorruptArtifact for a name the source cannot provide.
        """
        done: dict[int, dict[str, Tensor]] = {}
        loaded: dict[str, Tensor] = {}
        for parameter in parameters:
            name = self.provider(parameter)
            if name is None:
                raise CorruptArtifact(f"No file of the model holds the parameter {parameter}, which its class needs.")
            assembly = self._made_by[name]
            if id(assembly) not in done:
                done[id(assembly)] = self._assemble(assembly, map_tensor)
            tensor = done[id(assembly)][name]
            loaded[parameter] = (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()
        return loaded

    def _assemble(self, assembly: _Assembly, read: Callable[[TensorInfo], Tensor]) -> dict[str, Tensor]:
        """What the assembly makes, by parameter name, out of tensors that ``read`` provides."""
        if assembly.converter is None:
            return {assembly.first: read(self._tensors[assembly.parts[0][0]])}
        converter = copy.deepcopy(assembly.converter)
        for name, pattern in assembly.parts:
            converter.add_tensor(assembly.first, name, pattern, _later(read, self._tensors[name]))
        try:
            made = converter.convert(assembly.first, model=self._model, config=getattr(self._model, "config", None))
        except _CONVERSION_ERRORS as error:
            names = ", ".join(name for name, _ in assembly.parts[:3])
            raise CorruptArtifact(
                f"The parameter {assembly.first} cannot be put together from {names}, ... ({error}); "
                "a tensor is missing or has the wrong shape."
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter that has several names: all its names, the canonical one first.

    The canonical name is the one that the model's own tied-weights information calls the origin, else the first.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    copies = getattr(model, "all_tied_weights_keys", None) or {}
    ordered = [sorted(group, key=lambda name: name in copies) for group in groups.values() if len(group) > 1]
    return {name: tuple(group) for group in ordered for name in group}


def _plan(tensors: Mapping[str, TensorInfo], model: nn.Module) -> tuple[list[_Assembly], tuple[str, ...]]:
    """Which tensors make which parameters, and the tensors that make none."""
    known: Mapping[str, Any] = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = getattr(model, "base_model_prefix", None)
    planned: dict[str, _Assembly] = {}
    unused: list[str] = []
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in known:
            unused.append(name)
        elif pattern is not None:
            planned.setdefault(target, _Assembly(target, by_pattern[pattern])).parts.append((name, pattern))
        elif target in planned:  # a second tensor for the same parameter: the first one counts
            unused.append(name)
        else:
            planned[target] = _Assembly(target, None, [(name, name)])
    return list(planned.values()), tuple(unused)


def _later(read: Callable[[TensorInfo], Tensor], info: TensorInfo) -> Callable[[], Tensor]:
    return lambda: read(info)
