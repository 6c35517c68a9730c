"""An encoded weight as something that can still be moved a little: its float parts, and on even grids its codes.

What :meth:`Tunable.stored` gives always decodes to exactly what the file will hold; in between, values may be off the
grid of storable scales.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from tersor.contracts import Codec, Encoded, LeafCodec, ScalarGrid, Shape

_HALF = 0.4
"""How far from the codec's own code a weight may begin: not so near the next that slopes of few texts would flip it."""
_CLIP = 0.6, 1.5
"""What a group's scale may be multiplied by."""
_CAREFUL = 0.1
"""Size of a step, relative to one of an offset, for a row's gain, and for weights and tables themselves. Ten
times as much fits the sample better in the first case, and other text worse; it only harms in the second."""
_MOSTLY = 0.9
"""The part of a tensor's numbers that is positive at least where they are scales."""


class Tunable(ABC):
    """One weight ``(out, in)``, at first exactly as its codec encoded it."""

    @abstractmethod
    def values(self) -> Tensor:
        """The weight as it stands, ``(out, in)`` float32."""

    @abstractmethod
    def descend(self, slope: Tensor, rate: float) -> None:
        """One step of sign descent along ``slope``, the loss's gradient at :meth:`values`.

        ``rate``: its size, for offsets in steps of the grid and for scales in shares of their own; a tenth of that for
        gains of rows, weights and tables.
        """

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """Tensors as the codec declares them, for the weight as it stands."""


class RoundedGrid(Tunable):
    """A uniform grid: an offset in [−½, ½] for each rounding, a multiplier for each scale (arXiv:2309.05516, §3).

    ``weight (out, in)`` is the original. Codes are ``round(w / s + z + v + o)``: ``v`` is learned from 0, and ``o`` is
    what makes ``v = 0`` give the codec's own codes, which need not be the nearest.
    """

    def __init__(self, codec: LeafCodec, weight: Tensor, encoded: Encoded, grid: ScalarGrid) -> None:
        assert grid.zero is not None
        self._codec, self._side, self._levels = codec, dict(encoded.side), grid.levels
        rows, columns = weight.shape
        self._shape = rows, columns
        self._groups = rows, grid.scale.shape[1], columns // grid.scale.shape[1]
        self._weight = weight.reshape(self._groups)
        self._scale, self._zero = grid.scale[:, :, None], grid.zero[:, :, None]
        codes = encoded.codes.to(torch.float32).reshape(self._groups)
        exact = self._weight / self._scale + self._zero
        self._offset = torch.minimum(torch.maximum(exact, codes - _HALF), codes + _HALF) - exact
        self._learned = torch.zeros_like(exact)
        self._clip = torch.ones_like(self._scale)
        self._rounded: tuple[Tensor, Tensor] | None = None

    def values(self) -> Tensor:
        codes, _ = self._codes()
        return ((codes - self._zero) * (self._scale * self._clip)).reshape(self._shape)

    def descend(self, slope: Tensor, rate: float) -> None:
        codes, inside = self._codes()
        slope = slope.reshape(self._groups)
        # The gradient of rounding is taken to be 1; a clipped weight moves with its scale alone.
        moved = (codes - self._zero) * self._scale - torch.where(inside, self._weight / self._clip, 0.0)
        pull = (slope * moved).sum(2, keepdim=True)
        self._learned -= rate * torch.where(inside, slope.sign(), 0.0)
        self._learned.clamp_(-0.5, 0.5)
        self._clip -= rate * pull.sign()
        self._clip.clamp_(*_CLIP)
        self._rounded = None

    def stored(self) -> dict[str, Tensor]:
        codes, _ = self._codes()
        side = {**self._side, "scale": (self._scale * self._clip)[:, :, 0]}
        return self._codec.pack(Encoded(codes.reshape(self._shape).to(torch.int32), side), self._shape)

    def _codes(self) -> tuple[Tensor, Tensor]:
        """Codes, and where they are not clipped; as found before when nothing has moved since."""
        if self._rounded is None:
            wish = (self._weight / (self._scale * self._clip)).add_(self._zero).add_(self._offset).add_(self._learned)
            codes = wish.round().clamp_(0, self._levels - 1)
            self._rounded = codes, wish.sub_(codes).abs_() <= 0.5
        return self._rounded


