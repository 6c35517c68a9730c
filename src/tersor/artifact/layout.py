"""Exact file layout of an artifact's weights, known before any work is done.

From names, dtypes and shapes alone: which file each tensor goes to, at which byte, and every byte of every header.
So a budget can be kept to the byte, files can be preallocated, and a tensor can be written the moment it is ready.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tersor.artifact.header import DTYPE_NAMES, HEADER_LIMIT, METADATA, tensor_bytes
from tersor.contracts import Part
from tersor.errors import BadInput

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_SIZE = 4_000_000_000
"""Bytes of tensor data in one file; below the 4 GiB limit of FAT and of 32-bit offsets."""

_METADATA_ENTRY = f'"__metadata__":{json.dumps(METADATA, separators=(",", ":"))}'
_SHARD_NAME_LENGTH = len("model-00001-of-00002.safetensors")


@dataclass(frozen=True)
class Entry:
    """One tensor: ``offset`` counts bytes from the beginning of ``file``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: ``header`` is its first bytes, length prefix and padding included."""

    name: str
    header: bytes
    data_bytes: int

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.data_bytes


@dataclass(frozen=True)
class Layout:
    """All weight files of an artifact. ``index``: content of the index file, or None when there is one shard only."""

    shards: tuple[Shard, ...]
    entries: Mapping[str, Entry]
    index: bytes | None

    @property
    def total_bytes(self) -> int:
        """Exact size of all weight files: headers, padding and (when sharded) the index file included."""
        return sum(shard.nbytes for shard in self.shards) + len(self.index or b"")

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files, the index included."""
        return tuple(shard.name for shard in self.shards) + ((INDEX_FILE,) if self.index is not None else ())

    def digest(self) -> str:
        """SHA-256 over file names, headers and index: equal exactly when every byte position is equal."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(shard.name.encode() + b"\0" + shard.header)
        digest.update(self.index or b"")
        return digest.hexdigest()


def compute_layout(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, max_shard_size: int = MAX_SHARD_SIZE
) -> Layout:
    """Lay out named tensors, in the given order, over one or more safetensors files.

    A file takes tensors until the next one would bring it over ``max_shard_size`` bytes of data; a tensor is never
    split, so a larger one has a file to itself. Inside a file wide dtypes come first, which keeps each tensor aligned
    to its element size without the holes that safetensors forbids; equal widths keep the given order.

    Raises :class:`~tersor.errors.BadInput` for a name or dtype that a safetensors file cannot hold.

    >>> layout = compute_layout({"a.codes": (torch.uint8, (2, 3)), "a.scale": (torch.float16, (2, 1))})
    >>> [(entry.name, entry.offset) for entry in layout.entries.values()]
    [('a.scale', 168), ('a.codes', 172)]
    >>> layout.total_bytes
    178
    """
    if max_shard_size < 1:
        raise BadInput(f"max_shard_size must be at least 1 byte, found {max_shard_size}")
    groups: list[list[_Item]] = [[]]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        item = _checked(name, dtype, shape)
        if groups[-1] and filled + item.nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += item.nbytes
    names = [SINGLE_FILE] if len(groups) == 1 else [shard_name(i, len(groups)) for i in range(1, len(groups) + 1)]
    shards: list[Shard] = []
    entries: dict[str, Entry] = {}
    for file, group in zip(names, groups, strict=True):
        group.sort(key=lambda item: -item.dtype.itemsize)
        shard = Shard(file, _header(group), sum(item.nbytes for item in group))
        shards.append(shard)
        offset = len(shard.header)
        for item in group:
            entries[item.name] = Entry(item.name, item.dtype, item.shape, file, offset, item.nbytes)
            offset += item.nbytes
    return Layout(tuple(shards), entries, None if len(shards) == 1 else _index(tensors, entries))


def shard_name(number: int, count: int) -> str:
    """``number`` counts from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def header_cost(
    layer: str, parts: Iterable[Part], *, max_shard_size: int = MAX_SHARD_SIZE, sharded: bool = False
) -> int:
    """Most bytes that the tensors ``<layer>.<part>`` can add to headers (and, if ``sharded``, to the index).

    An upper bound, because the digits of an offset depend on what stands before: it is over by less than two digits
    times the length of ``max_shard_size`` a tensor, so pass the budget there when it is smaller than a shard.
    For a kept tensor give its full name and :func:`tensor_header_cost`.

    >>> header_cost("a", [Part("codes", torch.uint8, (2, 3))], max_shard_size=999)
    64
    """
    return sum(
        tensor_header_cost(
            f"{layer}.{part.name}", part.dtype, part.shape, max_shard_size=max_shard_size, sharded=sharded
        )
        for part in parts
    )


