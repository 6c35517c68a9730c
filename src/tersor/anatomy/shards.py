"""Safetensors files: headers are checked before anything in them is believed, tensors are memory-mapped.

Each tensor is mapped by itself, and its pages go when the tensor goes: a pass over a model larger than memory leaves
nothing resident behind it.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.anatomy.headers import DTYPES, HEADER_LIMIT, INDEX, SINGLE
from tersor.errors import BadInput, CorruptArtifact


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. ``offset``: bytes from the start of ``file``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors that really lie in files for this one: itself."""
        return (self,)


@dataclass(frozen=True)
class ComputedTensor(TensorInfo):
    """A tensor that no file holds as such: ``compute`` makes it of ``parts`` each time that it is asked for.

    ``file`` and ``offset``: where the first part lies. ``compute`` is handed the parts, memory-mapped, in their order.
    """

    parts: tuple[TensorInfo, ...]
    compute: Callable[..., Tensor]

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors that really lie in files for this one: its parts."""
        return self.parts


def read_header(file: Path) -> bytes:
    """The JSON header of a safetensors file, as it stands there. Raises CorruptArtifact when it cannot be there."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(HEADER_LIMIT, size - 8):
            raise CorruptArtifact(
                f"{file} is not a whole safetensors file: its {size} bytes cannot hold the header that its first eight "
                "bytes announce; copy or download it again."
            )
        return stream.read(length)


def read_infos(file: Path) -> dict[str, TensorInfo]:
    """All tensors of one safetensors file, checked against each other and the file's length.

    Raises CorruptArtifact, naming file and tensor, when the header is malformed or the file is truncated.
    """
    raw = read_header(file)
    try:
        header = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptArtifact(f"The header of {file} is not JSON ({error}); copy or download the file again.") from None
    if not isinstance(header, dict):
        raise CorruptArtifact(f"The header of {file} is not a JSON object; copy or download the file again.")
    begin = 8 + len(raw)
    infos = {name: _entry(file, name, entry, begin) for name, entry in header.items() if name != "__metadata__"}
    at = begin
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != at:
            raise CorruptArtifact(
                f"{file} is malformed: tensor {info.name} begins at byte {info.offset - begin} of the data, "
                f"expected {at - begin}."
            )
        at += info.nbytes
    size = file.stat().st_size
    if at != size:
        word = "truncated" if size < at else "too long"
        raise CorruptArtifact(
            f"{file} is {word}: its header promises {at} bytes, it has {size}; copy or download it again."
        )
    return infos


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a model folder, through its index where there is one.

    Raises BadInput when the folder has no safetensors or several without an index; CorruptArtifact when the index is
    malformed, names a file that is not there, or places a tensor in a shard that does not hold it.
    """
    index = folder / INDEX
    if not index.is_file():
        return read_infos(_single(folder))
    placed = _weight_map(index)
    infos: dict[str, TensorInfo] = {}
    for shard in sorted(set(placed.values())):
        if not (folder / shard).is_file():
            raise CorruptArtifact(f"{index} names the shard {shard}, which is not in {folder}; download it again.")
        infos.update({n: info for n, info in read_infos(folder / shard).items() if placed.get(n, shard) == shard})
    for name, shard in placed.items():
        if name not in infos:
            raise CorruptArtifact(
                f"{index} places tensor {name} in {shard}, which does not hold it; download both again."
            )
    return infos


def map_tensor(info: TensorInfo) -> Tensor:
    """The tensor, memory-mapped copy-on-write: nothing is read until it is used, and the file never changes.

    A computed one is made of its parts, and only they are memory-mapped.
    """
    if isinstance(info, ComputedTensor):
        return info.compute(*(map_tensor(part) for part in info.parts))
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    start = info.offset - info.offset % mmap.ALLOCATIONGRANULARITY
    shift = info.offset - start
    try:
        with info.file.open("rb") as stream:
            region = mmap.mmap(stream.fileno(), shift + info.nbytes, access=mmap.ACCESS_COPY, offset=start)
    except (OSError, ValueError) as error:
        raise CorruptArtifact(f"Tensor {info.name} cannot be read from {info.file}: {error}.") from None
    raw = torch.frombuffer(region, dtype=torch.uint8, count=info.nbytes, offset=shift)
    if info.offset % info.dtype.itemsize:
        raw = raw.clone()
    return raw.view(info.dtype).reshape(info.shape)


def samples(file: Path, *, every: int = 1 << 24, length: int = 1 << 16, whole: int = 0) -> Iterator[bytes]:
    """Pieces of ``length`` bytes: at the start of each stretch of ``every`` bytes, and at the end of the file.

    A file of at most ``whole`` bytes is given completely.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= whole:
            yield stream.read()
            return
        for position in [*range(0, size, every), max(0, size - length)]:
            stream.seek(position)
            yield stream.read(length)


def _entry(file: Path, name: str, entry: Any, begin: int) -> TensorInfo:
    """One header entry as a TensorInfo; ``begin``: where the data begin in the file."""
    fields = entry if isinstance(entry, dict) else {}
    shape, span, kind = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets")), fields.get("dtype")
    if shape is None or span is None or len(span) != 2 or not isinstance(kind, str):
        raise CorruptArtifact(f"{file} is malformed: the header entry of tensor {name} lacks dtype, shape or offsets.")
    dtype = DTYPES.get(kind)
    if dtype is None:
        raise BadInput(
            f"Tensor {name} in {file} has type {kind}, which is not a plain number type of this torch version."
        )
    info = TensorInfo(name, dtype, shape, file, begin + span[0])
    if span[1] - span[0] != info.nbytes:
        raise CorruptArtifact(
            f"{file} is malformed: tensor {name} ({kind}, {shape}) needs {info.nbytes} bytes, "
            f"its offsets leave {span[1] - span[0]}."
        )
    return info


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A list of whole numbers, none negative; None for anything else."""
    if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value):
        return tuple(value)
    return None


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        content = json.loads(index.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptArtifact(f"{index} is not JSON ({error}); download it again.") from None
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise CorruptArtifact(f"{index} has no weight_map; download it again.")
    for name, shard in placed.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CorruptArtifact(
                f"{index} places tensor {name} in {shard!r}, which is not the name of a file beside it."
            )
    return placed


def _single(folder: Path) -> Path:
    """The one safetensors file of a folder without an index."""
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise BadInput(f"{folder} holds {len(found)} safetensors files but no {INDEX} that says which belong together.")
    raise BadInput(f"{folder} holds no safetensors file; {_advice(folder)}")


def _advice(folder: Path) -> str:
    pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in folder.glob(kind))
    if not pickles:
        return "expected a transformers model folder with model.safetensors, or a .gguf file."
    return (
        f"its weights are in {pickles[0]}, a pickle, which can run code when opened and is refused: where you trust "
        "it, convert it once with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
    )
