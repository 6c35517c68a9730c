"""A GGUF written tensor by tensor, its size known beforehand to the byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PretrainedConfig

from tersor.contracts import Anatomy
from tersor.engines.llama_cpp.metadata import describe, describe_vocabulary, extra_tensors
from tersor.engines.llama_cpp.names import Piece, architecture, gguf, kept_value, pieces
from tersor.engines.llama_cpp.tokenizer import Vocabulary

_MOSTLY = 1 << 10
"""GGUF's file type for files whose tensors have types of their own ("guessed")."""


@dataclass(frozen=True)
class Recipe:
    """Everything that a GGUF is made of but its tensors."""

    anatomy: Anatomy
    config: PretrainedConfig
    vocabulary: Vocabulary
    name: str


@dataclass(frozen=True)
class Entry:
    """One tensor to write. ``of``: layer or parameter it is made of. ``kind``: GGML type."""

    piece: Piece
    of: str
    kind: Any
    nbytes: int


def entries(recipe: Recipe, types: Mapping[str, str]) -> list[Entry]:
    """All tensors in the order of the file: layers in the GGML types that ``types`` names, what is kept in float32."""
    package = gguf()
    places = pieces(recipe.anatomy, recipe.config)
    found = []
    for of, made in places.items():
        kind = package.GGMLQuantizationType[types[of]] if of in types else package.GGMLQuantizationType.F32
        block, size = package.GGML_QUANT_SIZES[kind]
        found += [Entry(piece, of, kind, int(np.prod(piece.shape)) // block * size) for piece in made]
    return found


def prepared(recipe: Recipe, listed: list[Entry], path: Path) -> Any:
    """A ``gguf.GGUFWriter`` with all metadata and the list of tensors, nothing written yet."""
    package = gguf()
    writer = package.GGUFWriter(path, architecture(recipe.config))
    describe(writer, recipe.config, name=recipe.name, file_type=_MOSTLY)
    describe_vocabulary(writer, recipe.vocabulary)
    for name, value in extra_tensors(recipe.config).items():
        writer.add_tensor_info(name, tuple(value.shape), np.dtype(np.float32), value.nbytes)
    for entry in listed:
        quantized = entry.kind != package.GGMLQuantizationType.F32
        shape = (*entry.piece.shape[:-1], entry.nbytes // int(np.prod(entry.piece.shape[:-1])))
        if quantized:
            writer.add_tensor_info(entry.piece.name, shape, np.dtype(np.uint8), entry.nbytes, raw_dtype=entry.kind)
        else:
            writer.add_tensor_info(entry.piece.name, entry.piece.shape, np.dtype(np.float32), entry.nbytes)
    return writer


def _write_header(writer: Any) -> None:
    """All that comes before the tensors' data."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def write(
    recipe: Recipe,
    types: Mapping[str, str],
    path: Path,
    read: Callable[[str], Tensor],
) -> None:
    """Write ``path``. ``read(layer or parameter)``: a layer's blocks ``(rows, bytes)`` uint8, a kept parameter's value.

    Nothing is left under ``path`` when it fails.
    """
    listed = entries(recipe, types)
    partial = path.with_name(path.name + ".partial")
    writer = prepared(recipe, listed, partial)
    try:
        _write_header(writer)
        for value in extra_tensors(recipe.config).values():
            writer.write_tensor_data(value.numpy())
        for tensor in _contents(recipe, listed, types, read):
            writer.write_tensor_data(tensor.reshape(-1, tensor.shape[-1]).contiguous().numpy())
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _contents(
    recipe: Recipe, listed: list[Entry], types: Mapping[str, str], read: Callable[[str], Tensor]
) -> Iterator[Tensor]:
    """What each entry holds, in order; what several are made of is read once."""
    held: tuple[str, Tensor] | None = None
    for entry in listed:
        if held is None or held[0] != entry.of:
            held = (entry.of, read(entry.of))
        value = held[1]
        if entry.of not in types:
            value = kept_value(entry.of, value, recipe.config)
        if entry.piece.rows is not None:
            value = value[entry.piece.rows]
        yield value if value.dim() > 1 else value[None]


def file_bytes(recipe: Recipe, types: Mapping[str, str], scratch: Path) -> int:
    """The exact size of the file. ``scratch``: a folder for the header, which is written to know its length."""
    listed = entries(recipe, types)
    path = scratch / "header.gguf"
    writer = prepared(recipe, listed, path)
    try:
        _write_header(writer)
        writer.close()
        header = path.stat().st_size
    finally:
        path.unlink(missing_ok=True)
    pad = int(writer.data_alignment)
    sizes = [value.nbytes for value in extra_tensors(recipe.config).values()] + [entry.nbytes for entry in listed]
    return _padded(header, pad) + sum(_padded(size, pad) for size in sizes)


def _padded(size: int, pad: int) -> int:
    return -(-size // pad) * pad
