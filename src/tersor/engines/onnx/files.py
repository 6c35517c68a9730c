"""An ONNX folder on disk: ``model.onnx``, the weights beside it, and what a tokenizer needs. Written, and read back."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.anatomy import Source
from tersor.codecs import parse
from tersor.codecs.dense import Dense
from tersor.contracts import Anatomy, Codec, Layer, Rounding
from tersor.engines.contract import Read, written_alike
from tersor.engines.onnx.build import DATA, LAYERS, Built, Entry, parameter_shape
from tersor.engines.onnx.layout import Pieces, grid_of, put_together, take_apart
from tersor.engines.onnx.operators import INTEGERS, Operators, round_groups
from tersor.errors import BadInput, CorruptArtifact

MODEL = "model.onnx"
_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    16: torch.bfloat16,
}
"""Numbers of ``onnx.TensorProto.DataType``."""


def write_folder(
    path: Path,
    built: Built,
    source: Source,
    anatomy: Anatomy,
    codecs: Mapping[str, Codec],
    operators: Operators,
    read: Read,
) -> None:
    """Write the folder ``path``; one layer is in memory at a time. Nothing is left of it when that fails."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        (partial / MODEL).write_bytes(built.model)
        with (partial / DATA).open("wb") as file:
            for entry, tensor in _contents(built, anatomy, codecs, operators, read):
                file.write(b"\0" * (entry.offset - file.tell()))
                file.write(_raw(tensor))
        (partial / "config.json").write_text(json.dumps(source.plain_config(), indent=2) + "\n", encoding="utf-8")
        source.copy_side_files(partial)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _contents(
    built: Built, anatomy: Anatomy, codecs: Mapping[str, Codec], operators: Operators, read: Read
) -> Iterator[tuple[Entry, Tensor]]:
    """Each entry with its tensor, in order."""
    layers = {layer.name: layer for layer in anatomy.layers}
    held: tuple[str, Mapping[str, Tensor]] = ("", {})
    for entry in built.entries:
        if held[0] != entry.of:
            found = read(entry.of)
            if isinstance(found, Tensor):
                held = (entry.of, {"": found})
            else:
                held = (entry.of, _to_file(layers[entry.of], codecs[entry.of], found, operators))
        yield entry, held[1][entry.part].to(entry.dtype).reshape(entry.shape)


def _to_file(layer: Layer, codec: Codec, tensors: Mapping[str, Tensor], operators: Operators) -> dict[str, Tensor]:
    grid = grid_of(codec)
    if grid is not None:
        return operators.arrange(grid, take_apart(codec, tensors, layer.stored_shape), layer.stored_shape)
    (weight,) = tensors.values()
    stacked = weight.reshape(-1, *layer.shape)
    turned = stacked.transpose(1, 2) if layer.transposed else stacked
    (part,) = tensors
    return {part: turned.reshape(parameter_shape(layer))}


