"""The search for sums of codebook vectors: compiled and plain alike, exact for one stage, a beam for more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.kernels import codebook, reference_codebook


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.skipif(not codebook.compiled, reason="nothing was compiled")
@pytest.mark.parametrize(
    ("count", "stages", "size", "dim", "width"),
    [
        (0, 1, 16, 4, 8),
        (1, 1, 2, 2, 8),
        (300, 1, 256, 8, 1),
        (257, 2, 256, 8, 8),
        (100, 3, 64, 5, 8),
        (40, 4, 4, 16, 8),
    ],
)
def test_both_ways_find_the_same_codes(count: int, stages: int, size: int, dim: int, width: int) -> None:
    vectors, book = drawn(0, count, dim), drawn(1, stages, size, dim) / torch.arange(1, stages + 1)[:, None, None]
    found = codebook.nearest_sums(vectors, book, width)
    assert found.dtype == torch.int32
    assert torch.equal(found, reference_codebook.nearest_sums(vectors, book, width))


@pytest.mark.skipif(not codebook.compiled, reason="nothing was compiled")
@pytest.mark.parametrize("stages", [1, 2])
def test_of_equals_both_take_the_first(stages: int) -> None:
    book = drawn(1, stages, 64, 4).round()
    book[:, 5] = 0.0
    book[:, 32:] = book[:, :32]
    vectors = torch.cat([drawn(0, 50, 4).round(), torch.zeros(3, 4), drawn(2, 5, 4).round() + 0.5])
    found = codebook.nearest_sums(vectors, book, 8)
    assert torch.equal(found, reference_codebook.nearest_sums(vectors, book, 8))
    assert int((found & 63).max()) < 32


def test_one_stage_is_exact() -> None:
    vectors, book = drawn(0, 200, 6), drawn(1, 1, 128, 6)
    least = torch.cdist(vectors.double(), book[0].double()).min(1).values
    found = (vectors - book[0][codebook.nearest_sums(vectors, book, 8).long()]).double().norm(dim=1)
    assert torch.allclose(found, least, atol=1e-5)


def test_a_wider_beam_loses_less_and_all_of_them_lose_least() -> None:
    vectors, book = drawn(0, 60, 4), drawn(1, 2, 16, 4)
    sums = (book[0][:, None] + book[1][None]).reshape(-1, 4)
    least = torch.cdist(vectors, sums).square().min(1).values

    def lost(width: int) -> Tensor:
        codes = codebook.nearest_sums(vectors, book, width).long()
        return (vectors - book[0][codes & 15] - book[1][codes >> 4]).square().sum(1)

    assert lost(1).mean() > lost(4).mean() > least.mean()
    assert torch.allclose(lost(16), least, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_gets_some_code(value: float) -> None:
    vectors = torch.full((3, 4), value)
    found = codebook.nearest_sums(vectors, drawn(1, 2, 16, 4), 8)
    assert bool(((found >= 0) & (found < 256)).all())
