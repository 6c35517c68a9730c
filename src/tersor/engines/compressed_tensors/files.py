"""Safetensors files of a model folder: their exact size known beforehand, and written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tersor.anatomy.headers import INDEX, SHARD_LIMIT, fill_shards, header, index, shard_name
from tersor.anatomy.headers import Item as Entry

__all__ = ["SHARD", "Entry", "file_bytes", "stored_bytes", "write_files"]

SHARD = SHARD_LIMIT


def file_bytes(entries: Sequence[Entry], limit: int = SHARD) -> int:
    """Exact bytes of all files, headers and index included."""
    shards = fill_shards(entries, limit)
    frame = len(_index(shards)) if len(shards) > 1 else 0
    return frame + sum(len(header(shard)) + sum(entry.nbytes for entry in shard) for shard in shards)


def write_files(folder: Path, entries: Sequence[Entry], read: Callable[[Entry], Tensor], limit: int = SHARD) -> None:
    """Write all entries; ``read`` gives each one's value, asked for in the order of the files."""
    shards = fill_shards(entries, limit)
    for number, shard in enumerate(shards, 1):
        with (folder / shard_name(number, len(shards))).open("wb") as file:
            file.write(header(shard))
            for entry in shard:
                value = read(entry)
                if value.dtype != entry.dtype or tuple(value.shape) != entry.shape:
                    raise ValueError(f"{entry.name}: expected {entry.dtype} {entry.shape}, found {value.dtype}")
                file.write(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if len(shards) > 1:
        (folder / INDEX).write_bytes(_index(shards))


def stored_bytes(folder: Path) -> int:
    """What the weight files of a folder take."""
    return sum(path.stat().st_size for path in (*folder.glob("*.safetensors"), *folder.glob(INDEX)))


def _index(shards: Sequence[Sequence[Entry]]) -> bytes:
    places = {entry.name: shard_name(n, len(shards)) for n, shard in enumerate(shards, 1) for entry in shard}
    return index(places, sum(entry.nbytes for shard in shards for entry in shard))
