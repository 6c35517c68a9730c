"""The search for the nearest sums of codebook vectors, plainly: specification and fallback.

A beam as in AQLM (arXiv:2401.06118, §3): after each stage the best few sums are kept, and each is tried with every
entry of the next. Products are summed column by column, so that every machine finds the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PRODUCTS = 1 << 18
"""Distances held at one time: what fits a cache."""


def nearest_sums(vectors: Tensor, book: Tensor, width: int) -> Tensor:
    """Codes int32 ``(n,)``: for each of ``vectors (n, dim)``, entries of all stages whose sum is near.

    ``book (stages, k, dim)`` float32, ``k`` a power of two. The entry of stage ``s`` is in bits ``s log2 k`` and up.
    Exact for one stage; with more, the ``width`` best sums (at most ``k``) are kept after each but the last. Of equals,
    the first.
    """
    stages, size, dim = book.shape
    bits, width = size.bit_length() - 1, min(width, size)
    half = book.square().sum(2) * 0.5
    step = max(_PRODUCTS // (size * (width if stages > 1 else 1)), 1)
    found = []
    for piece in vectors.split(step):  # type: ignore[no-untyped-call]
        codes = _least(_scores(piece, book[0], half[0]), width if stages > 1 else 1)
        sums = book[0][codes]
        for stage in range(1, stages):
            left = piece[:, None] - sums
            own = left[:, :, 0].square()
            for column in range(1, dim):
                own = own + left[:, :, column].square()
            score = _scores(left.flatten(0, 1), book[stage], half[stage]).reshape(len(piece), -1, size)
            chosen = _least((score + own[:, :, None] * 0.5).flatten(1), width if stage + 1 < stages else 1)
            parent, entry = chosen >> bits, chosen & (size - 1)
            codes = codes.gather(1, parent) + (entry << (stage * bits))
            sums = sums.gather(1, parent[:, :, None].expand(-1, -1, dim)) + book[stage][entry]
        found.append(codes[:, 0].to(torch.int32))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int32)


def _scores(vectors: Tensor, entries: Tensor, half: Tensor) -> Tensor:
    """``|e|²/2 − x·e`` of every vector and entry, ``(n, k)``."""
    score = half.expand(len(vectors), -1).clone()
    for column in range(entries.shape[1]):
        score -= vectors[:, column : column + 1] * entries[:, column]
    return score


def _least(score: Tensor, count: int) -> Tensor:
    """Where the ``count`` least of each row of ``score (n, k)`` are, least first, of equals the first."""
    if count == 1:  # numpy's is vectorised and takes a quarter of torch's time
        return torch.from_numpy(score.numpy().argmin(1)).reshape(-1, 1)
    return score.sort(dim=1, stable=True).indices[:, :count]
