"""What scalar codecs with one scale per group of input columns have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor import kernels
from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.refit import least_squares, quadratic
from tersor.codecs.scales import ScaleFormat, pack_scales, scale_parts, storable, unpack_scales
from tersor.contracts import Codec, Encoded, LeafCodec, Part, ScalarGrid, Shape, Side
from tersor.errors import ShapeMismatch


def groups_of(codec: Codec, group: int | None, in_features: int) -> int:
    """How many groups of ``group`` columns (None: all) a row has. Raises ShapeMismatch when it does not divide them."""
    if group is None:
        return 1
    if in_features % group:
        fits = [g for g in (16, 24, 32, 48, 64, 96, 128, 192, 256) if in_features % g == 0]
        ways = ", ".join(f"g{g}" for g in fits) if fits else "row"
        raise ShapeMismatch(
            f"Codec {codec} cannot take a layer of {in_features} inputs: its group of {group} does not divide "
            f"{in_features}; use {ways}."
        )
    return in_features // group


@dataclass(frozen=True)
class GroupedScalar(LeafCodec):
    """A scalar codec: ``bits`` a weight, and a scale for every ``group`` columns of a row (None: the whole row)."""

    bits_per_code: int
    group: int | None = 64
    scales: ScaleFormat = "fp16"

    def groups(self, in_features: int) -> int:
        """How many groups a row has. Raises ShapeMismatch when the group does not divide it."""
        return groups_of(self, self.group, in_features)

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        groups = self.groups(columns)
        codes = Part("codes", torch.uint8, (rows, packed_width(columns, self.bits_per_code)))
        return (codes, *scale_parts(rows, groups, self.scales))

    def segment(self, in_features: int) -> int:
        return self.group or in_features

    @abstractmethod
    def fit(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Unrounded side information ``(n,)`` for independent groups ``weight (n, group)``."""

    @abstractmethod
    def grid(self, side: Side, in_features: int) -> ScalarGrid: ...

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        rows, columns = weight.shape
        groups = self.groups(columns)
        if importance is None:
            spread = torch.ones(1, columns // groups)
        else:
            spread = importance.reshape(1, groups, -1).expand(rows, -1, -1).reshape(rows * groups, -1)
        fitted = self.fit(weight.reshape(rows * groups, -1), spread)
        side = {name: value.reshape(rows, groups) for name, value in fitted.items()}
        return {**side, **self.storable(side["scale"])}

    def prepare_segment(self, side: Side, weight: Tensor, start: int, importance: Tensor | None = None) -> Side:
        at = start // weight.shape[1]
        spread = torch.ones(1, weight.shape[1]) if importance is None else importance[None, :]
        fitted = self.fit(weight, spread)
        kept = self.storable(fitted["scale"][:, None], side.get("super"))
        fresh = {name: tensor.clone() for name, tensor in side.items() if name != "super"}
        for name, tensor in fresh.items():
            tensor[:, at] = kept["scale"][:, 0] if name == "scale" else fitted[name]
        return {**fresh, **({"super": side["super"]} if "super" in side else {})}

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        groups = side["scale"].shape[1]
        in_features = groups * self.group if self.group else int(columns.max()) + 1
        return kernels.nearest(target, self.grid(side, in_features), columns)

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        grid = self.grid(encoded.side, in_features)
        rows, groups = encoded.codes.shape[0], grid.scale.shape[1]
        codes = encoded.codes.reshape(rows, groups, in_features // groups)  # not -1: there may be no rows
        if grid.zero is not None:
            weight = (codes.to(torch.float32) - grid.zero[:, :, None]) * grid.scale[:, :, None]
        else:
            assert grid.table is not None
            weight = grid.table[0][codes.long()] * grid.scale[:, :, None]
        return weight.reshape(rows, in_features)

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """Exact least squares for the scales of each row, under ``tr(E H Eᵀ)``, codes fixed (arXiv:2404.12759, §3.3).

        With ``q_g`` the row's unscaled values in group ``g``, solves ``A s = b``, ``A_gh = q_gᵀ H q_h``,
        ``b_g = q_gᵀ H w``. A row keeps its old scales where the stored new ones are not better.
        """
        return self.rescaled(weight @ gram, encoded, gram)

    def rescaled(self, product: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """What :meth:`refit` does, by ``product (rows, in)``, that of weight and Gram matrix."""
        rows, columns = product.shape
        side = dict(encoded.side)
        groups = side["scale"].shape[1]
        unit = self.values(Encoded(encoded.codes, {**side, "scale": torch.ones_like(side["scale"])}), columns)
        blocks = unit.reshape(rows, groups, -1)
        width = columns // groups
        normal = torch.empty(rows, groups, groups)
        for g in range(groups):
            spread = blocks[:, g] @ gram[g * width : (g + 1) * width, g * width :]
            row = (spread.reshape(rows, groups - g, width) * blocks[:, g:]).sum(2)
            normal[:, g, g:] = row
            normal[:, g:, g] = row
        right = (product.reshape(rows, groups, width) * blocks).sum(2)
        wanted = least_squares(normal, right)
        stored = self.storable(torch.where(self.usable(wanted), wanted, side["scale"]))
        better = quadratic(normal, right, stored["scale"]) < quadratic(normal, right, side["scale"])
        return {name: torch.where(better[:, None], stored.get(name, old), old) for name, old in side.items()}

    def storable(self, scale: Tensor, top: Tensor | None = None) -> dict[str, Tensor]:
        """The nearest scales that can be stored; see :func:`tersor.codecs.scales.storable`."""
        return storable(scale, self.scales, top)

    def usable(self, scale: Tensor) -> Tensor:
        """Which numbers can be scales at all."""
        return torch.isfinite(scale) & (scale > 0)

    def to_stored(self, codes: Tensor) -> Tensor:
        """Positions in the sorted list to the codes in the file; the same unless a codec says otherwise."""
        return codes

    def from_stored(self, codes: Tensor) -> Tensor:
        """The inverse of :meth:`to_stored`."""
        return codes

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        self.parts(shape)
        codes = pack(self.to_stored(encoded.codes), self.bits_per_code)
        return {"codes": codes, **pack_scales(encoded.side, self.scales)}

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        codes = self.from_stored(unpack(tensors["codes"], self.bits_per_code, shape[1]))
        return Encoded(codes, unpack_scales(tensors, self.scales))

    def suffix(self) -> str:
        """The group and scale format, as the text form has them."""
        group = "row" if self.group is None else f"g{self.group}"
        return group if self.scales == "fp16" else f"{group}:{self.scales}"
