"""A stack of signs and low-rank magnitudes: BitStack (arXiv:2410.23918, §3.1, iterative absolute value decomposition).

Each stage stores the signs of what the stages before it have left over, one bit a weight, and a low-rank
approximation of its magnitudes. With the signs given, the truncated SVD of the magnitudes is the best there is of its
rank. A stage depends on those before it alone, so a stack may be cut after any of them: the first parts of
``bitstack<n>`` are those of ``bitstack<s>``, ``s < n``.

>>> BitStack(2, 4).bits((64, 96)) // 8        # 2 * (64 * 12 of signs + (64 + 96) * 4 entries of 2 bytes) + 96 * 2
4288
>>> str(BitStack(3, 1, plain=True))
'bitstack3:k1:plain'
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.refit import least_squares
from tersor.codecs.text import Words, reads
from tersor.contracts import CompositeCodec, Encode, Encoded, Gram, LeafCodec, Part, ScalarGrid, Shape, Side
from tersor.errors import BadInput, ShapeMismatch

MOST_STAGES = 8
_SPARE = 8
"""Directions, at least, that the search for singular vectors carries beyond those it is asked for."""
_PASSES = 12
_WIDEST = 2.0**10
"""How far a column's scale may be from their geometric mean; float16 holds what lies within."""


@dataclass(frozen=True)
class BitStack(CompositeCodec):
    """``value = scale[c] · Σ_s ±|left_s · right_s|``: ``stages`` of one bit a weight and factors of ``rank``, float16.

    The scale of a column is the reciprocal of its inputs' root mean square, so that errors count as the layer's output
    sees them; ``plain``: there are no scales and none are stored. Without a Gram matrix all scales are 1.
    """

    stages: int
    rank: int
    plain: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= MOST_STAGES:
            raise BadInput(f"Codec bitstack{self.stages} does not exist: a stack has 1 to {MOST_STAGES} stages.")
        if not 1 <= self.rank <= 65536:
            raise BadInput(f"Codec bitstack{self.stages}:k{self.rank} does not exist: the rank is at least 1.")

    def __str__(self) -> str:
        return f"bitstack{self.stages}:k{self.rank}" + (":plain" if self.plain else "")

    @property
    def sampled(self) -> bool:
        return False

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        if self.rank > columns:
            raise ShapeMismatch(f"Codec {self} cannot take a layer of {columns} inputs: its rank is {self.rank}.")
        stages = tuple(
            replace(part, name=f"{part.name}{stage}")
            for stage in range(self.stages)
            for part in SignedMagnitudes(self.rank).parts((rows, columns))
        )
        return stages if self.plain else (*stages, Part("scale", torch.float16, (columns,), shared=True))

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        *_, last = self.growing(weight, gram, encode)
        return last

    def growing(self, weight: Tensor, gram: Gram | None, encode: Encode) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """What :meth:`encode` returns, of a stack of one stage, of two, and so on up to this one's."""
        tensors: dict[str, Tensor] = {}
        if not self.plain:
            tensors["scale"] = _scale(weight.shape[1], gram)
            factor = tensors["scale"].to(torch.float32)
            weight = weight / factor
            if gram is not None:
                known = gram
                gram = encode.transformed(
                    known, "bitstack", lambda: Gram(known.matrix * factor[:, None] * factor, known.tokens)
                )
        total: Tensor | None = None
        for stage in range(self.stages):
            left_over = weight if total is None else weight - total
            found, values = encode(left_over, SignedMagnitudes(self.rank), gram)
            tensors.update({f"{name}{stage}": tensor for name, tensor in found.items()})
            total = values if total is None else total + values
            yield dict(tensors), total if self.plain else total * tensors["scale"].to(torch.float32)

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        rows, columns = tensors["signs0"].shape[0], shape[1]
        inner = SignedMagnitudes(self.rank)
        total: Tensor | None = None
        for stage in range(self.stages):
            own = {name: tensors[f"{name}{stage}"] for name in ("signs", "left", "right")}
            values = inner.decode(own, (rows, columns))
            total = values if total is None else total + values
        assert total is not None
        return total if self.plain else total * tensors["scale"].to(torch.float32)


