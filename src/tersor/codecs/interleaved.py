"""The values of two scalar codecs side by side in every row, weight by weight as a fixed mask says.

It lets solvers work on whole rows of weights in two formats. It exists while a layer is encoded and has no text: the
codec around it stores the mask (:mod:`tersor.codecs.by_weight`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tersor.codecs.grouped import GroupedScalar
from tersor.codecs.inner import under
from tersor.codecs.lookup import LookupTable
from tersor.codecs.refit import least_squares, quadratic
from tersor.contracts import Codec, Encoded, LeafCodec, Part, Shape, Side

PREFIXES = ("a_", "b_")
"""Of the parts and the side information of the salient weights, and of all others."""


@dataclass(frozen=True)
class Interleaved(LeafCodec):
    """``salient`` where ``mask (rows, in)`` bool is set, ``rest`` elsewhere; each sees its weights side by side.

    ``count`` bits are set in every row. Each codec has one set of side information a row, so that none of its columns
    differs from another. Codes are those of the codec that a weight is in.
    """

    salient: LeafCodec
    rest: LeafCodec
    count: int
    mask: Tensor = field(compare=False, repr=False)

    @staticmethod
    def fits(inner: Codec, width: int) -> bool:
        """Whether ``inner``, for rows of ``width`` weights, is such a codec: scalars of one group, or of one table."""
        return isinstance(inner, GroupedScalar | LookupTable) and inner.segment(width) == width

    def tile(self, rows: int) -> int:
        return max(rows, 1)  # the mask is that of all these rows

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        widths = (self.count, shape[1] - self.count)
        return tuple(
            Part(prefix + part.name, part.dtype, part.shape, part.shared)
            for prefix, inner, width in zip(PREFIXES, (self.salient, self.rest), widths, strict=True)
            for part in inner.parts((shape[0], width))
        )

    def _sets(self) -> Iterator[tuple[str, LeafCodec, Tensor, int]]:
        """Prefix, codec, mask ``(rows, in)`` and number of weights a row, of the salient weights and of the others."""
        yield PREFIXES[0], self.salient, self.mask, self.count
        yield PREFIXES[1], self.rest, ~self.mask, self.mask.shape[1] - self.count

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        """Each codec's own choice, all its weights alike, then the best scales for what that rounds to.

        Which input a weight belongs to differs from row to row, so codecs that see them side by side cannot know how
        much it counts; least squares in the weights' places can.
        """
        side = {
            prefix + name: tensor
            for prefix, inner, own, width in self._sets()
            for name, tensor in inner.prepare(weight[own].reshape(len(weight), width)).items()
        }
        if importance is None:
            return side
        codes, _ = self.round(weight, side, torch.arange(weight.shape[1]))
        return self._rescaled(weight, Encoded(codes, side), lambda rows: rows * importance)

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        any_column = torch.zeros_like(columns)
        (codes, values), (others, rest) = (
            inner.round(target, under(side, prefix), any_column)
            for prefix, inner in zip(PREFIXES, (self.salient, self.rest), strict=True)
        )
        mask = self.mask[:, columns]
        return torch.where(mask, codes, others), torch.where(mask, values, rest)

    def _compact(self, encoded: Encoded) -> Iterator[tuple[str, LeafCodec, Tensor, Encoded]]:
        """Prefix, codec, mask and what is encoded of each set, its codes side by side."""
        for prefix, inner, own, width in self._sets():
            codes = encoded.codes[own].reshape(len(encoded.codes), width)
            yield prefix, inner, own, Encoded(codes, under(encoded.side, prefix))

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        result = torch.empty(encoded.codes.shape, dtype=torch.float32)
        for _, inner, own, compact in self._compact(encoded):
            result[own] = inner.values(compact, compact.codes.shape[1]).flatten()
        return result

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """Exact least squares for all scales of a row, both codecs' together, under ``tr(E H Eᵀ)``, codes fixed.

        A row keeps its old scales where the stored new ones are not better. Tables stay as they are.
        """
        return self._rescaled(weight, encoded, lambda rows: rows @ gram)

    def _rescaled(self, weight: Tensor, encoded: Encoded, times: Callable[[Tensor], Tensor]) -> Side:
        """:meth:`refit`; ``times`` is the product of rows ``(rows, in)`` and the Gram matrix."""
        target, units, scaled = weight, [], []
        for prefix, inner, own, compact in self._compact(encoded):
            empty = torch.zeros(weight.shape)
            if not isinstance(inner, GroupedScalar):
                values = inner.values(compact, compact.codes.shape[1])
                target = target - empty.masked_scatter(own, values)
                continue
            scaled.append((prefix, inner))
            scale = compact.side["scale"]
            # What one of the scales is multiplied by: the values with it at 1 and the others at 0.
            for one in torch.eye(scale.shape[1]):
                side = {**compact.side, "scale": one.expand_as(scale)}
                unit = inner.values(Encoded(compact.codes, side), compact.codes.shape[1])
                units.append(empty.masked_scatter(own, unit))
        side = dict(encoded.side)
        if not units:
            return side
        spread = [times(unit) for unit in units]
        normal = torch.stack([torch.stack([(s * unit).sum(1) for unit in units], 1) for s in spread], 1)
        right = torch.stack([(s * target).sum(1) for s in spread], 1)
        old = torch.cat([side[prefix + "scale"] for prefix, _ in scaled], 1)
        widths = [side[prefix + "scale"].shape[1] for prefix, _ in scaled]
        stored = {}
        for (prefix, inner), wanted in zip(scaled, least_squares(normal, right).split(widths, 1), strict=True):  # type: ignore[no-untyped-call]
            kept = torch.where(inner.usable(wanted), wanted, side[prefix + "scale"])
            stored.update({prefix + name: tensor for name, tensor in inner.storable(kept).items()})
        now = torch.cat([stored[prefix + "scale"] for prefix, _ in scaled], 1)
        better = quadratic(normal, right, now) < quadratic(normal, right, old)
        return {name: torch.where(better[:, None], stored.get(name, kept), kept) for name, kept in side.items()}

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        return {
            prefix + name: tensor
            for prefix, inner, _, compact in self._compact(encoded)
            for name, tensor in inner.pack(compact, (shape[0], compact.codes.shape[1])).items()
        }

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        codes = torch.empty(shape, dtype=torch.int32)
        side = {}
        for prefix, inner, own, width in self._sets():
            compact = inner.unpack(under(tensors, prefix), (shape[0], width))
            codes[own] = compact.codes.flatten()
            side.update({prefix + name: tensor for name, tensor in compact.side.items()})
        return Encoded(codes, side)