def tensor_header_cost(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    sharded: bool = False,
) -> int:
    """:func:`header_cost` of one tensor with full name ``name``."""
    item = _checked(name, dtype, shape)
    # Data offsets in a file reach max_shard_size, or the size of a tensor that has the file to itself.
    largest = max(max_shard_size, item.nbytes)
    cost = 1 + len(_header_entry(item, largest, largest).encode())
    if sharded:
        cost += len(_index_line(name, "").encode()) + _SHARD_NAME_LENGTH + 2
    return cost


def fixed_cost(shards: int = 1) -> int:
    """Most bytes that ``shards`` weight files need whatever the tensors: prefixes, metadata, padding, index frame.

    ``fixed_cost(n) + Σ header_cost + Σ nbytes`` is never less than :attr:`Layout.total_bytes` of up to ``n`` shards.
    """
    per_shard = 8 + len("{}") + len(_METADATA_ENTRY) + 7
    frame = 0 if shards == 1 else len(_index_text([], 2**63))
    return shards * per_shard + frame


def most_shards(data_bytes: int, max_shard_size: int = MAX_SHARD_SIZE) -> int:
    """An upper bound on the number of files for ``data_bytes`` of tensors (two neighbours exceed one file's worth)."""
    return 1 if data_bytes <= max_shard_size else 2 * data_bytes // max_shard_size + 1


@dataclass(frozen=True)
class _Item:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def _checked(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> _Item:
    if dtype not in DTYPE_NAMES:
        raise BadInput(
            f"tensor '{name}' has dtype {dtype}, which the artifact cannot hold; "
            f"convert it to one of {', '.join(str(known) for known in DTYPE_NAMES)}"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"tensor name {name!r} is not valid Unicode text; rename it") from error
    if name == "__metadata__":
        raise BadInput("a tensor cannot be called '__metadata__' in a safetensors file; rename it")
    return _Item(name, dtype, tuple(int(n) for n in shape), tensor_bytes(dtype, shape))


def _header_entry(item: _Item, start: int, end: int) -> str:
    body = {"dtype": DTYPE_NAMES[item.dtype], "shape": list(item.shape), "data_offsets": [start, end]}
    return _text(item.name) + ":" + json.dumps(body, separators=(",", ":"))


def _header(items: list[_Item]) -> bytes:
    pieces = [_METADATA_ENTRY]
    position = 0
    for item in items:
        pieces.append(_header_entry(item, position, position + item.nbytes))
        position += item.nbytes
    text = ("{" + ",".join(pieces) + "}").encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise BadInput(
            f"{len(items)} tensors need a header of {len(text)} bytes, and safetensors allows {HEADER_LIMIT}; "
            "use a smaller max_shard_size"
        )
    return struct.pack("<Q", len(text)) + text


def _index(tensors: Iterable[str], entries: Mapping[str, Entry]) -> bytes:
    """The index file that transformers reads: tensor name to file name, in the order given."""
    lines = [_index_line(name, entries[name].file) for name in tensors]
    return _index_text(lines, sum(entry.nbytes for entry in entries.values()))


def _index_line(name: str, file: str) -> str:
    return f'    {_text(name)}: "{file}"'


def _index_text(lines: list[str], total: int) -> bytes:
    body = ",\n".join(lines)
    return f'{{\n  "metadata": {{"total_size": {total}}},\n  "weight_map": {{\n{body}\n  }}\n}}\n'.encode()


def _text(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
