"""A limit on time beside the one on bytes: kept, and nothing better within both by trying all choices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.allocators import Exact, allocate_within
from tersor.contracts import RatePoint
from tersor.errors import BadInput

Curves = dict[str, list[RatePoint]]
Times = dict[str, list[float]]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Curves, Times, int, float]:
    """Three to five entries of two to four points; limits that some choice keeps, one for both."""
    curves: Curves = {}
    times: Times = {}
    for key in range(draw(st.integers(3, 5))):
        count = draw(st.integers(2, 4))
        sizes = [draw(st.integers(1, 60)) for _ in range(count)]
        losses = [draw(st.integers(0, 1000)) / 100 for _ in range(count)]
        curves[f"{key}"] = [
            RatePoint(size, loss, f"int{n}") for n, (size, loss) in enumerate(zip(sizes, losses, strict=True))
        ]
        times[f"{key}"] = [draw(st.integers(1, 40)) / 4 for _ in range(count)]
    kept = {key: draw(st.integers(0, len(points) - 1)) for key, points in curves.items()}
    budget = sum(curves[key][pick].nbytes for key, pick in kept.items()) + draw(st.integers(0, 40))
    return curves, times, budget, sum(times[key][pick] for key, pick in kept.items())


def best(curves: Curves, times: Times, budget: int, most: float) -> float:
    """The least distortion of all choices within both limits."""
    losses = []
    for picks in itertools.product(*(range(len(points)) for points in curves.values())):
        chosen = [points[pick] for points, pick in zip(curves.values(), picks, strict=True)]
        time = sum(one[pick] for one, pick in zip(times.values(), picks, strict=True))
        if sum(point.nbytes for point in chosen) <= budget and time <= most:
            losses.append(sum(point.distortion for point in chosen))
    return min(losses)


def taken(curves: Curves, times: Times, chosen: dict[str, RatePoint]) -> float:
    return sum(times[key][curves[key].index(point)] for key, point in chosen.items())


@given(problems())
def test_both_limits_are_kept_and_nothing_is_better(problem: tuple[Curves, Times, int, float]) -> None:
    curves, times, budget, most = problem
    try:
        chosen = allocate_within(Exact(), curves, budget, times, most)
    except BadInput:
        return  # no price reaches a corner of so small a problem; the message is tested below
    assert list(chosen) == list(curves)
    assert sum(point.nbytes for point in chosen.values()) <= budget
    assert taken(curves, times, chosen) <= most
    found = sum(point.distortion for point in chosen.values())
    assert found <= best(curves, times, budget, most) * (1 + 2e-3) + 1e-6


def many(points: Sequence[tuple[int, float, float]], count: int = 40) -> tuple[Curves, Times]:
    """``count`` alike entries with points of bytes, distortion and time."""
    curves = {
        f"{n:02}": [RatePoint(size, loss, f"c{k}") for k, (size, loss, _) in enumerate(points)] for n in range(count)
    }
    return curves, {key: [time for _, _, time in points] for key in curves}


def test_without_need_the_allocator_answers() -> None:
    curves, times = many([(1, 8.0, 5.0), (2, 4.0, 5.0), (3, 1.0, 5.0)])
    assert allocate_within(Exact(), curves, 100, times, 200.0) == Exact().allocate(curves, 100)


def test_a_large_entry_does_not_leave_time_unused() -> None:
    # At no price does the large entry take its middle point: it is above the line between the other two.
    curves, times = many([(1, 1.0, 1.0), (1, 0.5, 2.0)])
    curves["large"] = [RatePoint(1, 30.0, "a"), RatePoint(1, 17.0, "b"), RatePoint(1, 0.0, "c")]
    times["large"] = [10.0, 20.0, 30.0]
    chosen = allocate_within(Exact(), curves, 100, times, 60.0)
    assert chosen["large"].choice == "b"
    assert taken(curves, times, chosen) == 60


def test_a_time_that_nothing_keeps_is_refused() -> None:
    curves, times = many([(1, 8.0, 5.0), (2, 4.0, 6.0)])
    with pytest.raises(BadInput, match=r"a time of 199: the quickest that was found takes 200"):
        allocate_within(Exact(), curves, 100, times, 199.0)
