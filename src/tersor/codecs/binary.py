"""Sums of binary planes: residual binarization (BiLLM, arXiv:2402.04291, §3.2) and dual binary weights (DB-LLM's FDB,
arXiv:2402.11960, §3.2).

>>> BinaryPlanes(2, 64).bits((64, 128)) // 8      # 64 * 32 bytes of codes + 64 * 2 * 2 scales of 2 bytes
2560
>>> str(BinaryPlanes(1, None)), str(BinaryPlanes(2, 64, "s8", dual=True))
('bin:row', 'fdb:g64:s8')
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.codecs.grouped import GroupedScalar
from tersor.codecs.refit import least_squares, quadratic
from tersor.codecs.scales import scale_parts, storable
from tersor.codecs.text import Words, grouping, reads
from tersor.contracts import Encoded, Part, ScalarGrid, Shape, Side
from tersor.errors import BadInput

_STEPS = 10
# Starts of the two scales of dual planes, in root mean squares: the wide side right, left, and neither.
_DUAL_STARTS = ((0.9, 1.8), (1.8, 0.9), (1.2, 1.3))
# Half steps of the best even grids of 8 and 16 levels on a unit Gaussian (Max, 1960): another start, for many planes.
_HALF_STEPS = {3: 0.293, 4: 0.1676}


@dataclass(frozen=True)
class BinaryPlanes(GroupedScalar):
    """``value = Σ_p c_p · a_p``: bit ``p`` of a code chooses ``c_p``, and each group has its own scales ``a_p > 0``.

    Every ``c_p`` is −1 or +1; with ``dual``, of two planes, the first is 0 or −1 and the second 0 or +1. The scales of
    a group lie side by side. ``bits_per_code`` is the number of planes, 1 to 4.
    """

    dual: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits_per_code <= 4:
            raise BadInput(f"Codec bin{self.bits_per_code} does not exist: binary codecs have 1 to 4 planes.")
        if self.dual and self.bits_per_code != 2:
            raise BadInput(f"Dual binary weights have 2 planes, not {self.bits_per_code}.")

    def __str__(self) -> str:
        head = "fdb" if self.dual else f"bin{self.bits_per_code if self.bits_per_code > 1 else ''}"
        return f"{head}:{self.suffix()}"

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        codes, *_ = super().parts(shape)
        return (codes, *scale_parts(shape[0], self.groups(shape[1]) * self.bits_per_code, self.scales))

    def choices(self, plane: int) -> tuple[float, float]:
        """``c_p`` for a bit of 0 and of 1."""
        if self.dual:
            return (0.0, -1.0) if plane == 0 else (0.0, 1.0)
        return (-1.0, 1.0)

    def plane(self, codes: Tensor, plane: int) -> Tensor:
        """``c_p`` float32 of codes of any shape."""
        low, high = self.choices(plane)
        return ((codes >> plane) & 1).to(torch.float32) * (high - low) + low

    def fit(self, weight: Tensor, importance: Tensor) -> dict[str, Tensor]:
        """Scales ``(n, planes)`` of independent groups, under ``Σ h (w − ŵ)²``.

        Plane by plane the best for what is left, then rounding and exact least squares in turn, which never rises.
        """
        count = self.bits_per_code
        mass = importance.expand(weight.shape) / importance.mean().clamp(min=1e-30) + 1e-6
        root = weight.square().mean(1, keepdim=True).sqrt()
        if self.dual:
            starts = [root * torch.tensor([pair]) for pair in _DUAL_STARTS]
        else:
            left, scales = weight, []
            for _ in range(count):
                scales.append((mass * left.abs()).sum(1, keepdim=True) / mass.sum(1, keepdim=True))
                left = left - torch.where(left < 0, -1.0, 1.0) * scales[-1]
            starts = [torch.cat(scales, 1)]
            if count in _HALF_STEPS:
                starts.append(root * _HALF_STEPS[count] * torch.tensor([2.0**p for p in reversed(range(count))]))
        best = torch.full((len(weight),), torch.inf)
        result = starts[0]
        for start in starts:
            scale = start.clamp(min=2.0**-24)
            for _ in range(_STEPS if count > 1 else 0):
                scale = self._improved(weight, mass, scale)
            values = self._nearest_of_group(weight, scale)[1]
            loss = (mass * (weight - values).square()).sum(1)
            result = torch.where((loss < best)[:, None], scale, result)
            best = torch.minimum(best, loss)
        return {"scale": result}

    def _improved(self, weight: Tensor, mass: Tensor, scale: Tensor) -> Tensor:
        """Least squares for the scales ``(n, planes)`` with the codes that the old ones give."""
        codes, _ = self._nearest_of_group(weight, scale)
        units = torch.stack([self.plane(codes, plane) for plane in range(self.bits_per_code)], 1)
        weighted = units * mass[:, None]
        wanted = least_squares(weighted @ units.transpose(1, 2), (weighted * weight[:, None]).sum(2))
        return torch.where(torch.isfinite(wanted) & (wanted > 0), wanted, scale)

    def _nearest(self, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values nearest to ``target (rows, n)``; ``scale (rows, n or 1, planes)``. Ties: the least code."""
        every = torch.arange(2**self.bits_per_code, dtype=torch.int32)
        levels = self._sum(every, scale[..., None, :])
        distance = (target[..., None] - levels).abs()
        nearest = distance <= distance.amin(-1, keepdim=True)
        codes = torch.where(nearest, every, len(every)).amin(-1)
        values = torch.gather(levels.expand(distance.shape), -1, codes[..., None].long())[..., 0]
        return codes, values

    def _nearest_of_group(self, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The same for whole groups ``target (n, group)`` with ``scale (n, planes)``: by how many middles lie below."""
        levels, order = self._sum(torch.arange(2**self.bits_per_code, dtype=torch.int32), scale[:, None]).sort(
            dim=1, stable=True
        )
        middles = (levels[:, :-1] + levels[:, 1:]) * 0.5
        place = torch.zeros(target.shape, dtype=torch.uint8)
        for middle in middles.T:
            place += target > middle[:, None]
        index = place.long()
        return order.gather(1, index).to(torch.int32), levels.gather(1, index)

    def _sum(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Values of codes with ``scale (…, planes)``: a product for each plane, added in order."""
        value = self.plane(codes, 0) * scale[..., 0]
        for plane in range(1, self.bits_per_code):
            value = value + self.plane(codes, plane) * scale[..., plane]
        return value

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        rows, columns = weight.shape
        groups = self.groups(columns)
        mass = torch.ones(1, columns // groups)
        if importance is not None:
            mass = importance.reshape(1, groups, -1).expand(rows, -1, -1).reshape(rows * groups, -1)
        scale = self.fit(weight.reshape(rows * groups, -1), mass)["scale"]
        return storable(scale.reshape(rows, groups * self.bits_per_code), self.scales)

    def prepare_segment(self, side: Side, weight: Tensor, start: int, importance: Tensor | None = None) -> Side:
        at = start // weight.shape[1] * self.bits_per_code
        mass = torch.ones(1, weight.shape[1]) if importance is None else importance[None, :]
        kept = storable(self.fit(weight, mass)["scale"], self.scales, side.get("super"))["scale"]
        scale = side["scale"].clone()
        scale[:, at : at + self.bits_per_code] = kept
        return {**side, "scale": scale}

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        scale = side["scale"].reshape(len(target), -1, self.bits_per_code)
        group = columns // self.group if self.group else torch.zeros_like(columns)
        return self._nearest(target, scale[:, group])

    def grid(self, side: Side, in_features: int) -> ScalarGrid | None:  # type: ignore[override]
        """A scalar grid where there is one plane; several have levels that differ from group to group."""
        if self.bits_per_code > 1:
            return None
        return ScalarGrid(side["scale"], None, torch.tensor([[-1.0, 1.0]]), 2, self.group or in_features)

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        rows = len(encoded.codes)
        groups = self.groups(in_features)
        scale = encoded.side["scale"].reshape(rows, groups, 1, self.bits_per_code)
        codes = encoded.codes.reshape(rows, groups, in_features // groups)
        return self._sum(codes, scale).reshape(rows, in_features)

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """Exact least squares for all scales of a row under ``tr(E H Eᵀ)``, codes fixed; kept where it is better."""
        rows, columns = weight.shape
        groups, count = self.groups(columns), self.bits_per_code
        width = columns // groups
        units = [self.plane(encoded.codes, plane) for plane in range(count)]
        normal = torch.empty(rows, groups, count, groups, count)
        for group in range(groups):
            here = slice(group * width, (group + 1) * width)
            for plane in range(count):
                spread = units[plane][:, here] @ gram[here]
                for other in range(count):
                    total = (spread * units[other]).reshape(rows, groups, width).sum(2)
                    normal[:, group, plane, :, other] = total
        normal = normal.reshape(rows, groups * count, groups * count)
        pull = weight @ gram
        right = torch.stack([(pull * unit).reshape(rows, groups, width).sum(2) for unit in units], 2).flatten(1)
        old = encoded.side["scale"]
        wanted = least_squares(normal, right)
        stored = storable(torch.where(torch.isfinite(wanted) & (wanted > 0), wanted, old), self.scales)
        better = quadratic(normal, right, stored["scale"]) < quadratic(normal, right, old)
        return {name: torch.where(better[:, None], stored[name], value) for name, value in encoded.side.items()}


_FORM = "bin[2-4]:{g<n>|row}[:bf16|:s8]"


@reads(r"bin([2-9])?|fdb", form=f"{_FORM}, fdb:{{g<n>|row}}[:bf16|:s8]", heads=("bin", "bin2", "bin3", "bin4", "fdb"))
def _read(words: Words) -> BinaryPlanes:
    dual = words.head[0] == "fdb"
    group, scales, rest = grouping(words, _FORM.replace("bin[2-4]", "fdb") if dual else _FORM)
    if rest or words.arguments:
        raise words.refuse(f"unknown option {(rest or words.arguments)[0]!r}; write {words.head[0]}:g64 or :row.")
    return BinaryPlanes(2 if dual else int(words.head[1] or 1), group, scales, dual)
