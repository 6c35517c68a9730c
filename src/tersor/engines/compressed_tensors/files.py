"""Safetensors files of a model folder: their exact size known beforehand, and written tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
SHARD = 4_000_000_000
"""Bytes of tensors in one file, unless a single one is larger."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """One tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def line(self, start: int) -> str:
        """Its entry in a header, when it begins ``start`` bytes into the data."""
        fields = {"dtype": _NAMES[self.dtype], "shape": self.shape, "data_offsets": [start, start + self.nbytes]}
        return f"{json.dumps(self.name)}:{json.dumps(fields, separators=(',', ':'))}"


def file_bytes(entries: Sequence[Entry], limit: int = SHARD) -> int:
    """Exact bytes of all files, headers and index included."""
    shards = _shards(entries, limit)
    index = len(_index(shards)) if len(shards) > 1 else 0
    return index + sum(len(_header(shard)) + sum(entry.nbytes for entry in shard) for shard in shards)


def cost(entry: Entry, start: int, *, several: bool) -> int:
    """Bytes that an entry adds to the files when it begins ``start`` bytes into the data: the data itself, its line in
    a header and, where there are ``several`` files, its line in the index."""
    line = f'  {json.dumps(entry.name)}: "{_name(1, 2)}",\n' if several else ""
    return entry.nbytes + len(entry.line(start)) + len(",") + len(line)


def write_files(folder: Path, entries: Sequence[Entry], read: Callable[[Entry], Tensor], limit: int = SHARD) -> None:
    """Write all entries; ``read`` gives each one's value, asked for in the order of the files."""
    shards = _shards(entries, limit)
    for number, shard in enumerate(shards, 1):
        with (folder / _name(number, len(shards))).open("wb") as file:
            file.write(_header(shard))
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


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Entries by file; wide types first in each, which keeps every tensor aligned without holes."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def _header(shard: Sequence[Entry]) -> bytes:
    lines, start = ['"__metadata__":{"format":"pt"}'], 0
    for entry in shard:
        lines.append(entry.line(start))
        start += entry.nbytes
    text = ("{" + ",".join(lines) + "}").encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _index(shards: Sequence[Sequence[Entry]]) -> bytes:
    places = {entry.name: _name(n, len(shards)) for n, shard in enumerate(shards, 1) for entry in shard}
    total = sum(entry.nbytes for shard in shards for entry in shard)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1).encode()
