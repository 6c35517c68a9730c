"""What all packed layouts need: the tensors of one module, checked, and codes out of their words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.anatomy.shards import ComputedTensor, TensorInfo
from tersor.errors import CorruptArtifact

_STRETCH = 1 << 22
"""Weights that are dequantized together; they decide how much memory is needed beside the result."""


@dataclass(frozen=True)
class Packed:
    """One weight that a checkpoint holds packed. ``scheme``: how, for a person ("4-bit g128")."""

    tensor: ComputedTensor
    scheme: str


@dataclass(frozen=True)
class Module:
    """The tensors of one module, by the last part of their names. ``path``: its name in the model."""

    path: str
    tensors: Mapping[str, TensorInfo]

    def need(self, leaf: str, dtypes: tuple[torch.dtype, ...]) -> TensorInfo:
        """The tensor ``<path>.<leaf>``. Raises CorruptArtifact when it is missing, empty or of another type."""
        info = self.tensors.get(leaf)
        if info is None:
            have = next(iter(self.tensors.values()))
            raise CorruptArtifact(
                f"The packed module {self.path} has no tensor {self.path}.{leaf} beside {have.name} in {have.file}; "
                "the checkpoint is incomplete: download it again."
            )
        if info.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CorruptArtifact(
                f"Tensor {info.name} in {info.file} has the type {str(info.dtype).removeprefix('torch.')}, expected "
                f"{wanted}."
            )
        if 0 in info.shape:
            raise CorruptArtifact(f"Tensor {info.name} in {info.file} is empty: its shape is {info.shape}.")
        return info

    def check(self, info: TensorInfo, *expected: tuple[int, ...], why: str) -> None:
        """Raise CorruptArtifact, naming both, when ``info`` has none of the ``expected`` shapes."""
        if info.shape not in expected:
            shapes = " or ".join(str(shape) for shape in expected)
            raise CorruptArtifact(
                f"Tensor {info.name} in {info.file} has the shape {info.shape}, expected {shapes} ({why})."
            )


def check_groups(index: TensorInfo, low: int, high: int, groups: int) -> None:
    """Raise CorruptArtifact when the least or greatest entry of ``index`` is no group."""
    if low < 0 or high >= groups:
        raise CorruptArtifact(
            f"Tensor {index.name} in {index.file} puts inputs into the groups {low} to {high}, but there are only "
            f"{groups} groups (0 to {groups - 1})."
        )


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
POWERS = tuple(getattr(torch, name) for name in ("float8_e8m0fnu",) if hasattr(torch, name))
"""Types that hold powers of two alone, in versions of torch that have them."""


def modules_with(tensors: Mapping[str, TensorInfo], leaf: str) -> Iterator[Module]:
    """The modules that have a tensor called ``leaf``, with all their tensors."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        path, _, last = name.rpartition(".")
        found.setdefault(path, {})[last] = info
    for path, members in found.items():
        if leaf in members:
            yield Module(path, members)


def computed(
    module: Module,
    parts: tuple[TensorInfo, ...],
    shape: tuple[int, int],
    dtype: torch.dtype,
    compute: Callable[..., Tensor],
) -> ComputedTensor:
    """The weight ``(out, in)`` of ``module`` as a tensor that ``compute`` makes of ``parts``."""
    first = parts[0]
    name = f"{module.path}.weight" if module.path else "weight"
    return ComputedTensor(name, dtype, shape, first.file, first.offset, parts, compute)


def weight_type(scales: torch.dtype, settings: Mapping[str, Any]) -> torch.dtype:
    """The type that dequantized weights get: that of the scales, as in the layouts' own programs.

    Scales of 32 bits would make weights of 32 bits, which no engine computes with: then the type of the model. Scales
    that are powers of two and nothing else (E8M0) are no type for weights either: then that of the model, or bfloat16.
    """
    declared = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(str(settings.get("dtype")))
    if scales in POWERS:
        return declared or torch.bfloat16
    return declared if scales == torch.float32 and declared is not None else scales


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes out of 32-bit words that hold them back to back, lowest bits first: ``(..., n)`` int32 to ``(..., count)``
    uint8. A code may cross from one word into the next.

    >>> unpack_words(torch.tensor([[0b_011_010_001]], dtype=torch.int32), 3, 3).tolist()
    [[1, 2, 3]]
    """
    raw = words.contiguous().view(torch.uint8)
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((raw.unsqueeze(-1) >> shifts) & mask).flatten(-2)[..., :count]
    # Eight codes fill as many bytes as a code has bits.
    raw = torch.nn.functional.pad(raw, (0, -raw.shape[-1] % bits)).to(torch.int64)
    raw = raw.reshape(*raw.shape[:-1], -1, bits)
    together = (raw << torch.arange(0, 8 * bits, 8)).sum(-1, keepdim=True)
    return ((together >> torch.arange(0, 8 * bits, bits)) & mask).to(torch.uint8).flatten(-2)[..., :count]


def words_for(count: int, bits: int) -> int:
    """32-bit words that ``count`` codes fill."""
    return -(-count * bits // 32)


def stretches(rows: int, columns: int) -> Iterator[slice]:
    """Stretches of ``rows`` rows of ``columns`` weights that are small enough to be dequantized at once."""
    step = max(1, _STRETCH // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def group_text(group: int, columns: int) -> str:
    """How many weights share a scale, for a person."""
    return "per row" if group >= columns else f"g{group}"