def _raw(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def open_model(path: Path) -> Any:
    """The ``onnx.ModelProto`` of a folder, weights not read. Raises BadInput, CorruptArtifact."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise BadInput(f"ONNX files need `pip install 'tersor[onnx]'` ({error}).") from error
    file = path / MODEL
    try:
        return onnx.ModelProto.FromString(file.read_bytes())
    except (DecodeError, OSError) as error:
        raise CorruptArtifact(f"{file} is not a whole ONNX file ({error}); write or fetch it again.") from error


def _levels(model: Any) -> dict[str, int]:
    """``accuracy_level`` of each product with encoded weights, by the name of its codes."""
    return {
        # Left out, it is 0.
        node.input[1]: next((int(one.i) for one in node.attribute if one.name == "accuracy_level"), 0)
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }


class Folder:
    """An ONNX folder of ours, read back; see :class:`~tersor.engines.contract.Stored`.

    Raises CorruptArtifact for what is damaged or of another model, BadInput for what tersor did not write.
    """

    def __init__(self, path: Path, anatomy: Anatomy, operators: Operators) -> None:
        self._path, self._operators = path, operators
        self._layers = {layer.name: layer for layer in anatomy.layers}
        self._kept = anatomy.kept
        model = open_model(path)
        self.texts = self._read_texts({prop.key: prop.value for prop in model.metadata_props})
        self._levels = _levels(model)
        self._held = {tensor.name: tensor for tensor in model.graph.initializer}
        data = path / DATA
        if not data.is_file():
            raise CorruptArtifact(f"{path} lacks {DATA}: the folder is incomplete.")
        self._size = data.stat().st_size
        self.nbytes = (path / MODEL).stat().st_size + self._size
        with data.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if self._size else b""
        for layer in anatomy.layers:
            for part, (dtype, shape) in self._pieces(layer, parse(self.texts[layer.name])).items():
                self._place(f"{layer.name}.{part}", dtype, shape)
        for name, (dtype, shape) in self._kept.items():
            self._place(name, dtype, shape)

    def tensors(self, layer: Layer, codec: Codec) -> dict[str, Tensor]:
        """A layer's stored tensors, bit for bit as the codec made them."""
        found = {
            part: self._tensor(f"{layer.name}.{part}", dtype, shape)
            for part, (dtype, shape) in self._pieces(layer, codec).items()
        }
        grid = grid_of(codec)
        if grid is not None:
            return put_together(codec, self._operators.restore(grid, found, layer.stored_shape), layer.stored_shape)
        ((part, weight),) = found.items()
        stacked = weight.reshape(layer.copies, *parameter_shape(layer)[-2:])
        turned = stacked.transpose(1, 2) if layer.transposed else stacked
        return {part: turned.reshape(layer.stored_shape).contiguous()}

    @property
    def said(self) -> str:
        """At which ``accuracy_level`` products are asked for."""
        levels = sorted(set(self._levels.values()))
        return f"accuracy_level {' and '.join(map(str, levels))}" if levels else ""

    def inputs(self, layer: Layer, codec: Codec) -> Rounding | None:
        """How the runtime rounds inputs: at level 4 to 8 bits, in the groups that the layer's weights have."""
        grid = grid_of(codec)
        if grid is None or grid.group is None or self._levels.get(f"{layer.name}.codes") != INTEGERS:
            return None
        return partial(round_groups, grid.group)

    def kept(self, name: str) -> Tensor:
        dtype, shape = self._kept[name]
        return self._tensor(name, dtype, shape)

    def holds(self, name: str, value: Tensor) -> bool:
        return written_alike(self.kept(name), value)

    def _read_texts(self, props: Mapping[str, str]) -> dict[str, str]:
        try:
            texts = json.loads(props[LAYERS])
        except KeyError:
            raise BadInput(
                f"{self._path / MODEL} does not say which codecs its layers are in: tersor did not write it."
            ) from None
        except json.JSONDecodeError as error:
            raise CorruptArtifact(f"{self._path / MODEL} has a damaged entry {LAYERS!r} ({error}).") from error
        if not isinstance(texts, dict) or texts.keys() != self._layers.keys():
            raise CorruptArtifact(f"{self._path / MODEL} has other layers than the model: it is of another model.")
        return {name: str(text) for name, text in texts.items()}

    def _pieces(self, layer: Layer, codec: Codec) -> Pieces:
        """Dtypes and shapes of a layer's tensors in the file, by part."""
        grid = grid_of(codec)
        if grid is not None and self._operators.refuses(grid, lookup=False) is None:
            codec.parts(layer.stored_shape)  # refuses a group that does not divide the width
            return self._operators.pieces(grid, layer.stored_shape)
        if not isinstance(codec, Dense):
            raise BadInput(f"{self._path} holds {layer.name} as {codec}, which {self._operators.engine} does not read.")
        (part,) = codec.parts(layer.stored_shape)
        return {part.name: (part.dtype, parameter_shape(layer))}

    def _place(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        """Where a tensor begins in the data file, everything that the file says of it checked."""
        held = self._held.get(name)
        if held is None:
            raise CorruptArtifact(f"{self._path / MODEL} lacks the tensor {name!r}: it is of another model.")
        if _TYPES.get(held.data_type) != dtype or tuple(held.dims) != shape:
            raise CorruptArtifact(
                f"{self._path / MODEL}: the tensor {name!r} must be {dtype} {shape} and is "
                f"{_TYPES.get(held.data_type, held.data_type)} {tuple(held.dims)}."
            )
        said = {entry.key: entry.value for entry in held.external_data}
        wanted = torch.Size(shape).numel() * dtype.itemsize
        numbers = [said.get(key, "") for key in ("offset", "length")]
        if said.get("location") != DATA or not all(number.isdecimal() for number in numbers):
            raise CorruptArtifact(f"{self._path / MODEL} does not say where in {DATA} the tensor {name!r} lies.")
        start, length = map(int, numbers)
        if length != wanted or start + length > self._size:
            raise CorruptArtifact(
                f"{self._path / DATA} has {self._size} bytes, and the tensor {name!r} of {wanted} bytes would be at "
                f"{start} to {start + length}; fetch it again."
            )
        return start

    def _tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        start = self._place(name, dtype, shape)
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
        # A copy: views of the map would keep it, and need an alignment that a damaged file may not have.
        return raw.clone().view(dtype).reshape(shape)
