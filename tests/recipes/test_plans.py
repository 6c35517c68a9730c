"""Recipes that share their bits out among layers: BitStack's sorted stages, FineQuant's group sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.codecs import parse
from tersor.recipes import NothingFits, recipes

ALL = recipes()
SHAPES = {"a": (128, 256), "b": (256, 128), "c": (64, 512), "d": (256, 256)}


def bits_of(plan: dict[str, str]) -> int:
    return sum(parse(text).bits(SHAPES[name]) for name, text in plan.items())


def budget(bits: float) -> float:
    return bits * sum(rows * columns for rows, columns in SHAPES.values())


def planned(name: str, bits: float, loss: Callable[[str, str], float]) -> dict[str, str]:
    plan = ALL[name].plan
    assert plan is not None
    found = dict(plan(bits, SHAPES, loss))
    assert set(found) == set(SHAPES)
    assert bits_of(found) <= budget(bits)
    return found


@settings(deadline=None, max_examples=25)
@given(bits=st.floats(1.7, 4.5), heavy=st.floats(1.0, 200.0))
def test_stages_go_where_they_take_most_from_the_loss(bits: float, heavy: float) -> None:
    share = {"a": heavy, "b": 1.0, "c": 1.0, "d": 1.0}

    def loss(name: str, text: str) -> float:
        return share[name] * 0.4 ** int(text.removeprefix("bitstack")[0])

    for name, plain in (("bitstack", False), ("bitstack-plain", True), ("bitstack-feedback", False)):
        found = planned(name, bits, loss)
        stages = {layer: int(text.removeprefix("bitstack")[0]) for layer, text in found.items()}
        assert stages["a"] >= max(stages.values()) - (heavy < 10)
        assert all(text.endswith(":plain") == plain for text in found.values())
        # A stack can be cut anywhere: every layer's stages are of one rank.
        assert len({text.split(":")[1] for text in found.values()}) == 1


def test_a_stack_has_at_least_a_stage() -> None:
    with pytest.raises(NothingFits, match="least"):
        planned("bitstack", 1.0, lambda _name, _text: 1.0)


@settings(deadline=None, max_examples=25)
@given(bits=st.floats(4.2, 4.95), narrowing=st.tuples(*(st.integers(0, 3) for _ in range(4))))
def test_groups_are_halved_where_that_narrows_ranges_most(bits: float, narrowing: tuple[int, ...]) -> None:
    each = {name: 2.0**-power for name, power in zip(SHAPES, narrowing, strict=True)}

    def halvings(name: str, text: str) -> int:
        group = text.split(":")[1]
        return 0 if group == "row" else (SHAPES[name][1] // int(group[1:])).bit_length() - 1

    def mean_range(name: str, text: str) -> float:
        return each[name] ** halvings(name, text)

    found = planned("finequant", bits, mean_range)
    assert all(text.startswith("int4:") for text in found.values())
    finest = {name: halvings(name, f"int4:g{16 if columns > 16 else columns}") for name, (_, columns) in SHAPES.items()}
    halved = {name for name, text in found.items() if halvings(name, text)}
    # Each halving narrows by the same part, so a layer's groups are halved to the end or not at all.
    assert all(halvings(name, found[name]) == finest[name] for name in halved)
    left = set(SHAPES) - halved
    assert all(each[name] < each[other] for name in halved for other in left)
    following = [name for name in left if each[name] == min(each[other] for other in left)]
    more = {**found, **dict.fromkeys(following, "int4:g16")}
    assert not following or bits_of(more) > budget(bits)


def test_groups_of_even_rows_narrow_nothing_and_are_halved_last() -> None:
    ranges = {"a": [1.0, 0.4, 0.35, 0.3], "b": [1.0], "c": [1.0], "d": [1.0]}

    def mean_range(name: str, text: str) -> float:
        group = text.split(":")[1]
        halvings = 0 if group == "row" else (SHAPES[name][1] // int(group[1:])).bit_length() - 1
        return ranges[name][min(halvings, len(ranges[name]) - 1)]

    found = planned("finequant", 4.17, mean_range)
    assert found["a"] == "int4:g32"
    assert {found[name] for name in "bcd"} == {"int4:row"}


def test_too_few_bits_for_a_scale_a_row_are_said_to_be_too_few() -> None:
    with pytest.raises(NothingFits, match="a scale a row take more than 4"):
        planned("finequant", 4.0, lambda _name, _text: 1.0)
