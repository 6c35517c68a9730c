"""A model's graph with weights in it: which operators compute with each layer, and where its tensors lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tersor.codecs.dense import Dense
from tersor.contracts import Anatomy, Codec, Layer, Shape
from tersor.engines.onnx.layout import Grid, grid_of
from tersor.engines.onnx.operators import DOMAIN, Operators, constant
from tersor.errors import BadInput

DATA = "model.onnx.data"
LAYERS = "tersor.layers"
"""Name of the file's metadata entry with the codec of each layer."""
ENGINE = "tersor.engine"
"""And the one with the engine that the file was made for."""
ALIGNMENT = 16
_TYPES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.uint8: "UINT8",
    torch.int64: "INT64",
    torch.int32: "INT32",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the data file. ``of``: layer or kept parameter; ``part``: which of its tensors."""

    of: str
    part: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def name(self) -> str:
        return f"{self.of}.{self.part}" if self.part else self.of

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Built:
    """``model``: a serialised ``onnx.ModelProto`` whose weights lie in the data file. ``nbytes``: of both files."""

    model: bytes
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        return len(self.model) + max(entry.offset + entry.nbytes for entry in self.entries)


def parameter_shape(layer: Layer) -> tuple[int, ...]:
    """The shape of a layer's parameter as the model has it."""
    rows, columns = layer.shape
    turned = (columns, rows) if layer.transposed else (rows, columns)
    return turned if layer.kind != "experts" else (layer.copies, *turned)


