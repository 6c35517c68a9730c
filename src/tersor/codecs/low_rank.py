"""Low-rank factors: the best approximation of a given rank in the layer's own output error.

With ``H = R Rᵀ``, ``tr(E H Eᵀ) = ‖E R‖²``: the truncated SVD ``U Σ Vᵀ`` of ``W R`` gives ``A = U Σ^½`` and
``B = Σ^½ Vᵀ R⁻¹`` (ASVD and LoRC go by other metrics: arXiv:2312.05821, 2303.08302; this one is EoRA's, 2410.21271).

>>> LowRank(8).bits((64, 96)) // 8            # (64 + 96) * 8 entries of 2 bytes
2560
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.codecs.text import Words, reads
from tersor.contracts import DirectCodec, Gram, Part, Shape
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
        rows, columns = weight.shape
        metric = torch.eye(columns, dtype=torch.float64)
        if gram is not None and not self.plain:
            damped = gram.matrix.double() + _DAMPING * gram.matrix.diagonal().double().mean() * metric
            metric = torch.linalg.cholesky(damped)
        target = weight.double() @ metric
        # The Gram matrix of the shorter side: an eigenproblem instead of an SVD, and the same subspace.
        if columns <= rows:
            vectors = torch.linalg.eigh(target.T @ target).eigenvectors[:, -self.rank :]
            left, right = target @ vectors, vectors.T
        else:
            left = torch.zeros(rows, self.rank, dtype=torch.float64)
            own = torch.linalg.eigh(target @ target.T).eigenvectors[:, -self.rank :]
            left[:, : own.shape[1]] = own
            right = left.T @ target
        right = torch.linalg.solve_triangular(metric, right, upper=False, left=False)
        # Both factors at the same scale, component by component, so that neither leaves float16's range.
        balance = (right.norm(dim=1) / left.norm(dim=0).clamp(min=1e-30)).clamp(1e-12, 1e12).sqrt()
        return {"left": (left * balance).to(torch.float16), "right": (right / balance[:, None]).to(torch.float16)}

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        left, right = tensors["left"].to(torch.float32), tensors["right"].to(torch.float32)
        total = torch.zeros(len(left), shape[1], dtype=torch.float32, device=left.device)
        # Term by term: the same bits whatever rows are decoded together, and without torch too.
        for index in range(self.rank):
            total = total + left[:, index : index + 1] * right[index]
        return total


@reads(r"lowrank(\d{1,5})", form="lowrank<rank>[:plain]", heads=("lowrank8",))
def _read(words: Words) -> LowRank:
    if words.arguments or words.options not in ((), ("plain",)):
        raise words.refuse("write lowrank<rank> or lowrank<rank>:plain, such as lowrank16.")
    return LowRank(int(words.head[1]), words.options == ("plain",))
