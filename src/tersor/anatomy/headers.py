"""Safetensors files as they are written, byte for byte: names of types, entries, whole headers, shards and their index.

All that depends on names, types and shapes alone is known before any tensor is: so files have an exact size, and
bounds on what one more tensor costs hold whatever stands before it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tersor.errors import BadInput

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000
"""Bytes; the limit that the safetensors format itself sets."""
SHARD_LIMIT = 4_000_000_000
"""Bytes of tensor data in one file; below the 4 GiB limit of FAT and of 32-bit offsets."""
METADATA = {"format": "pt"}
"""What transformers expects in ``__metadata__``."""

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPES: Mapping[str, torch.dtype] = {key: getattr(torch, name) for key, name in _NAMES.items() if hasattr(torch, name)}
"""Types by safetensors' names for them, as far as this version of torch has them."""
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_METADATA_ENTRY = f'"__metadata__":{json.dumps(METADATA, separators=(",", ":"))}'
_SHARD_NAME_LENGTH = len("model-00001-of-00002.safetensors")


@dataclass(frozen=True)
class Item:
    """One tensor to write. Raises BadInput for a name or dtype that a safetensors file cannot hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise BadInput(
                f"tensor '{self.name}' has dtype {self.dtype}, which a safetensors file cannot hold; "
                f"convert it to one of {', '.join(map(str, DTYPE_NAMES))}"
            )
        try:
            self.name.encode()
        except UnicodeEncodeError as error:
            raise BadInput(f"tensor name {self.name!r} is not valid Unicode text; rename it") from error
        if self.name == "__metadata__":
            raise BadInput("a tensor cannot be called '__metadata__' in a safetensors file; rename it")

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def entry(self, start: int, end: int) -> str:
        """What a header says of it when it lies from byte ``start`` to ``end`` of the data."""
        body = {"dtype": DTYPE_NAMES[self.dtype], "shape": list(self.shape), "data_offsets": [start, end]}
        return _text(self.name) + ":" + json.dumps(body, separators=(",", ":"))

    def most_bytes(self, limit: int, *, sharded: bool) -> int:
        """Most bytes that it adds to headers and, where ``sharded``, to the index, in files of up to ``limit`` bytes of
        data: offsets reach that, or the tensor's own size where it has a file to itself."""
        largest = max(limit, self.nbytes)
        cost = 1 + len(self.entry(largest, largest).encode())
        return cost + len(_index_line(self.name, "").encode()) + _SHARD_NAME_LENGTH + 2 if sharded else cost

    def least_bytes(self) -> int:
        """Least bytes that it adds to a header: where it comes first."""
        return 1 + len(self.entry(0, self.nbytes).encode())


def header(items: Iterable[Item]) -> bytes:
    """The first bytes of a file with these tensors one after the other: length, JSON, and spaces up to 8 bytes.

    Raises BadInput where that is longer than safetensors allows.
    """
    pieces = [_METADATA_ENTRY]
    position = 0
    for item in items:
        pieces.append(item.entry(position, position + item.nbytes))
        position += item.nbytes
    text = ("{" + ",".join(pieces) + "}").encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise BadInput(
            f"{len(pieces) - 1} tensors need a header of {len(text)} bytes, and safetensors allows {HEADER_LIMIT}; "
            "put fewer of them into a file"
        )
    return struct.pack("<Q", len(text)) + text


def fill_shards(items: Iterable[Item], limit: int) -> list[list[Item]]:
    """Items by file, at least one file: each takes items until the next would bring it over ``limit`` bytes of data.

    Inside a file wide types come first, which keeps each tensor aligned to its element size without the holes that
    safetensors forbids; equal widths keep the given order.
    """
    shards: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        if shards[-1] and filled + item.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.nbytes
    return [sorted(shard, key=lambda item: -item.dtype.itemsize) for shard in shards]


def shard_name(number: int, count: int) -> str:
    """The name of file ``number`` of ``count``, counted from 1; a single one has a name of its own."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def index(places: Mapping[str, str], total: int) -> bytes:
    """The index file that transformers reads: file by tensor, and the ``total`` bytes of all tensors."""
    return _index_text([_index_line(name, file) for name, file in places.items()], total)


def fixed_bytes(shards: int) -> int:
    """Most bytes that ``shards`` files need whatever the tensors: prefixes, metadata, padding, frame of the index.

    ``fixed_bytes(n) + Σ most_bytes + Σ nbytes`` is never less than what up to ``n`` files take.
    """
    return shards * (_least_header() + 7) + (0 if shards == 1 else len(_index_text([], 2**63)))


def least_fixed_bytes() -> int:
    """Least bytes that files need whatever the tensors: one header without padding."""
    return _least_header()


def most_shards(data_bytes: int, limit: int = SHARD_LIMIT) -> int:
    """An upper bound on the number of files for ``data_bytes`` of tensors (two neighbours exceed one file's worth)."""
    return 1 if data_bytes <= limit else 2 * data_bytes // limit + 1


def _least_header() -> int:
    return 8 + len("{}") + len(_METADATA_ENTRY)


def _index_line(name: str, file: str) -> str:
    return f'    {_text(name)}: "{file}"'


def _index_text(lines: Sequence[str], total: int) -> bytes:
    body = ",\n".join(lines)
    return f'{{\n  "metadata": {{"total_size": {total}}},\n  "weight_map": {{\n{body}\n  }}\n}}\n'.encode()


def _text(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
