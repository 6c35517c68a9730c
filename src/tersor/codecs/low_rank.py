"""Low-rank factors: the best approximation of a given rank in the layer's own output error.

With ``H = R Rᵀ``, ``tr(E H Eᵀ) = ‖E R‖²``: the truncated SVD ``U Σ Vᵀ`` of ``W R`` gives ``A = U Σ^½`` and
``B = Σ^½ Vᵀ R⁻¹`` (ASVD and LoRC go by other metrics: arXiv:2312.05821, 2303.08302; this one is EoRA's, 2410.21271).

Factors are float16, or in a codec of their own, as LoRC has them in 8 bits:

>>> from tersor.codecs import parse
>>> LowRank(8).bits((64, 96)) // 8            # (64 + 96) * 8 entries of 2 bytes
2560
>>> parse("lowrank8(int8:row)").bits((64, 96)) // 8      # (64 + 96) * 8 bytes, and 2 * 8 scales of 2 bytes
1312
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.codecs.inner import under
from tersor.codecs.text import Words, parse, reads
from tersor.contracts import Codec, CompositeCodec, DirectCodec, Encode, Gram, LeafCodec, Part, Shape
from tersor.errors import BadInput, ShapeMismatch

_DAMPING = 1e-3


@dataclass(frozen=True)
class LowRank(DirectCodec):
    """``W ≈ A B``, ``A (out, rank)``, ``B (rank, in)``, both float16. ``plain``: leave the inputs' metric out."""

    rank: int
    plain: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 65536:
            raise BadInput(f"Codec lowrank{self.rank} does not exist: the rank is at least 1.")

    def __str__(self) -> str:
        return f"lowrank{self.rank}" + (":plain" if self.plain else "")

    @property
    def sampled(self) -> bool:
        return False

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        if self.rank > columns:
            raise ShapeMismatch(f"Codec {self} cannot take a layer of {columns} inputs: its rank is {self.rank}.")
        return (
            Part("left", torch.float16, (rows, self.rank)),
            Part("right", torch.float16, (self.rank, columns), shared=True),
        )

    def encode(self, weight: Tensor, gram: Gram | None = None) -> dict[str, Tensor]:
        left, right = best_factors(weight, None if self.plain else gram, self.rank)
        return {"left": left.to(torch.float16), "right": right.to(torch.float16)}

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return _product(tensors["left"].to(torch.float32), tensors["right"].to(torch.float32))


@dataclass(frozen=True)
class CodedLowRank(CompositeCodec):
    """``W ≈ A B`` with both factors in the leaf codec ``inner``, each component of either a row of its own.

    Parts of ``Aᵀ (rank, out)`` are called ``left_<part>``, those of ``B (rank, in)`` ``right_<part>``; all belong to
    the layer as a whole. ``plain``: leave the inputs' metric out.
    """

    rank: int
    inner: Codec
    plain: bool = False

    def __post_init__(self) -> None:
        LowRank(self.rank)
        if not isinstance(self.inner, LeafCodec):
            raise BadInput(f"{self} has factors in {self.inner}, which has no codes; use one such as int8:row.")

    def __str__(self) -> str:
        return f"lowrank{self.rank}({self.inner})" + (":plain" if self.plain else "")

    @property
    def sampled(self) -> bool:
        return False

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        LowRank(self.rank).parts(shape)
        return tuple(
            replace(part, name=f"{side}_{part.name}", shared=True)
            for side, size in (("left", shape[0]), ("right", shape[1]))
            for part in self.inner.parts((self.rank, size))
        )

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        metric = None if self.plain else gram
        left, _ = best_factors(weight, metric, self.rank)
        stored, across = encode(left.T.float().contiguous(), self.inner, None)
        tensors = {f"left_{name}": tensor for name, tensor in stored.items()}
        # The best right factor for the left one as stored: A⁺ W, under any metric.
        exact = across.double()
        right = torch.linalg.pinv(exact @ exact.T, hermitian=True) @ (exact @ weight.double())
        stored, down = encode(right.float(), self.inner, metric)
        tensors.update({f"right_{name}": tensor for name, tensor in stored.items()})
        return tensors, _product(across.T, down)

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return self.decode_rows(tensors, shape, slice(None))

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        left = self.inner.decode(under(tensors, "left_"), (self.rank, shape[0]))
        right = self.inner.decode(under(tensors, "right_"), (self.rank, shape[1]))
        return _product(left.T[rows], right)


def best_factors(weight: Tensor, gram: Gram | None, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``(out, rank)``, ``(rank, in)``, float64, of the best approximation of ``weight (out, in)``.

    Best under the damped Gram matrix, or in plain squared error where there is none.
    """
    rows, columns = weight.shape
    metric = torch.eye(columns, dtype=torch.float64)
    if gram is not None:
        damped = gram.matrix.double() + _DAMPING * gram.matrix.diagonal().double().mean() * metric
        metric = torch.linalg.cholesky(damped)
    target = weight.double() @ metric
    # The Gram matrix of the shorter side: an eigenproblem instead of an SVD, and the same subspace.
    if columns <= rows:
        vectors = torch.linalg.eigh(target.T @ target).eigenvectors[:, -rank:]
        left, right = target @ vectors, vectors.T
    else:
        left = torch.zeros(rows, rank, dtype=torch.float64)
        own = torch.linalg.eigh(target @ target.T).eigenvectors[:, -rank:]
        left[:, : own.shape[1]] = own
        right = left.T @ target
    right = torch.linalg.solve_triangular(metric, right, upper=False, left=False)
    # Both factors at the same scale, component by component, so that neither leaves float16's range.
    balance = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-30)).clamp(1e-12, 1e12).sqrt()
    return left * balance, right / balance[:, None]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, term by term: the same bits whatever rows are decoded together, and without torch too."""
    total = torch.zeros(len(left), right.shape[1], dtype=torch.float32, device=left.device)
    for index in range(len(right)):
        total = total + left[:, index : index + 1] * right[index]
    return total


@reads(r"lowrank(\d{1,5})", form="lowrank<rank>[(<codec>)][:plain]", heads=("lowrank8",))
def _read(words: Words) -> LowRank | CodedLowRank:
    if len(words.arguments) > 1 or words.options not in ((), ("plain",)):
        raise words.refuse("write lowrank<rank>, lowrank<rank>(<codec>) or either with :plain, such as lowrank16.")
    rank, plain = int(words.head[1]), words.options == ("plain",)
    return CodedLowRank(rank, parse(words.arguments[0]), plain) if words.arguments else LowRank(rank, plain)
