"""Blocks and encodable layers of an instantiated model."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tersor.anatomy.experts import Experts, find_experts, is_transposed
from tersor.anatomy.siblings import family, trace
from tersor.anatomy.weights import aliases
from tersor.contracts import Layer
from tersor.errors import UnknownArchitecture

_LEAST = 8
"""Rows or columns below which a matrix is no layer but a gate of some kind."""


@dataclass(frozen=True)
class Findings:
    """``reasons``: parameter -> why it stays as it is. ``ties``: other name -> canonical name."""

    blocks: tuple[str, ...]
    layers: tuple[Layer, ...]
    embedding: str | None
    head: str | None
    reasons: dict[str, str]
    ties: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Kept:
    """A parameter that is no layer, and why. ``odd``: a user should be told."""

    reason: str
    odd: bool = False


@dataclass(frozen=True)
class _Place:
    """Where in the model the search is."""

    blocks: tuple[str, ...]
    experts: Experts
    ends: tuple[str | None, str | None]
    """module paths of input embedding and head"""

    def block_of(self, path: str) -> int | None:
        """Number of the block that ``path`` lies in."""
        return next((i for i, block in enumerate(self.blocks) if path == block or path.startswith(f"{block}.")), None)


def find_layers(model: nn.Module) -> Findings:
    """All layers in the order of computation. Raises UnknownArchitecture when there is no list of blocks."""
    ends = (_end(model, "get_input_embeddings"), _end(model, "get_output_embeddings"))
    place = _Place(find_blocks(model), find_experts(model), ends)
    names = aliases(model)
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    notes: list[str] = []
    for path, module in model.named_modules():
        for name, found in _parameters(path, module, place):
            canonical = names.get(name, (name,))[0]
            if canonical != name:
                continue
            if isinstance(found, Layer):
                layers.append(replace(found, tied=names.get(name, (name,))[1:]))
            else:
                reasons[name] = found.reason
                if found.odd:
                    notes.append(f"{name} {tuple(model.get_parameter(name).shape)} is kept as it is: {found.reason}")
    by_parameter = {layer.parameter: layer.name for layer in layers}
    embedding, head = (
        None if end is None else by_parameter.get(names.get(f"{end}.weight", (f"{end}.weight",))[0]) for end in ends
    )
    return Findings(
        blocks=place.blocks,
        layers=_arrange(model, layers, place, embedding),
        embedding=embedding,
        head=head,
        reasons=reasons,
        ties={name: group[0] for name, group in names.items() if name != group[0]},
        notes=_shorten(notes),
    )


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Paths of the decoder blocks: the entries of the module list with the most parameters, the outermost of them.

    Raises UnknownArchitecture when there is none.
    """
    lists = [
        (sum(parameter.numel() for parameter in module.parameters()), path, len(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and all(any(True for _ in entry.children()) for entry in module)
    ]
    size, path, count = max(lists, key=lambda entry: entry[0], default=(0, "", 0))
    if size == 0:
        raise UnknownArchitecture(
            f"No list of decoder blocks was found in {type(model).__name__}; tersor needs a model of repeated blocks."
        )
    return tuple(f"{path}.{number}" for number in range(count))


def _parameters(path: str, module: nn.Module, place: _Place) -> Iterator[tuple[str, Layer | _Kept]]:
    """What each parameter directly in ``module`` is."""
    for leaf, parameter in module.named_parameters(recurse=False):
        name = f"{path}.{leaf}" if path else leaf
        if parameter.ndim < 2:
            yield name, _Kept("one-dimensional: a norm, bias or scale")
        elif place.experts.is_router(path):
            yield name, _Kept("router of a mixture of experts")
        elif leaf == "weight" and parameter.ndim == 2 and _is_plain(module):
            yield name, _matrix(path, parameter, module, place)
        elif parameter.ndim == 3 and path in place.experts.owners:
            yield name, _stack(path, leaf, parameter, module, place)
        elif path in place.experts.owners and "bias" in leaf:
            yield name, _Kept("biases of experts")
        else:
            yield name, _Kept(f"a parameter of {type(module).__name__}, of unknown use", odd=True)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module looks rows up, or multiplies by its weight and does nothing else that we do not know of."""
    if isinstance(module, nn.Embedding):
        return True
    kind = next((kind for kind in (nn.Linear, Conv1D) if isinstance(module, kind)), None)
    return kind is not None and (type(module).forward is kind.forward or _acts_linear(module))


def _acts_linear(module: nn.Module) -> bool:
    """Whether a linear module with a forward of its own still computes ``x Wᵀ + b``: tried on a small weight."""
    probe = copy.copy(module)
    weight, bias = torch.linspace(-1, 2, 6).reshape(2, 3), torch.tensor([0.5, -0.25])
    probe._parameters = dict.fromkeys(module._parameters)
    probe._parameters["weight"] = nn.Parameter(weight)
    if module._parameters.get("bias") is not None:
        probe._parameters["bias"] = nn.Parameter(bias)
    inputs = torch.linspace(-2, 3, 12).reshape(2, 2, 3)
    try:
        with torch.no_grad():
            output = probe(inputs)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    return torch.is_tensor(output) and torch.equal(output, inputs @ weight.T + (0 if probe.bias is None else bias))


def _matrix(path: str, weight: torch.Tensor, module: nn.Module, place: _Place) -> Layer | _Kept:
    """The weight of a linear, Conv1D or embedding module."""
    rows, columns = weight.shape
    parameter, number, at_end = f"{path}.weight", place.block_of(path), path in place.ends
    if isinstance(module, nn.Embedding):
        if path != place.ends[0]:
            return _Kept("an embedding other than the input embedding")
        return Layer(path, parameter, "embedding", (rows, columns), None, inputs=path)
    if number is None and not at_end:
        return _Kept("a matrix outside the blocks", odd=True)
    if min(rows, columns) < _LEAST:
        return _Kept(f"it has fewer than {_LEAST} rows or columns", odd=True)
    if isinstance(module, Conv1D):
        return Layer(path, parameter, "conv1d", (columns, rows), number, inputs=path, transposed=True)
    return Layer(path, parameter, "linear", (rows, columns), number, inputs=path)


def _stack(path: str, leaf: str, weight: torch.Tensor, module: nn.Module, place: _Place) -> Layer | _Kept:
    """The matrices of all experts, in one parameter."""
    copies, first, second = weight.shape
    number, turned = place.block_of(path), is_transposed(module, path, place.experts.hidden)
    if number is None:
        return _Kept("experts outside the blocks", odd=True)
    if turned is None or min(first, second) < _LEAST:
        return _Kept("experts whose matrices are odd: which side is the input cannot be told", odd=True)
    name = path if leaf == "weight" else f"{path}.{leaf}"
    shape = (second, first) if turned else (first, second)
    return Layer(name, f"{path}.{leaf}", "experts", shape, number, inputs=name, copies=copies, transposed=turned)


def _arrange(model: nn.Module, layers: list[Layer], place: _Place, embedding: str | None) -> tuple[Layer, ...]:
    """Layers in the order of computation, with their siblings: same input, and fused when of one parent too."""
    inside = {layer.name: model.get_submodule(layer.name) for layer in layers if layer.kind in ("linear", "conv1d")}
    seen = trace(model, inside, set(place.experts.owners))
    order = {path: position for position, path in enumerate(seen)}
    groups: dict[str, list[str]] = {}
    for layer in layers:
        if layer.kind in ("linear", "conv1d") and layer.block is not None:
            key = f"#{seen[layer.name]}" if layer.name in seen else family(layer.name, layer.shape[1])
            groups.setdefault(f"{layer.block} {layer.shape[1]} {key}", []).append(layer.name)
    first = {name: min(group, key=lambda n: order.get(n, 0)) for group in groups.values() for name in group}
    pairs: dict[tuple[str, str], list[str]] = {}
    for name, shared in first.items():
        pairs.setdefault((shared, name.rpartition(".")[0]), []).append(name)
    fused = {
        name: min(group, key=lambda n: order.get(n, 0)) for group in pairs.values() if len(group) > 1 for name in group
    }

    def position(layer: Layer) -> tuple[int, int, int]:
        if layer.block is None:
            return (-1 if layer.name == embedding else len(place.blocks), 0, 0)
        path = layer.name if layer.name in order else layer.parameter.rpartition(".")[0]
        known = path in order
        return (layer.block, int(not known), order[path] if known else 0)

    done = [replace(a, inputs=first.get(a.name, a.inputs), fused=fused.get(a.name)) for a in layers]
    return tuple(sorted(done, key=position))


def _end(model: nn.Module, getter: str) -> str | None:
    """Module path of the input embedding or the head, None where the model has none."""
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return next((path for path, candidate in model.named_modules() if candidate is module and path), None)


def _shorten(notes: list[str]) -> tuple[str, ...]:
    """The same remark on many blocks, said once."""
    said = Counter(re.sub(r"\.\d+(?=\.)", ".*", note) for note in notes)
    return tuple(note if count == 1 else f"{note} (in {count} places)" for note, count in said.items())
