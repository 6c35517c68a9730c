"""Fitting a generalized Gaussian: shapes are found again, quantiles are theory's."""

from __future__ import annotations

import math

import pytest
import torch

from tersor.errors import BadInput
from tersor.statistics.generalized_gaussian import GeneralizedGaussian, fit, of_deviation


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.6, 2.0, 4.0])
def test_its_own_samples_give_the_shape_back(shape: float) -> None:
    prior = GeneralizedGaussian(shape, 0.03)
    generator = torch.Generator().manual_seed(1)
    size = prior.magnitudes(torch.rand(200_000, generator=generator, dtype=torch.float64))
    values = size * (2 * torch.randint(0, 2, size.shape, generator=generator) - 1)
    found = fit(values)
    assert found.shape == pytest.approx(shape, rel=0.03)
    assert found.deviation == pytest.approx(prior.deviation, rel=0.02)
    assert float(values.square().mean().sqrt()) == pytest.approx(prior.deviation, rel=0.02)


def test_known_quantiles() -> None:
    share = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    normal = torch.special.ndtri(0.5 + share / 2)
    assert torch.allclose(of_deviation(2.0, 1.0).magnitudes(share), normal, atol=1e-9)
    laplace = -torch.log(1 - share)
    assert torch.allclose(GeneralizedGaussian(1.0, 1.0).magnitudes(share), laplace, atol=1e-9)
    assert GeneralizedGaussian(1.0, 1.0).deviation == pytest.approx(math.sqrt(2))


def test_size_does_not_change_the_shape() -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(2))
    assert fit(values * 1e-20).shape == pytest.approx(fit(values).shape, rel=1e-3)
    assert fit(values * 100).scale == pytest.approx(100 * fit(values).scale, rel=1e-3)


@pytest.mark.parametrize("values", [torch.zeros(10), torch.empty(0), torch.tensor([1.0, math.nan])])
def test_values_without_a_shape_are_refused(values: torch.Tensor) -> None:
    with pytest.raises(BadInput, match="cannot be fitted"):
        fit(values)
