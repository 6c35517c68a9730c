"""A model's ONNX graph without weights, by the ecosystem's own exporter (``transformers.exporters`` over torch's).

The exporter is given a model whose parameters take no memory: one number each, seen through zero strides. So a graph
costs the same few hundred megabytes whatever the model's size, and the weights are filled in where they are written.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.anatomy import Source, cache_folder, skeleton
from tersor.anatomy.structure import fill_buffers
from tersor.anatomy.weights import aliases
from tersor.errors import BadInput, EngineFailed

PAST = "past_key_values.{}.{}"
PRESENT = "present.{}.{}"
"""Names of the cache's inputs and outputs, as optimum and onnxruntime-genai call them."""
_SIDES = ("key", "value")
_BATCH, _SEQUENCE, _PAST = 2, 3, 5
"""Sizes to trace with: all different, and none that a class treats as special."""
_FORM = "1"
"""Part of the cache's key: changes when this file makes another graph of the same model."""
_PACKAGES = ("torch", "transformers", "onnxscript", "onnx_ir")
_NEEDED = "ONNX files need `pip install 'tersor[onnx]'` and a transformers that has transformers.exporters"


def packages() -> Any:
    """The package ``onnx_ir``. Raises BadInput, saying what to install, where a part of the exporter is missing."""
    try:
        import onnx_ir
        import onnxscript.optimizer  # noqa: F401
        import transformers.exporters.exporter_onnx  # noqa: F401
    except ImportError as error:
        raise BadInput(f"{_NEEDED} ({error}).") from error
    return onnx_ir


def open_graph(source: Source, cache_dir: Path | None = None) -> bytes:
    """The graph of ``source`` as a serialised ``onnx.ModelProto``: float32, no weights, any batch and length.

    Inputs are ``input_ids``, ``attention_mask``, ``position_ids`` and, by layer, ``past_key_values.N.key`` and
    ``.value`` ``(batch, heads, past, width)``, and then one for each parameter, of its canonical name. Outputs are
    ``logits`` and ``present.N.key`` and ``.value``. Kept in ``cache_dir`` (default: the user's cache folder). Raises
    BadInput where a package is missing, EngineFailed for a model that the exporter cannot take.
    """
    packages()
    model = skeleton(source)
    path = cache_folder(cache_dir) / "onnx" / f"{_key(model)}.onnx"
    if path.is_file():
        return path.read_bytes()
    made = _export(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(made)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return made


def _key(model: nn.Module) -> str:
    """Of all that the graph depends on."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    config: Any = model.config
    said = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    parts = [_FORM, type(model).__name__, said, versions, shapes, aliases(model)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _export(model: nn.Module) -> bytes:
    """``model`` from :func:`~tersor.anatomy.skeleton`; it is changed."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript.optimizer import optimize

    names = _empty(model)
    program = _traced(model)
    graph = program.graph
    for name, value in list(graph.initializers.items()):
        if name in names:
            # As inputs, no pass of the optimiser takes the placeholders for values.
            del graph.initializers[name]
            value.const_value = None
            value.name = names[name]
            graph.inputs.append(value)
    _name(graph)
    with _quiet():
        optimize(program)
    ClearMetadataAndDocStringPass()(program)
    for node in graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = output.type = None  # engines infer them again; in the file they are a third of it
    made: bytes = onnx_ir.to_proto(program).SerializeToString(deterministic=True)
    return made


def _empty(model: nn.Module) -> dict[str, str]:
    """Give every parameter a placeholder without memory. Returns the canonical name of each name there is."""
    canonical = {name: group[0] for name, group in aliases(model).items()}
    made: dict[int, Any] = {}
    names = {}

    def empty(old: torch.Tensor) -> torch.Tensor:
        dtype = torch.float32 if old.is_floating_point() else old.dtype
        return torch.zeros((), dtype=dtype).expand(old.shape)

    for path, module in model.named_modules():
        for held, wrap in ((module._parameters, True), (module._buffers, False)):
            for leaf, old in held.items():
                if old is None or leaf in module._non_persistent_buffers_set:
                    continue
                if id(old) not in made:
                    fresh = empty(old)
                    made[id(old)] = (old, nn.Parameter(fresh, requires_grad=False) if wrap else fresh)
                held[leaf] = made[id(old)][1]
                name = f"{path}.{leaf}" if path else leaf
                names[name] = canonical.get(name, name)
    model.config.dtype = torch.float32  # type: ignore[union-attr]
    fill_buffers(model, torch.float32)
    return names


def _traced(model: Any) -> Any:
    """The exporter's ``onnx_ir.Model``, not optimised: folding constants would fold placeholders."""
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    free = torch.export.Dim.DYNAMIC
    rows = {0: free, 1: free}
    try:
        with _quiet():
            shapes = _cache_shapes(model)
            cache = DynamicCache()
            for layer, sides in enumerate(shapes):
                cache.update(*(torch.zeros(shape) for shape in sides), layer)
            inputs = {
                "input_ids": torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64),
                "attention_mask": torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.int64),
                "position_ids": torch.arange(_PAST, _PAST + _SEQUENCE).repeat(_BATCH, 1),
                "past_key_values": cache,
            }
            dynamic = {**dict.fromkeys(inputs, rows), "past_key_values": [{0: free, 2: free}] * (2 * len(shapes))}
            settings = OnnxConfig(dynamic=True, dynamic_shapes=dynamic, optimize=False)
            return OnnxExporter().export(model, {**inputs, "use_cache": True}, config=settings).program
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        raise EngineFailed(
            f"transformers' ONNX exporter cannot export {type(model).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error


def _cache_shapes(model: Any) -> list[tuple[torch.Size, torch.Size]]:
    """Shapes of keys and values that each layer keeps of ``_BATCH`` sequences of ``_PAST`` tokens.

    Found by running the model on tensors without values. Experts are left in a form that a graph can have: plain
    loops over them depend on the text.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import DynamicCache

    experts = any(parameter.ndim == 3 for parameter in model.parameters())
    if experts:
        model.set_experts_implementation("batched_mm")
    # Without a configuration every layer keeps all keys; the mask still applies a sliding window.
    cache = DynamicCache()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.zeros(_BATCH, _PAST, dtype=torch.int64)
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    if experts:
        model.set_experts_implementation("grouped_mm")
    return [(torch.Size(layer.keys.shape), torch.Size(layer.values.shape)) for layer in cache.layers]


def _name(graph: Any) -> None:
    """Inputs, outputs and their free dimensions by the names that others use."""
    import onnx_ir

    def rename(value: Any, name: str, **free: str) -> None:
        value.name = name
        value.shape = onnx_ir.Shape([free.get(f"d{at}", dim) for at, dim in enumerate(value.shape)])

    ids, mask, positions, *rest = graph.inputs
    rename(ids, "input_ids", d0="batch", d1="sequence")
    rename(mask, "attention_mask", d0="batch", d1="past + sequence")
    rename(positions, "position_ids", d0="batch", d1="sequence")
    logits, *present = graph.outputs
    rename(logits, "logits", d0="batch", d1="sequence")
    for at, (before, after) in enumerate(zip(rest, present, strict=False)):
        layer, side = at // 2, _SIDES[at % 2]
        rename(before, PAST.format(layer, side), d0="batch", d2="past")
        rename(after, PRESENT.format(layer, side), d0="batch", d2="past + sequence")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress on the screen, which is where a plan may be printed as JSON."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "transformers.exporters")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