class FloatParts(Tunable):
    """The float tensors among the stored ones; everything else stays as it is.

    The gradient goes through the codec's own decoding, whatever it does with them: scales of rows or groups, tables,
    low-rank factors, kept weights. A part of positive numbers moves by shares of itself, one that is mostly positive by
    as large shares of its rows' root mean squares, another by smaller ones.
    """

    def __init__(self, codec: Codec, shape: Shape, tensors: Mapping[str, Tensor]) -> None:
        self._codec, self._shape, self._tensors = codec, shape, dict(tensors)
        self._parts = {name: one.to(torch.float32) for name, one in tensors.items() if one.is_floating_point()}
        self._units = {name: _unit(part) for name, part in self._parts.items()}
        self._graph: tuple[Tensor, dict[str, Tensor]] | None = None

    def values(self) -> Tensor:
        with torch.enable_grad():
            leaves = {name: part.clone().requires_grad_(True) for name, part in self._parts.items()}
            found = self._codec.decode({**self._tensors, **leaves}, self._shape)
        self._graph = found, leaves
        return found.detach()

    def descend(self, slope: Tensor, rate: float) -> None:
        if self._graph is None:
            self.values()
        assert self._graph is not None
        (found, leaves), self._graph = self._graph, None
        slopes = torch.autograd.grad(found, list(leaves.values()), slope)
        for name, one in zip(leaves, slopes, strict=True):
            self._parts[name] = self._parts[name] - rate * one.sign() * self._units[name]

    def stored(self) -> dict[str, Tensor]:
        return {
            name: self._parts[name].to(one.dtype) if name in self._parts else one for name, one in self._tensors.items()
        }


class RowGains(Tunable):
    """A codec whose only float part is one scale a row, in proportion to which the row is decoded.

    What :class:`FloatParts` does, without decoding anything again: rotated trellises are slow to decode.
    """

    def __init__(self, values: Tensor, name: str, tensors: Mapping[str, Tensor]) -> None:
        self._values, self._name, self._tensors = values, name, dict(tensors)
        self._gain = torch.ones(len(values), 1)

    @staticmethod
    def fits(codec: Codec, values: Tensor, name: str, tensors: Mapping[str, Tensor]) -> bool:
        """Whether part ``name`` is such a scale: whether doubling it in some rows doubles these rows, to the bit."""
        part = tensors[name]
        if part.ndim == 0 or part.shape[0] != len(values) or part.numel() != len(values):
            return False
        twice = 1.0 + (torch.arange(len(values)) % 3 == 1).to(torch.float32)[:, None]
        tried = part.to(torch.float32) * twice.reshape(part.shape)
        shape = (values.shape[0], values.shape[1])
        return torch.equal(codec.decode({**tensors, name: tried}, shape), values * twice)

    def values(self) -> Tensor:
        return self._values * self._gain

    def descend(self, slope: Tensor, rate: float) -> None:
        self._gain = self._gain - rate * _CAREFUL * (slope * self._values).sum(1, keepdim=True).sign()

    def stored(self) -> dict[str, Tensor]:
        part = self._tensors[self._name]
        moved = part.to(torch.float32) * self._gain.reshape(part.shape)
        return {**self._tensors, self._name: moved.to(part.dtype)}


def _unit(part: Tensor) -> Tensor:
    if bool((part > 0).all()):
        return part.clone()
    size = part.square().mean(-1, keepdim=True).sqrt().expand_as(part)
    # Fitted scales come out negative here and there; weights and tables are so half of the time.
    return size if float((part > 0).float().mean()) > _MOSTLY else _CAREFUL * size


def as_tunable(codec: Codec, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tunable | None:
    """What can be tuned of ``weight (out, in)`` float32, which ``codec`` encoded as ``tensors``; None for nothing."""
    shape = (weight.shape[0], weight.shape[1])
    if isinstance(codec, LeafCodec):
        encoded = codec.unpack(tensors, shape)
        grid = codec.grid(encoded.side, shape[1])
        if grid is not None and _even(grid, encoded, tensors):
            return RoundedGrid(codec, weight, encoded, grid)
    floats = [name for name, one in tensors.items() if one.is_floating_point()]
    if not floats:
        return None
    if len(floats) == 1:
        values = codec.decode(tensors, shape)
        if RowGains.fits(codec, values, floats[0], tensors):
            return RowGains(values, floats[0], tensors)
    return FloatParts(codec, shape, tensors)


def _even(grid: ScalarGrid, encoded: Encoded, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a grid is uniform and its scales are stored as floats of their own, which can take any multiplier."""
    scale, stored = encoded.side.get("scale"), tensors.get("scale")
    if grid.zero is None or grid.offset is not None or scale is None or stored is None:
        return False
    return stored.is_floating_point() and torch.equal(scale, grid.scale)


__all__ = ["FloatParts", "RoundedGrid", "RowGains", "Tunable", "as_tunable"]
