"""Both allocators against every possible choice, on problems small enough to try them all."""

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.allocators import Exact, Lagrangian, lower_bound
from tersor.contracts import Allocator, RatePoint
from tersor.errors import BadInput, Infeasible

Curves = Mapping[str, Sequence[RatePoint]]

ALLOCATORS = [Lagrangian(), Exact(), Exact(gap=0)]
each_allocator = pytest.mark.parametrize("allocator", ALLOCATORS, ids=["lagrangian", "exact", "exact-gap-0"])

points = st.builds(
    RatePoint,
    nbytes=st.integers(0, 40),
    distortion=st.one_of(st.integers(0, 12).map(float), st.floats(0, 50)),
    choice=st.sampled_from(["int2", "int3", "int4", "int8", "bf16"]),
)
curves_strategy = st.dictionaries(
    st.sampled_from(["q", "k", "v", "o"]), st.lists(points, min_size=1, max_size=5), min_size=1
)


def total_bytes(choice: Mapping[str, RatePoint]) -> int:
    return sum(point.nbytes for point in choice.values())


def total_distortion(choice: Mapping[str, RatePoint]) -> float:
    return math.fsum(point.distortion for point in choice.values())


def optimum(curves: Curves, budget: int) -> float:
    """Least distortion over all choices that fit; infinite when none does."""
    combinations = itertools.product(*curves.values())
    fitting = (combo for combo in combinations if sum(p.nbytes for p in combo) <= budget)
    return min((math.fsum(p.distortion for p in combo) for combo in fitting), default=math.inf)


def largest_hull_step(curves: Curves) -> float:
    """Largest drop of distortion between neighbours on the lower convex hull of any curve."""
    largest = 0.0
    for curve in curves.values():
        here = min(curve, key=lambda p: (p.nbytes, p.distortion))
        while better := [p for p in curve if p.distortion < here.distortion and p.nbytes > here.nbytes]:
            start = here
            here = min(better, key=lambda p: ((p.distortion - start.distortion) / (p.nbytes - start.nbytes), p.nbytes))
            largest = max(largest, start.distortion - here.distortion)
    return largest


@settings(max_examples=300, deadline=None)
@given(curves=curves_strategy, budget=st.integers(0, 170))
def test_against_brute_force(curves: Curves, budget: int) -> None:
    best = optimum(curves, budget)
    if math.isinf(best):
        for allocator in ALLOCATORS:
            with pytest.raises(Infeasible):
                allocator.allocate(curves, budget)
        return
    assert lower_bound(curves, budget) <= best + 1e-9
    for allocator in ALLOCATORS:
        choice = allocator.allocate(curves, budget)
        assert list(choice) == list(curves)
        assert all(choice[key] in curves[key] for key in curves)
        assert total_bytes(choice) <= budget
    # HiGHS compares with tolerances of 1e-6 on an objective scaled to 1e4.
    assert total_distortion(Exact(gap=0).allocate(curves, budget)) == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert total_distortion(Exact().allocate(curves, budget)) <= best * (1 + 1e-4) + 1e-12
    assert total_distortion(Lagrangian().allocate(curves, budget)) <= best + largest_hull_step(curves) + 1e-9


@each_allocator
@settings(max_examples=100, deadline=None)
@given(curves=curves_strategy, budget=st.integers(0, 170), data=st.data())
def test_order_does_not_matter(allocator: Allocator, curves: Curves, budget: int, data: st.DataObject) -> None:
    keys = data.draw(st.permutations(list(curves)))
    shuffled = {key: data.draw(st.permutations(list(curves[key]))) for key in keys}
    try:
        expected = allocator.allocate(curves, budget)
    except Infeasible:
        return
    assert allocator.allocate(shuffled, budget) == expected


@each_allocator
@settings(max_examples=100, deadline=None)
@given(curves=curves_strategy, budget=st.integers(0, 170))
def test_no_single_step_up_is_left(allocator: Allocator, curves: Curves, budget: int) -> None:
    """The bytes left over are fewer than any one entry's next better point would take."""
    try:
        choice = allocator.allocate(curves, budget)
    except Infeasible:
        return
    left = budget - total_bytes(choice)
    for key, curve in curves.items():
        here = choice[key]
        assert not [p for p in curve if p.distortion < here.distortion and p.nbytes - here.nbytes <= left]


@each_allocator
@settings(max_examples=50, deadline=None)
@given(curves=curves_strategy)
def test_infeasible_names_the_smallest_budget(allocator: Allocator, curves: Curves) -> None:
    smallest = sum(min(point.nbytes for point in curve) for curve in curves.values())
    with pytest.raises(Infeasible, match=str(smallest)) as caught:
        allocator.allocate(curves, smallest - 1)
    assert caught.value.smallest == smallest
    assert total_bytes(allocator.allocate(curves, smallest)) == smallest


@each_allocator
def test_nothing_to_allocate(allocator: Allocator) -> None:
    assert allocator.allocate({}, 0) == {}


@each_allocator
def test_equal_points_are_told_apart_by_their_names(allocator: Allocator) -> None:
    curve = [RatePoint(5, 1.0, "int4:g64"), RatePoint(5, 1.0, "int4:g32"), RatePoint(6, 1.0, "fp4:e2m1:g32")]
    assert allocator.allocate({"q": curve}, 100) == {"q": RatePoint(5, 1.0, "int4:g32")}


@each_allocator
def test_arguments_are_left_alone(allocator: Allocator) -> None:
    curves = {"q": [RatePoint(9, 0.5, "int8"), RatePoint(4, 2.0, "int4")], "k": [RatePoint(3, 1.0, "int4")]}
    before = {key: list(curve) for key, curve in curves.items()}
    allocator.allocate(curves, 10)
    assert curves == before


@each_allocator
@pytest.mark.parametrize("distortion", [math.nan, math.inf, -0.5])
def test_a_bad_distortion_is_named(allocator: Allocator, distortion: float) -> None:
    curves = {"q": [RatePoint(4, 1.0, "int4")], "v_proj": [RatePoint(4, 1.0, "int4"), RatePoint(9, distortion, "int8")]}
    with pytest.raises(BadInput, match=r"'v_proj'.*'int8'.*distortion (nan|inf|-0\.5)"):
        allocator.allocate(curves, 100)


@each_allocator
def test_negative_bytes_and_empty_curves_are_named(allocator: Allocator) -> None:
    with pytest.raises(BadInput, match=r"'q'.*-1 bytes"):
        allocator.allocate({"q": [RatePoint(-1, 1.0, "int4")]}, 100)
    with pytest.raises(BadInput, match=r"'k'.*no point"):
        allocator.allocate({"q": [RatePoint(1, 1.0, "int4")], "k": []}, 100)
