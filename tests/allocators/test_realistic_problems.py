"""Curves as models have them: distortion about ``a * 2 ** (-2 * rate)``, with ``a`` spread over decades."""

import math
import os
import time
from itertools import pairwise

import numpy as np
import pytest

from tersor.allocators import Exact, Lagrangian, lower_bound
from tersor.contracts import RatePoint

Curves = dict[str, list[RatePoint]]


def model_like(*, layers: int, points: int, seed: int, noise: float = 0.05) -> Curves:
    """Layers of three sizes, rates from 1.5 to 8.5 bits a weight, sizes a little uneven as headers make them."""
    rng = np.random.default_rng(seed)
    curves: Curves = {}
    for layer in range(layers):
        weights = int(rng.choice([110_592, 331_776, 884_736]))
        scale = 10 ** rng.uniform(-4, 1)
        rates = np.linspace(1.5, 8.5, points) + rng.uniform(0, 0.2, points)
        curves[f"layer.{layer}"] = [
            RatePoint(
                nbytes=int(weights * rate / 8) // 64 * 64 + int(rng.integers(0, 600)),
                distortion=float(scale * 4.0**-rate * rng.lognormal(0, noise)),
                choice=f"codec{index}",
            )
            for index, rate in enumerate(rates)
        ]
    return curves


def budget_at(curves: Curves, share: float) -> int:
    low = sum(min(p.nbytes for p in curve) for curve in curves.values())
    high = sum(max(p.nbytes for p in curve) for curve in curves.values())
    return int(low + share * (high - low))


def distortion(choice: dict[str, RatePoint]) -> float:
    return math.fsum(point.distortion for point in choice.values())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lagrangian_and_exact_agree_within_a_thousandth(seed: int, share: float) -> None:
    curves = model_like(layers=200, points=20, seed=seed)
    budget = budget_at(curves, share)
    fast, exact = Lagrangian().allocate(curves, budget), Exact().allocate(curves, budget)
    assert distortion(exact) <= distortion(fast) <= 1.001 * distortion(exact)
    assert distortion(exact) >= lower_bound(curves, budget)
    for choice in (fast, exact):
        assert sum(p.nbytes for p in choice.values()) <= budget


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_budget_is_used_up_to_the_smallest_step(share: float) -> None:
    curves = model_like(layers=200, points=20, seed=3)
    budget = budget_at(curves, share)
    for allocator in (Lagrangian(), Exact()):
        choice = allocator.allocate(curves, budget)
        left = budget - sum(p.nbytes for p in choice.values())
        steps = [
            point.nbytes - choice[key].nbytes
            for key, curve in curves.items()
            for point in curve
            if point.distortion < choice[key].distortion
        ]
        assert 0 <= left < min(steps)
        assert left < 1e-3 * budget


def test_more_budget_never_predicts_more_loss() -> None:
    curves = model_like(layers=40, points=12, seed=4)
    budgets = [budget_at(curves, share) for share in np.linspace(0, 1, 12)]
    losses = [distortion(Exact(gap=1e-6).allocate(curves, budget)) for budget in budgets]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    everything = [min(p.distortion for p in curve) for curve in curves.values()]
    assert losses[-1] == pytest.approx(math.fsum(everything))


def test_scale_of_distortions_does_not_matter() -> None:
    curves = model_like(layers=60, points=12, seed=5)
    budget = budget_at(curves, 0.4)
    chosen = Exact().allocate(curves, budget)
    for factor in (2.0**-40, 2.0**40):
        scaled = {key: [RatePoint(p.nbytes, p.distortion * factor, p.choice) for p in c] for key, c in curves.items()}
        again = Exact().allocate(scaled, budget)
        assert distortion(again) == pytest.approx(factor * distortion(chosen), rel=1e-4)


def test_sizes_of_a_large_model_do_not_upset_the_solver() -> None:
    """Gigabytes counted in single bytes: finer than the solver's tolerances, yet never over."""
    rng = np.random.default_rng(6)
    curves: Curves = {}
    for layer in range(40):
        scale = 10 ** rng.uniform(-3, 1)
        curves[f"layer.{layer}"] = [
            RatePoint(int(2e8 * rate) + int(rng.integers(0, 1000)), float(scale * 4.0**-rate), f"int{rate}")
            for rate in range(2, 9)
        ]
    for share in (0.2, 0.5, 0.8):
        budget = budget_at(curves, share)
        choice = Exact().allocate(curves, budget)
        assert sum(p.nbytes for p in choice.values()) <= budget
        assert distortion(choice) <= distortion(Lagrangian().allocate(curves, budget))


def test_fast_enough() -> None:
    """Limits are several times what an idle machine takes, since others may be using this one."""
    curves = model_like(layers=300, points=60, seed=7)
    budget = budget_at(curves, 0.3)
    start = time.process_time()
    Lagrangian().allocate(curves, budget)
    assert time.process_time() - start < 1.0
    start = time.process_time()
    Exact().allocate(curves, budget)
    assert time.process_time() - start < 10.0


def test_the_best_known_choice_comes_back_when_time_runs_out() -> None:
    curves = model_like(layers=200, points=20, seed=8, noise=0)
    budget = budget_at(curves, 0.05)
    fast = distortion(Lagrangian().allocate(curves, budget))
    assert fast > lower_bound(curves, budget)
    hurried = Exact(gap=0, time_limit=1e-6).allocate(curves, budget)
    assert distortion(hurried) <= fast
    assert sum(p.nbytes for p in hurried.values()) <= budget


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(1, b"before ")
    for seed in range(4):
        curves = model_like(layers=60, points=20, seed=seed, noise=0)
        Exact(gap=1e-7, nodes=50).allocate(curves, budget_at(curves, 0.3))
    os.write(1, b"after")
    assert capfd.readouterr() == ("before after", "")
