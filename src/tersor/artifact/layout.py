"""Exact file layout of an artifact's weights, known before any work is done.

From names, dtypes and shapes alone: which file each tensor goes to, at which byte, and every byte of every header.
So a budget can be kept to the byte, files can be preallocated, and a tensor can be written the moment it is ready.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tersor.anatomy.headers import (
    INDEX as INDEX_FILE,
)
from tersor.anatomy.headers import (
    SHARD_LIMIT as MAX_SHARD_SIZE,
)
from tersor.anatomy.headers import (
    SINGLE as SINGLE_FILE,
)
from tersor.anatomy.headers import (
    Item,
    fill_shards,
    fixed_bytes,
    header,
    index,
    most_shards,
    shard_name,
)
from tersor.artifact.header import DTYPE_NAMES
from tersor.contracts import Part
from tersor.errors import BadInput

__all__ = [
    "INDEX_FILE",
    "MAX_SHARD_SIZE",
    "SINGLE_FILE",
    "Entry",
    "Layout",
    "Shard",
    "compute_layout",
    "fixed_cost",
    "header_cost",
    "most_shards",
    "tensor_header_cost",
]


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
    groups = fill_shards((_checked(name, *spec) for name, spec in tensors.items()), max_shard_size)
    shards: list[Shard] = []
    entries: dict[str, Entry] = {}
    for number, group in enumerate(groups, 1):
        file = shard_name(number, len(groups))
        shard = Shard(file, header(group), sum(item.nbytes for item in group))
        shards.append(shard)
        offset = len(shard.header)
        for item in group:
            entries[item.name] = Entry(item.name, item.dtype, item.shape, file, offset, item.nbytes)
            offset += item.nbytes
    if len(shards) == 1:
        return Layout(tuple(shards), entries, None)
    places = {name: entries[name].file for name in tensors}
    return Layout(tuple(shards), entries, index(places, sum(entry.nbytes for entry in entries.values())))


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
    return _checked(name, dtype, shape).most_bytes(max_shard_size, sharded=sharded)


def fixed_cost(shards: int = 1) -> int:
    """Most bytes that ``shards`` weight files need whatever the tensors: prefixes, metadata, padding, index frame.

    ``fixed_cost(n) + Σ header_cost + Σ nbytes`` is never less than :attr:`Layout.total_bytes` of up to ``n`` shards.
    """
    return fixed_bytes(shards)


def _checked(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Item:
    item = Item(name, dtype, tuple(int(n) for n in shape))
    if dtype not in DTYPE_NAMES:
        raise BadInput(f"tensor '{name}' has dtype {dtype}, which the artifact cannot hold; convert it to another")
    return item
