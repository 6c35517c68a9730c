"""Coordinate descent never makes a row worse than its start, however uneven the columns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leaf_checks import correlated_gram, gaussian, leaf
from tersor.contracts import Encoded, Gram
from tersor.solvers import CoordinateDescent, ErrorFeedback


@pytest.mark.parametrize("text", ["int2:g32", "q2_k", "e8p:row", "vq6x4", "iq2_xxs", "iq3_s"])
def test_no_row_becomes_worse(text: str) -> None:
    columns = 256
    gram, weight = correlated_gram(columns), gaussian(24, columns) * 0.05
    scale = torch.exp(gaussian(1, columns, seed=8)[0])
    uneven = Gram(gram.matrix * scale * scale[:, None], gram.tokens)
    codec = leaf(text).learn(weight, uneven)
    solver = CoordinateDescent(sweeps=3, start=ErrorFeedback(refit=False))
    prepared = solver.prepare(uneven, codec.span)

    def losses(encoded: Encoded) -> Tensor:
        error = weight - codec.values(encoded, columns)
        return ((error @ uneven.matrix) * error).double().sum(1)

    start = losses(solver.start.solve(weight, codec, prepared.start))
    end = losses(solver.solve(weight, codec, prepared))
    assert (end <= start * 1.0001).all()
    assert text in ("e8p:row", "vq6x4") or end.sum() < 0.95 * start.sum()