class _Builder:
    """Fills one graph."""

    def __init__(self, skeleton: bytes, operators: Operators) -> None:
        import onnx
        import onnx_ir

        self.ir = onnx_ir
        self.model = onnx_ir.from_proto(onnx.ModelProto.FromString(skeleton))
        self.graph = self.model.graph
        self.operators = operators
        self.parameters = {value.name: value for value in self.graph.inputs}
        self.first = self.graph[0]
        self.entries: list[Entry] = []
        self.end = 0

    def parameter(self, name: str) -> Any:
        """The input that stands for a parameter, which is no input any more."""
        value = self.parameters.get(name)
        if value is None:
            raise BadInput(
                f"The ONNX graph that transformers exports does not use the parameter {name!r}, so the file would not "
                f"be the whole model; it cannot be written for ONNX."
            )
        self.graph.inputs.remove(value)
        return value

    def store(self, of: str, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        """A tensor of the data file, as a value."""
        if dtype not in _TYPES:
            raise BadInput(f"ONNX Runtime does not compute with {dtype}, which {of} is stored in.")
        entry = Entry(of, part, dtype, shape, -(-self.end // ALIGNMENT) * ALIGNMENT)
        self.entries.append(entry)
        self.end = entry.offset + entry.nbytes
        kind = self.ir.DataType[_TYPES[dtype]]
        held = self.ir.ExternalTensor(
            DATA, entry.offset, entry.nbytes, kind, shape=self.ir.Shape(shape), name=entry.name
        )
        value = self.ir.Value(
            name=entry.name, type=self.ir.TensorType(kind), shape=self.ir.Shape(shape), const_value=held
        )
        self.graph.register_initializer(value)
        return value

    def as_float(self, value: Any, *, before: Any = None) -> Any:
        """``value`` as float32; a cast of a weight is done once, when the runtime opens the file."""
        if value.dtype is not None and value.dtype == self.ir.DataType.FLOAT:
            return value
        node = self.ir.node("Cast", [value], {"to": int(self.ir.DataType.FLOAT)})
        self.graph.insert_before(before or self.first, node)
        return node.outputs[0]

    def plain(self, name: str, of: str, part: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """A parameter that is stored as floats (or as whatever it is, where it is no float)."""
        value = self.parameter(name)
        stored = self.store(of, part, dtype, shape)
        if not dtype.is_floating_point:
            self.ir.convenience.replace_all_uses_with(value, stored)
            return
        for node, _ in list(value.uses()):
            if node.op_type == "Gather" and node.inputs[0] is value:
                # Rows are cast after they are looked up, so that no table of float32 is made.
                rows = self.ir.node("Gather", [stored, node.inputs[1]], dict(node.attributes))
                self.graph.insert_before(node, rows)
                self._replace(node, self.as_float(rows.outputs[0], before=node))
        if list(value.uses()):
            self.ir.convenience.replace_all_uses_with(value, self.as_float(stored))

    def encoded(self, layer: Layer, grid: Grid) -> None:
        """A layer on a grid: its products and look-ups by the operators for it."""
        value = self.parameter(layer.parameter)
        shape = layer.stored_shape
        values = {
            part: self.store(layer.name, part, dtype, size)
            for part, (dtype, size) in self.operators.pieces(grid, shape).items()
        }
        values["scale"] = self.as_float(values["scale"])
        if layer.kind == "experts":
            self._stack(layer, value, self.operators.whole(grid, shape, values))
            return
        for node, _ in list(value.uses()):
            if node.op_type == "Transpose":
                for product, at in list(node.outputs[0].uses()):
                    self._multiply(layer, grid, shape, values, product, at, transposed=not layer.transposed)
            elif node.op_type == "Gather" and node.inputs[0] is value:
                made = self.operators.look_up(grid, shape, values, node.inputs[1])
                self.graph.insert_before(node, made)
                self._replace(node, made[-1].outputs[0])
            else:
                at = list(node.inputs).index(value)
                self._multiply(layer, grid, shape, values, node, at, transposed=layer.transposed)
        for node, _ in list(value.uses()):
            self.graph.remove(node, safe=True)

    def _stack(self, layer: Layer, value: Any, made: list[Any]) -> None:
        """The stacked matrices of experts, dequantized as a whole: the exporter's graph takes them apart by itself."""
        size = constant(torch.tensor([layer.copies, *layer.shape]))
        made += [size, self.ir.node("Reshape", [made[-1].outputs[0], size.outputs[0]])]
        if layer.transposed:
            made.append(self.ir.node("Transpose", [made[-1].outputs[0]], {"perm": [0, 2, 1]}))
        self.graph.insert_before(self.first, made)
        self.ir.convenience.replace_all_uses_with(value, made[-1].outputs[0])

    def _multiply(
        self, layer: Layer, grid: Grid, shape: Shape, values: Mapping[str, Any], node: Any, at: int, *, transposed: bool
    ) -> None:
        """``node`` multiplies by the weight, its input ``at``. ``transposed``: which lies there as ``(in, out)``."""
        flip = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
        factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
        plain = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not node.attributes.get_int("transA", 0) and factors == [1.0, 1.0]
        )
        if not plain or at != 1 or transposed == flip:
            raise BadInput(
                f"The ONNX graph that transformers exports uses the weight of {layer.name} in {node.op_type}, not in a "
                f"product; ONNX files cannot have it encoded."
            )
        made = self.operators.multiply(grid, shape, values, node.inputs[0])
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            made.append(self.ir.node("Add", [made[-1].outputs[0], node.inputs[2]]))
        self.graph.insert_before(node, made)
        self._replace(node, made[-1].outputs[0])

    def _replace(self, node: Any, value: Any) -> None:
        old = node.outputs[0]
        name = old.name
        self.ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        if value.is_graph_output():
            value.shape, value.type = old.shape, old.type
        self.graph.remove(node, safe=True)
        value.name = name


def build(skeleton: bytes, anatomy: Anatomy, codecs: Mapping[str, Codec], operators: Operators) -> Built:
    """The graph of :func:`~tersor.engines.onnx.graph.open_graph` with these codecs by layer.

    Raises BadInput where the graph uses a weight in a way that its operators cannot serve.
    """
    work = _Builder(skeleton, operators)
    for layer in anatomy.layers:
        codec = codecs[layer.name]
        if isinstance(codec, Dense):
            (part,) = codec.parts(layer.stored_shape)
            work.plain(layer.parameter, layer.name, part.name, part.dtype, parameter_shape(layer))
        else:
            grid = grid_of(codec)
            assert grid is not None  # the engine's rules have let nothing else through
            work.encoded(layer, grid)
    for name, (dtype, shape) in anatomy.kept.items():
        work.plain(name, name, "", dtype, shape)
    work.graph.opset_imports[""] = max(work.graph.opset_imports[""], operators.opset)
    if any(node.domain == DOMAIN for node in work.graph):
        work.graph.opset_imports[DOMAIN] = 1
    texts = {layer.name: str(codecs[layer.name]) for layer in anatomy.layers}
    work.model.metadata_props[LAYERS] = json.dumps(texts, separators=(",", ":"))
    work.model.metadata_props[ENGINE] = operators.engine
    proto = work.ir.to_proto(work.model)
    del proto.graph.value_info[:]  # of the weights, whose tensors say the same
    return Built(proto.SerializeToString(deterministic=True), tuple(work.entries))
