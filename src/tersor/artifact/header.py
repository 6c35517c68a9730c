"""Safetensors headers: the dtype names, and a bounded, distrustful parser.

A safetensors file is: 8 bytes little-endian header length ``n``; ``n`` bytes of JSON, space-padded; the tensor data,
without holes. The parser never reads more than ``HEADER_LIMIT`` bytes and checks each entry against the size of
the file, so that nothing read later can reach outside it.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tersor.anatomy import headers
from tersor.anatomy.headers import HEADER_LIMIT, METADATA
from tersor.errors import CorruptArtifact

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "HEADER_LIMIT",
    "METADATA",
    "Header",
    "Stored",
    "parse_object",
    "read_header",
    "tensor_bytes",
]

DIMENSIONS_LIMIT = 16

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    dtype: name for dtype, name in headers.DTYPE_NAMES.items() if name != "F8_E8M0"
}
"""Types that an artifact may hold: all but the one that no codec stores and that decoders need not know."""
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: ``start`` and ``end`` count bytes from the beginning of the data section."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A parsed header. ``data_start``: offset of the data section in the file; ``file_bytes``: size of the file."""

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]
    data_start: int
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read and check the header of one safetensors file.

    Raises :class:`~tersor.errors.CorruptArtifact` unless the header is well-formed, its dtypes are known, each
    tensor has exactly the bytes its shape needs, and the tensors cover the data section without holes or overlaps.
    """
    where = path.name
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise CorruptArtifact(
                f"{where}: expected a safetensors file, found only {file_bytes} bytes; fetch or write it again"
            )
        (length,) = struct.unpack("<Q", start)
        if length > HEADER_LIMIT or length > file_bytes - 8:
            raise CorruptArtifact(
                f"{where}: the header claims {length} bytes, expected at most "
                f"{max(0, min(HEADER_LIMIT, file_bytes - 8))} in a file of {file_bytes} bytes; "
                "the file is truncated or damaged, fetch or write it again"
            )
        raw = file.read(length)
    if len(raw) < length or not raw.startswith(b"{"):
        raise CorruptArtifact(f"{where}: the header does not begin with '{{', so this is not a safetensors file")
    entries = _parse_json(where, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptArtifact(f"{where}: expected __metadata__ to map text to text, found {_short(metadata)}")
    data_bytes = file_bytes - 8 - length
    tensors = {name: _entry(where, name, entry, data_bytes) for name, entry in entries.items()}
    _check_cover(where, tensors, data_bytes)
    return Header(tensors, metadata, 8 + length, file_bytes)


def parse_object(where: str, raw: bytes) -> dict[str, Any]:
    """JSON bytes to a dict; refuses repeated keys. Raises :class:`~tersor.errors.CorruptArtifact`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise CorruptArtifact(f"{where}: the key '{_short(twice)}' occurs twice in one JSON object, expected once")
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, or a number of absurd length
        raise CorruptArtifact(f"{where}: expected JSON, found something else ({_short(error)})") from error
    if not isinstance(value, dict):
        raise CorruptArtifact(f"{where}: expected a JSON object, found {_short(value)}")
    return value


def _parse_json(where: str, raw: bytes) -> dict[str, Any]:
    return parse_object(f"{where} (header)", raw)


def _entry(where: str, name: str, entry: Any, data_bytes: int) -> Stored:
    """One header entry, checked on its own."""
    label = f"{where}: tensor '{_short(name)}'"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptArtifact(f"{label} must have exactly dtype, shape and data_offsets, found {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CorruptArtifact(f"{label} has dtype {_short(dtype)}, expected one of {', '.join(DTYPES)}")
    if not _whole_numbers(shape) or len(shape) > DIMENSIONS_LIMIT:
        raise CorruptArtifact(
            f"{label} has shape {_short(shape)}, expected at most {DIMENSIONS_LIMIT} whole numbers, none negative"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
        raise CorruptArtifact(
            f"{label} has data_offsets {_short(offsets)}, expected begin <= end within the {data_bytes} bytes of data; "
            "the file is truncated or damaged, fetch or write it again"
        )
    expected = tensor_bytes(DTYPES[dtype], shape)
    if expected != offsets[1] - offsets[0]:
        raise CorruptArtifact(
            f"{label} of dtype {dtype} and shape {_short(shape)} needs {expected} bytes, "
            f"found {offsets[1] - offsets[0]} in its data_offsets"
        )
    return Stored(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _check_cover(where: str, tensors: Mapping[str, Stored], data_bytes: int) -> None:
    """The tensors must follow one another from the first byte of the data section to the last."""
    position = 0
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != position:
            raise CorruptArtifact(
                f"{where}: tensor '{_short(name)}' begins at data byte {stored.start}, expected {position}, where the "
                "previous one ends; the header is damaged"
            )
        position = stored.end
    if position != data_bytes:
        raise CorruptArtifact(
            f"{where}: the tensors take {position} bytes, found {data_bytes} bytes of data; "
            "the file is damaged, fetch or write it again"
        )


def tensor_bytes(dtype: torch.dtype, shape: tuple[int, ...] | list[int]) -> int:
    """Bytes of a dense tensor."""
    size: int = dtype.itemsize
    for n in shape:
        size *= n
    return size


def _whole_numbers(value: Any) -> bool:
    # bool is an int in Python, and 2**63 is beyond what any file offset can be.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _short(value: Any) -> str:
    """A value for an error message, cut to a readable length."""
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
