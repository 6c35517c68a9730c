"""What the codecs for llama.cpp's tensor types have in common: blocks of bytes, and scales in two levels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.codecs.gguf_layout import Kind
from tersor.codecs.gguf_refit import Refit
from tersor.codecs.gguf_scales import fit
from tersor.contracts import Encoded, LeafCodec, Part, Shape, Side
from tersor.errors import ShapeMismatch

_SWEEPS = 2


@dataclass(frozen=True)
class GgufBlocks(LeafCodec):
    """The GGUF tensor type ``name``, in lower case.

    Side information: ``d (rows, blocks)``; by type ``dmin`` like it, ``step`` and ``low (rows, groups)``.
    """

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """How the type's blocks are made."""

    @abstractmethod
    def unit(self, codes: Tensor) -> Tensor:
        """Grid points before scaling, ``(rows, in)`` float32, for codes ``(rows, in / span)``."""

    @abstractmethod
    def nearest(self, ratio: Tensor, importance: Tensor) -> Tensor:
        """The nearest grid points to ``ratio (n, groups, group)``, of the same shape; it may be overwritten.

        ``importance``: of errors, the same shape or one that goes with it; all alike where it is one number.
        """

    @abstractmethod
    def read(self, blocks: Tensor) -> dict[str, Tensor]:
        """``codes`` and side information of blocks ``(n, bytes)`` uint8, one block a row."""

    @abstractmethod
    def write(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """The inverse of :meth:`read`."""

    @property
    def ratios(self) -> Sequence[float]:
        """Scales that are tried for a group, relative to its root mean square; none: its range says."""
        return ()

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
            share = torch.ones(1, 1, 1)
        else:
            # Dead columns get a whisper of the mean, so that no sum is empty.
            mass = importance / importance.mean().clamp(min=1e-30) + 1e-6
            share = mass.reshape(1, *shape).expand(rows, -1, -1, -1).reshape(rows * count, *shape[1:])
        fitted = fit(kind, weight.reshape(rows * count, *shape[1:]), share, self.nearest, self.ratios)
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

    def scales(self, side: Side) -> tuple[Tensor, Tensor | None]:
        """Scale and offset of each group, ``(rows, groups)``."""
        kind = self.kind
        scale, offset = side["d"], side["dmin"] if kind.offset else None
        if kind.steps is not None:
            scale = scale.repeat_interleave(kind.groups, 1) * side["step"]
        if kind.lows is not None and offset is not None:
            offset = offset.repeat_interleave(kind.groups, 1) * side["low"]
        return scale, offset

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        scale, offset = self.scales(encoded.side)
        unit = self.unit(encoded.codes).reshape(*scale.shape, self.kind.group)
        weight = unit * scale[:, :, None]
        if offset is not None:
            weight = weight - offset[:, :, None]
        return weight.reshape(len(scale), in_features)

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """Integers and floats of all blocks in turn, each at its best under ``tr(E H Eᵀ)``; a row keeps the better."""
        side = {name: tensor.clone() for name, tensor in encoded.side.items()}
        error = weight - self.values(encoded, weight.shape[1])
        pull = error @ gram
        before = (pull * error).double().sum(1)
        work = Refit(self.kind, self.unit(encoded.codes), gram, side)
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
        return {"blocks": self.write(each).reshape(rows, count * self.kind.nbytes)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        rows, count = shape[0], self.blocks(shape[1])
        found = self.read(tensors["blocks"].reshape(rows * count, self.kind.nbytes))
        each = {name: tensor.reshape(rows, count * tensor.shape[1]) for name, tensor in found.items()}
        return Encoded(each.pop("codes"), each)
