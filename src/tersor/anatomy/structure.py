"""The model's structure: blocks, layers, ties, and the fate of each tensor of the source.

Everything is found from the instantiated model, nothing from lists of model names. What is not understood is kept as
it is, and named.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tersor.anatomy.fates import fates, kept_tensors
from tersor.anatomy.layers import Findings, find_layers
from tersor.anatomy.shards import map_tensor
from tersor.anatomy.source import Source
from tersor.anatomy.weights import WeightLoader
from tersor.contracts import Anatomy
from tersor.errors import ShapeMismatch, UnknownArchitecture

BASE = torch.bfloat16
"""Type of the placeholders of a skeleton. A placeholder of any other type has it because the class insists on it."""


def skeleton(source: Source) -> nn.Module:
    """The model of ``source`` in evaluation mode, without weights.

    Parameters and persistent buffers are bfloat16 placeholders on the meta device (or of the type the class insists
    on); buffers that no file holds (rotary frequencies) have their values. A head that the configuration calls tied,
    but that the files hold with other values, is untied, also in ``model.config``.

    Raises UnknownArchitecture when transformers cannot build it.
    """
    config = copy.deepcopy(source.config)
    declared = config.dtype or config.get_text_config().dtype
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config,
                dtype=BASE,
                experts_implementation="eager",
                trust_remote_code=source.trust_remote_code,
            )
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, RuntimeError) as error:
        raise UnknownArchitecture(f"transformers cannot build the model of {source.origin}: {error}") from error
    model.config.dtype = declared
    model.eval().requires_grad_(False)
    loader = WeightLoader(source, model)
    _untie(model, source, loader)
    _demote_buffers(model, loader)
    fill_buffers(model, BASE)
    return model


def fill_buffers(model: nn.Module, dtype: torch.dtype) -> None:
    """Compute the non-persistent buffers of ``model`` on the CPU, as transformers does for a model loaded in ``dtype``.

    Parameters are left alone. Buffers whose type the class insists on keep that type.
    """
    owners = [m for m in model.modules() if any(m._buffers.get(n) is not None for n in m._non_persistent_buffers_set)]
    for module in model.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in owners:
        module._is_hf_initialized = False  # type: ignore[assignment]
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                kind = dtype if buffer.dtype == BASE else buffer.dtype
                module._buffers[name] = torch.empty(buffer.shape, dtype=kind, device="cpu")
    model.initialize_weights()  # type: ignore[operator]


def analyse(source: Source, model: nn.Module) -> Anatomy:
    """Blocks, layers, ties and the fate of every tensor. ``model`` comes from :func:`skeleton`.

    Raises UnknownArchitecture when no list of blocks is found, CorruptArtifact when a tensor the model needs is in no
    file, ShapeMismatch when one has another shape than the model's class gives it.
    """
    loader = WeightLoader(source, model)
    _check_shapes(source, model, loader)
    found: Findings = find_layers(model)
    kept = kept_tensors(model, loader, found)
    tensors, notes = fates(source, loader, found, kept, type(model).__name__)
    if source.lossy_note:
        notes = (f"the source is {source.lossy_note}: what it lost before is not counted", *notes)
    config: Any = model.config
    return Anatomy(
        model_type=config.model_type,
        blocks=found.blocks,
        layers=found.layers,
        kept=kept,
        tensors=tensors,
        embedding=found.embedding,
        head=found.head,
        source_bytes=sum(info.nbytes for info in source.tensors.values()),
        notes=(*found.notes, *notes),
    )


def _check_shapes(source: Source, model: nn.Module, loader: WeightLoader) -> None:
    expected: Mapping[str, Any] = model.state_dict()
    for name, target in loader.targets.items():
        if name in expected and target.shape != tuple(expected[name].shape):
            raise ShapeMismatch(
                f"The parameter {name} of {source.origin} has the shape {target.shape} in its files "
                f"({', '.join(target.sources[:2])}), but {type(model).__name__} with this config.json needs "
                f"{tuple(expected[name].shape)}; weights and configuration do not belong together."
            )


def _demote_buffers(model: nn.Module, loader: WeightLoader) -> None:
    """Have the class compute the buffers that it allows files to leave out, when they do."""
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    for path, module in model.named_modules():
        for leaf in module._buffers:
            name = f"{path}.{leaf}" if path else leaf
            if loader.provider(name) is None and any(pattern.search(name) for pattern in optional):
                module._non_persistent_buffers_set.add(leaf)


def _untie(model: nn.Module, source: Source, loader: WeightLoader) -> None:
    """Give parameters that are tied in the class but differ in the files placeholders of their own."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, origin in list(tied.items()):
        if target in loader.targets and origin in loader.targets and not _equal(source, loader, target, origin):
            path, _, leaf = target.rpartition(".")
            old = model.get_parameter(target)
            setattr(model.get_submodule(path), leaf, nn.Parameter(torch.empty_like(old), requires_grad=False))
            del tied[target]
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _equal(source: Source, loader: WeightLoader, first: str, second: str) -> bool:
    a, b = loader.targets[first], loader.targets[second]
    if a.shape != b.shape or len(a.sources) != 1 or len(b.sources) != 1:
        return False
    left, right = (map_tensor(source.tensors[t.sources[0]]) for t in (a, b))
    return all(torch.equal(x, y) for x, y in zip(torch.split(left, 4096), torch.split(right, 4096), strict=True))
