"""Rate–distortion points from a sample of rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs import parse
from tersor.contracts import Codec, Gram
from tersor.solvers import Encoder, ErrorFeedback, Nearest
from tersor.statistics.curves import draw_sample, measure
from tersor.statistics.sensitivity import Objective


def plainly(weight: Tensor, codec: Codec) -> Tensor:
    """What nearest rounding makes of a weight."""
    return Encoder(Nearest())(weight, codec, None)[1]


def problem(out: int, columns: int, seed: int, skew: float) -> tuple[Tensor, Objective]:
    """A weight and an objective whose row weights fall like ``1 / rank^skew``, in random order."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=g) * (0.5 + torch.rand(out, 1, generator=g))
    rows = torch.arange(1, out + 1, dtype=torch.float32).pow(-skew)[torch.randperm(out, generator=g)]
    x = torch.randn(3 * columns, columns, generator=g) * torch.linspace(0.2, 2.0, columns)
    return weight, Objective(rows / rows.sum(), Gram(x.T @ x / len(x), len(x)))


@pytest.mark.parametrize(("skew", "count"), [(0.0, 48), (0.7, 48), (1.3, 64)])
def test_the_estimate_of_a_sample_is_unbiased(skew: float, count: int) -> None:
    """Over many draws the mean is the value over all rows, within three standard errors and a hair."""
    weight, objective = problem(600, 16, 1, skew)
    codec = parse("int3:g16")
    values = plainly(weight, codec)
    # Rows that matter more have larger errors too: the case that unequal chances of being drawn get wrong.
    error = (weight - values) * (objective.rows / objective.rows.max())[:, None].pow(0.25)
    truth = float(objective.distortion(error).double().sum())
    estimates = []
    for seed in range(120):
        sample = draw_sample(weight, objective, count=count, seed=seed)
        estimates.append(float((objective.distortion(error[sample.rows], sample.rows).double() * sample.shares).sum()))
    ratio = torch.tensor(estimates) / truth
    assert abs(float(ratio.mean()) - 1) < 3 * float(ratio.std()) / math.sqrt(len(ratio)) + 0.01
    assert float(ratio.std()) < 0.25


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), bits=st.integers(2, 6), skew=st.sampled_from([0.0, 0.5, 1.0]))
def test_measuring_a_sample_agrees_with_measuring_all_rows(seed: int, bits: int, skew: float) -> None:
    weight, objective = problem(300, 16, seed, skew)
    encoder = Encoder(ErrorFeedback())
    codecs = [parse(f"int{bits}:g16"), parse(f"int{bits}:row")]
    everything = draw_sample(weight, objective, count=300, seed=seed)
    sample = draw_sample(weight, objective, count=80, seed=seed)
    whole = measure(everything, objective, codecs, lambda rows, codec: encoder(rows, codec, objective.gram)[1])
    part = measure(sample, objective, codecs, lambda rows, codec: encoder(rows, codec, objective.gram)[1])
    for exact, estimate in zip(whole, part, strict=True):
        assert 0.6 * exact < estimate < 1.6 * exact


def test_all_rows_give_the_exact_value() -> None:
    weight, objective = problem(40, 8, 2, 0.5)
    sample = draw_sample(weight, objective, count=40, seed=0)
    assert torch.equal(sample.rows, torch.arange(40))
    assert torch.equal(sample.shares, torch.ones(40, dtype=torch.float64))
    codec = parse("int2:row")
    values = plainly(weight, codec)
    exact = float(objective.distortion(weight - values).double().sum())
    assert math.isclose(measure(sample, objective, [codec], plainly)[0], exact, rel_tol=1e-6)


def test_the_energy_of_the_weight_itself_is_estimated_exactly() -> None:
    """Estimates are ratios to it, so a sample can never be wrong about it."""
    weight, objective = problem(500, 8, 3, 1.0)
    sample = draw_sample(weight, objective, count=30, seed=5)
    estimate = float((objective.distortion(sample.weight, sample.rows).double() * sample.shares).sum())
    assert math.isclose(estimate, float(objective.distortion(weight).double().sum()), rel_tol=1e-6)


def test_rows_that_carry_the_loss_are_in_the_sample() -> None:
    weight, objective = problem(2000, 8, 4, 0.0)
    top = [7, 800, 1999]
    heavy = objective.rows.clone()
    heavy[top] *= 2000
    objective = Objective(heavy, objective.gram)
    for seed in range(10):
        rows = draw_sample(weight, objective, count=100, seed=seed).rows
        assert set(top) <= set(rows.tolist())
        assert len(set(rows.tolist())) == 100


def test_the_same_seed_draws_the_same_rows() -> None:
    weight, objective = problem(200, 8, 6, 0.5)
    first, second = (draw_sample(weight.bfloat16(), objective, count=20, seed=9) for _ in range(2))
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.shares, second.shares)
    assert not torch.equal(first.rows, draw_sample(weight.bfloat16(), objective, count=20, seed=10).rows)


def test_a_layer_of_zeros_costs_nothing() -> None:
    objective = Objective(torch.ones(50), Gram(torch.eye(8), 4))
    sample = draw_sample(torch.zeros(50, 8), objective, count=10, seed=0)
    assert measure(sample, objective, [parse("int4:row")], plainly)[0] < 1e-12


def test_kept_floats_need_no_solver() -> None:
    weight, objective = problem(30, 8, 7, 0.0)
    sample = draw_sample(weight, objective, count=30, seed=0)
    coarse, fine = measure(sample, objective, [parse("int2:row"), parse("bf16")], plainly)
    assert 0 < fine < 0.01 * coarse
