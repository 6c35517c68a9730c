"""What vector codecs with one scale per row have in common: a code stands for ``span`` columns at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.codecs.packing import packed_width
from tersor.codecs.scales import storable
from tersor.codecs.wide import pack_wide, unpack_wide
from tersor.contracts import Encoded, LeafCodec, Part, Shape, Side
from tersor.errors import ShapeMismatch

_CHUNK = 1 << 14
"""Vectors compared with a codebook at one time."""
_SEARCHED = 256
"""Vectors of a row that the search for its scale looks at."""


@dataclass(frozen=True)
class RowScaled(LeafCodec):
    """A codec whose value is ``unit(code) · scale[row]``, with a float16 scale; subclasses say what ``unit`` is."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits that the code of one span takes in the file."""

    @property
    def ratios(self) -> tuple[float, ...]:
        """Scales that are tried for a row, relative to the root mean square of its weights."""
        return (1.0,)

    @abstractmethod
    def unit(self, codes: Tensor) -> Tensor:
        """Vectors ``(…, span)`` float32 for codes of any shape."""

    @abstractmethod
    def closest(self, target: Tensor) -> Tensor:
        """Codes ``(n,)`` of the vectors nearest to ``target (n, span)``, in units of the scale."""

    def spans(self, in_features: int) -> int:
        """How many spans a row has. Raises ShapeMismatch when the span does not divide it."""
        if in_features % self.span:
            raise ShapeMismatch(
                f"Codec {self} cannot take a layer of {in_features} inputs: its vectors of {self.span} columns do not "
                f"divide {in_features}."
            )
        return in_features // self.span

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        width = packed_width(self.spans(columns), self.code_bits)
        return (Part("codes", torch.uint8, (rows, width)), Part("scale", torch.float16, (rows, 1)))

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        rows, columns = weight.shape
        count = self.spans(columns)
        energy = torch.ones(columns) if importance is None else importance / importance.mean().clamp(min=1e-30)
        root = weight.square().mean(1, keepdim=True).sqrt()
        if len(self.ratios) == 1:
            return storable(root * self.ratios[0], "fp16")
        # Where the search would cost more than the rounding itself, it looks at the spans that matter most.
        blocks = weight.reshape(rows, count, self.span)
        mass = energy.reshape(count, self.span)
        if count > _SEARCHED:
            keep = mass.sum(1).sort(descending=True, stable=True).indices[:_SEARCHED].sort().values
            blocks, mass = blocks[:, keep], mass[keep]
        best = torch.full((rows, 1), torch.inf)
        scale = torch.zeros(rows, 1)
        for ratio in self.ratios:
            tried = storable(root * ratio, "fp16")["scale"]
            values = self.unit(self._codes(blocks.flatten(1), tried)) * tried[:, :, None]
            loss = ((blocks - values).square() * mass).sum((1, 2))[:, None]
            scale = torch.where(loss < best, tried, scale)
            best = torch.minimum(best, loss)
        return {"scale": scale}

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        codes = self._codes(target, side["scale"])
        return codes, self.unit(codes).flatten(1) * side["scale"]

    def closest_under(self, target: Tensor, root: Tensor) -> Tensor:
        """:meth:`closest` by ``|(t − v) root|`` with ``root (span, span)``. Default: by plain distance."""
        return self.closest(target)

    def round_span(self, target: Tensor, side: Side, columns: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.closest_under(target / side["scale"], root)[:, None]
        return codes, self.unit(codes).flatten(1) * side["scale"]

    def _codes(self, target: Tensor, scale: Tensor) -> Tensor:
        vectors = (target / scale).reshape(-1, self.span)
        pieces = [self.closest(piece) for piece in vectors.split(_CHUNK)]  # type: ignore[no-untyped-call]
        return torch.cat(pieces).reshape(len(target), target.shape[1] // self.span)

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        return self.unit(encoded.codes).flatten(1) * encoded.side["scale"]

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """The least-squares scale of each row under ``tr(E H Eᵀ)``: ``q H w / q H q``; kept where it is better."""
        unit = self.unit(encoded.codes).flatten(1)
        pulled = unit @ gram
        normal = (pulled * unit).sum(1, keepdim=True)
        right = (pulled * weight).sum(1, keepdim=True)
        old = encoded.side["scale"]
        wanted = right / normal.clamp(min=1e-30)
        new = storable(torch.where(wanted > 0, wanted, old), "fp16")["scale"]
        better = normal * new * new - 2 * right * new < normal * old * old - 2 * right * old
        return {"scale": torch.where(better, new, old)}

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        self.parts(shape)
        codes = pack_wide(encoded.codes, self.code_bits)
        return {"codes": codes, "scale": encoded.side["scale"].to(torch.float16)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        codes = unpack_wide(tensors["codes"], self.code_bits, self.spans(shape[1])).to(self.code_dtype)
        return Encoded(codes, {"scale": tensors["scale"].to(torch.float32)})
