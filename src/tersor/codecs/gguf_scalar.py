"""llama.cpp's tensor types with a code for each weight, as codecs: what is stored are the bytes of a GGUF tensor.

The format is theirs, bit for bit; codes and scales are chosen by this package's solvers. A weight may be a multiple of
the scale of its group of 16 or 32, which itself is a small integer times one float16 for 256 weights.

>>> GgufScalar("q4_k").bits((64, 512)) // 8      # 64 * 2 blocks of 144 bytes
18432
>>> str(GgufScalar("iq4_xs"))
'iq4_xs'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor import kernels
from tersor.codecs.gguf_layout import KINDS, Kind, read, write
from tersor.codecs.gguf_refit import Refit
from tersor.codecs.gguf_scales import fit
from tersor.codecs.text import Words, reads
from tersor.contracts import Encoded, LeafCodec, Part, ScalarGrid, Shape, Side
from tersor.errors import BadInput, ShapeMismatch

_SWEEPS = 2
_TINY = 2.0**-120


@dataclass(frozen=True)
class GgufScalar(LeafCodec):
    """The GGUF tensor type ``name``, in lower case: ``q4_0``, ``q6_k``, ``iq4_xs``, …

    Side information: ``d (rows, blocks)``; by type ``dmin`` like it, ``step`` and ``low (rows, groups)``.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise BadInput(f"Codec {self.name!r:.80} does not exist: GGUF types are {', '.join(KINDS)}.")

    def __str__(self) -> str:
        return self.name

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def blocks(self, in_features: int) -> int:
        """How many blocks a row has. Raises ShapeMismatch when the block does not divide it."""
        if in_features % self.kind.block:
            small = "; use q4_0, q4_1, q5_0, q5_1, q8_0 or iq4_nl" if in_features % 32 == 0 else ""
            raise ShapeMismatch(
                f"Codec {self} cannot take a layer of {in_features} inputs: its blocks of {self.kind.block} do not "
                f"divide {in_features}{small}."
            )
        return in_features // self.kind.block

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        return (Part("blocks", torch.uint8, (shape[0], self.blocks(shape[1]) * self.kind.nbytes)),)

    def segment(self, in_features: int) -> int:
        return self.kind.block

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        kind = self.kind
        rows, columns = weight.shape
        count = self.blocks(columns)
        shape = (count, kind.groups, kind.group)
        if importance is None:
            share = torch.ones(1, *shape[1:])
        else:
            # Dead columns get a whisper of the mean, so that no sum is empty.
            mass = importance / importance.mean().clamp(min=1e-30) + 1e-6
            share = mass.reshape(1, *shape).expand(rows, -1, -1, -1).reshape(rows * count, *shape[1:])
        fitted = fit(kind, weight.reshape(rows * count, *shape[1:]), share)
        there = {"d": fitted.d}
        if kind.offset:
            there["dmin"] = fitted.dmin
        if kind.steps is not None:
            there["step"] = fitted.step
        if kind.lows is not None:
            there["low"] = fitted.low
        return {name: number.reshape(rows, count * number.shape[1]) for name, number in there.items()}

    def prepare_segment(self, side: Side, weight: Tensor, start: int, importance: Tensor | None = None) -> Side:
        at = start // self.kind.block
        fresh = {name: tensor.clone() for name, tensor in side.items()}
        for name, tensor in self.prepare(weight, importance).items():
            fresh[name][:, at * tensor.shape[1] : (at + 1) * tensor.shape[1]] = tensor
        return fresh

    def _scales(self, side: Side) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of each group, ``(rows, groups)``."""
        kind = self.kind
        scale, offset = side["d"], side["dmin"] if kind.offset else None
        if kind.steps is not None:
            scale = scale.repeat_interleave(kind.groups, 1) * side["step"]
        if kind.lows is not None and offset is not None:
            offset = offset.repeat_interleave(kind.groups, 1) * side["low"]
        return scale, offset

    def grid(self, side: Side, in_features: int) -> ScalarGrid:
        kind = self.kind
        scale, offset = self._scales(side)
        # Others' blocks may have scales of 0, which no rounding can divide by.
        scale = torch.where(scale == 0, _TINY, scale)
        if kind.table is not None:
            return ScalarGrid(scale, None, torch.tensor([kind.table], dtype=torch.float32), kind.levels, kind.group)
        return ScalarGrid(scale, torch.full_like(scale, kind.zero), None, kind.levels, kind.group, offset)

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.nearest(target, self.grid(side, side["d"].shape[1] * self.kind.block), columns)

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        scale, offset = self._scales(encoded.side)
        unit = self._unit(encoded.codes).reshape(*scale.shape, self.kind.group)
        weight = unit * scale[:, :, None]
        if offset is not None:
            weight = weight - offset[:, :, None]
        return weight.reshape(len(scale), in_features)

    def _unit(self, codes: Tensor) -> Tensor:
        """Values before scaling, ``(rows, in)`` float32."""
        if self.kind.table is not None:
            return torch.tensor(self.kind.table, dtype=torch.float32, device=codes.device)[codes.long()]
        return codes.to(torch.float32) - self.kind.zero

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """Integers and floats of all blocks in turn, each at its best under ``tr(E H Eᵀ)``; a row keeps the better."""
        side = {name: tensor.clone() for name, tensor in encoded.side.items()}
        error = weight - self.values(encoded, weight.shape[1])
        pull = error @ gram
        before = (pull * error).double().sum(1)
        work = Refit(self.kind, self._unit(encoded.codes), gram, side)
        for _ in range(_SWEEPS):
            work.sweep(pull)
        error = weight - self.values(Encoded(encoded.codes, side), weight.shape[1])
        after = ((error @ gram) * error).double().sum(1)
        better = (after < before)[:, None]
        return {name: torch.where(better, side[name], old) for name, old in encoded.side.items()}

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        rows, count = shape[0], self.blocks(shape[1])
        numbers = {"codes": encoded.codes, **encoded.side}
        each = {name: tensor.reshape(rows * count, tensor.shape[1] // count) for name, tensor in numbers.items()}
        return {"blocks": write(self.kind, each).reshape(rows, count * self.kind.nbytes)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        rows, count = shape[0], self.blocks(shape[1])
        found = read(self.kind, tensors["blocks"].reshape(rows * count, self.kind.nbytes))
        each = {name: tensor.reshape(rows, count * tensor.shape[1]) for name, tensor in found.items()}
        return Encoded(each.pop("codes"), each)


@reads("|".join(KINDS), form="a GGUF type such as q4_k, q6_k, iq4_xs", heads=tuple(KINDS))
def _read(words: Words) -> GgufScalar:
    if words.options or words.arguments:
        raise words.refuse(f"GGUF types have no options; write {words.head[0]}.")
    return GgufScalar(words.head[0])