@dataclass(frozen=True)
class SignedMagnitudes(LeafCodec):
    """One stage: ``value = ±|left · right|``, the sign a bit. It is no codec by itself: it has no text of its own.

    ``right (rank, in)``: float32, on float16's grid; there once it has learned a layer.
    """

    rank: int
    right: Tensor | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"bitstack1:k{self.rank}:plain"

    @property
    def sampled(self) -> bool:
        return False

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("signs", torch.uint8, (rows, packed_width(columns, 1))),
            Part("left", torch.float16, (rows, self.rank)),
            Part("right", torch.float16, (self.rank, columns), shared=True),
        )

    def learn(self, weight: Tensor, gram: Gram | None) -> SignedMagnitudes:
        right = leading_factors(weight.abs().double(), self.rank)[1]
        return replace(self, right=right.to(torch.float16).to(torch.float32))

    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        """The left factor that is best for the magnitudes, all columns counting alike: scales are to see to that."""
        right = self._learned().double()
        left = weight.abs().double() @ right.T @ torch.linalg.pinv(right @ right.T, hermitian=True)
        return {"left": left.to(torch.float16).to(torch.float32)}

    def grid(self, side: Side, in_features: int) -> ScalarGrid:
        return ScalarGrid(self._product(side).abs(), None, torch.tensor([[-1.0, 1.0]]), 2, 1)

    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        # Of two values on either side of zero, the nearest is that of the target's sign.
        codes = target > 0
        size = self._product(side, columns).abs()
        return codes.to(torch.int32), torch.where(codes, size, -size)

    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        size = self._product(encoded.side).abs()
        return torch.where(encoded.codes > 0, size, -size)

    def _product(self, side: Side, columns: Tensor | slice = slice(None)) -> Tensor:
        """``left · right``, term by term: the same bits whatever rows are decoded together, and without torch too."""
        left, right = side["left"], self._learned()[:, columns]
        size = left[:, :1] * right[0]
        for index in range(1, self.rank):
            size = size + left[:, index : index + 1] * right[index]
        return size

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """Exact least squares for each row's left factor under ``tr(E H Eᵀ)``, signs fixed; kept where it is better.

        A magnitude that turns negative is decoded as positive, so what is compared are decoded rows.
        """
        right = self._learned()
        signs = torch.where((encoded.codes > 0) == (self._product(encoded.side) >= 0), 1.0, -1.0)
        normal = torch.empty(len(weight), self.rank, self.rank)
        for index in range(self.rank):
            normal[:, index] = ((signs * right[index]) @ gram * signs) @ right.T
        wanted = least_squares(normal, ((weight @ gram) * signs) @ right.T)
        old = encoded.side["left"]
        left = torch.where(torch.isfinite(wanted), wanted, old).to(torch.float16).to(torch.float32)
        before, after = (
            ((error @ gram) * error).double().sum(1)
            for side in (encoded.side, {"left": left})
            for error in (weight - self.values(Encoded(encoded.codes, side), weight.shape[1]),)
        )
        return {"left": torch.where((after < before)[:, None], left, old)}

    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        return {
            "signs": pack(encoded.codes, 1),
            "left": encoded.side["left"].to(torch.float16),
            "right": self._learned().to(torch.float16),
        }

    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        return Encoded(unpack(tensors["signs"], 1, shape[1]), {"left": tensors["left"].to(torch.float32)})

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        learned = replace(self, right=tensors["right"].to(torch.float32))
        return learned.values(self.unpack(tensors, shape), shape[1])

    def _learned(self) -> Tensor:
        if self.right is None:
            raise ValueError(f"a stage of {self} has no right factor yet: call learn(weight, gram) first")
        return self.right


def _scale(columns: int, gram: Gram | None) -> Tensor:
    """What columns are multiplied by, ``(columns,)`` float16, with a geometric mean of about 1."""
    if gram is None:
        return torch.ones(columns, dtype=torch.float16)
    energy = gram.matrix.diagonal().double()
    alive = energy > 0
    if not bool(alive.any()):
        return torch.ones(columns, dtype=torch.float16)
    middle = energy[alive].log().mean().exp()
    # Inputs that are always zero cost nothing: they get the least attention, not an infinite scale.
    wanted = (middle / energy.clamp(min=1e-300)).sqrt().clamp(1 / _WIDEST, _WIDEST)
    return wanted.to(torch.float16)


def leading_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``(rows, rank)``, ``(rank, in)`` of a truncated SVD of ``matrix (rows, in)``, all float64.

    Subspace iteration from fixed random directions (arXiv:0909.4061, Algorithm 4.4); the singular values are shared
    evenly, and each component's largest entry on the right is positive. Components that do not exist are zero.
    """
    rows, columns = matrix.shape
    width = min(-(-(rank + _SPARE) // 4) * 4, rows, columns)  # products of other widths are several times as slow
    generator = torch.Generator().manual_seed(columns)
    start = torch.randn(columns, width, dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_PASSES):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    kept = min(rank, width)
    right, root = right[:kept], values[:kept].clamp(min=0).sqrt()
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))[:, 0]
    root = torch.where(values[:kept] > 0, root, 0.0)
    signs = torch.where(largest < 0, -1.0, 1.0).double()
    factors = torch.zeros(rows, rank, dtype=torch.float64), torch.zeros(rank, columns, dtype=torch.float64)
    factors[0][:, :kept] = (basis @ left[:, :kept]) * (signs * root)
    factors[1][:kept] = right * (signs * root)[:, None]
    return factors


@reads(r"bitstack(\d{1,3})", form="bitstack<stages>:k<rank>[:plain]", heads=("bitstack2",))
def _read(words: Words) -> BitStack:
    ranks = [found for option in words.options if (found := re.fullmatch(r"k(\d{1,5})", option))]
    rest = [option for option in words.options if not re.fullmatch(r"k\d{1,5}", option)]
    if words.arguments or len(ranks) != 1 or rest not in ([], ["plain"]):
        raise words.refuse("write bitstack<stages>:k<rank>, such as bitstack2:k4, perhaps with :plain.")
    return BitStack(int(words.head[1]), int(ranks[0][1]), rest == ["plain"])
