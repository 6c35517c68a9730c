"""Layers that share a choice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.allocators import Exact, expand_groups, merge_groups
from tersor.contracts import RatePoint
from tersor.errors import BadInput

CURVES = {
    "q": [RatePoint(40, 4.0, "int4"), RatePoint(80, 1.0, "int8"), RatePoint(160, 0.0, "bf16")],
    "k": [RatePoint(10, 9.0, "int4"), RatePoint(20, 2.0, "int8")],
    "o": [RatePoint(40, 1.0, "int4"), RatePoint(80, 0.5, "int8")],
    "v": [RatePoint(20, 3.0, "int8"), RatePoint(10, 8.0, "int4"), RatePoint(9, 9.0, "fp4")],
}
GROUPS = {"qkv": ["q", "k", "v"]}


def test_members_are_summed_over_the_choices_they_all_have() -> None:
    merged = merge_groups(CURVES, GROUPS)
    assert list(merged) == ["qkv", "o"]
    assert merged["qkv"] == (RatePoint(60, 21.0, "int4"), RatePoint(120, 6.0, "int8"))
    assert merged["o"] == tuple(CURVES["o"])


def test_members_get_their_own_points_back() -> None:
    allocation = Exact().allocate(merge_groups(CURVES, GROUPS), 160)
    expanded = expand_groups(allocation, CURVES, GROUPS)
    assert list(expanded) == list(CURVES)
    assert {key: point.choice for key, point in expanded.items()} == {
        "q": "int8",
        "k": "int8",
        "v": "int8",
        "o": "int4",
    }
    assert all(expanded[key] in CURVES[key] for key in CURVES)
    assert sum(p.nbytes for p in expanded.values()) == sum(p.nbytes for p in allocation.values())


choices = ["int2", "int3", "int4", "int8"]
curve = st.dictionaries(st.sampled_from(choices), st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1)
layers = st.dictionaries(st.sampled_from("abcdef"), curve, min_size=2).map(
    lambda table: {key: [RatePoint(b, float(d), c) for c, (b, d) in curve.items()] for key, curve in table.items()}
)


@given(curves=layers)
def test_bytes_and_distortion_are_preserved(curves: dict[str, list[RatePoint]]) -> None:
    members = sorted(curves)[:2]
    groups = {"both": members}
    common = {p.choice for p in curves[members[0]]} & {p.choice for p in curves[members[1]]}
    if not common:
        with pytest.raises(BadInput, match="no choice in common"):
            merge_groups(curves, groups)
        return
    merged = merge_groups(curves, groups)
    assert {p.choice for p in merged["both"]} == common
    for pick in merged["both"]:
        allocation = {key: points[0] for key, points in merged.items()} | {"both": pick}
        expanded = expand_groups(allocation, curves, groups)
        assert {expanded[member].choice for member in members} == {pick.choice}
        assert sum(p.nbytes for p in expanded.values()) == sum(p.nbytes for p in allocation.values())
        assert sum(p.distortion for p in expanded.values()) == sum(p.distortion for p in allocation.values())


def test_a_group_may_have_the_name_of_a_member() -> None:
    groups = {"q": ["q", "k"]}
    merged = merge_groups(CURVES, groups)
    assert list(merged) == ["q", "o", "v"]
    allocation = {key: points[-1] for key, points in merged.items()}
    assert expand_groups(allocation, CURVES, groups)["k"] == RatePoint(20, 2.0, "int8")


def test_no_groups_change_nothing() -> None:
    merged = merge_groups(CURVES, {})
    assert merged == {key: tuple(points) for key, points in CURVES.items()}
    allocation = {key: points[0] for key, points in merged.items()}
    assert expand_groups(allocation, CURVES, {}) == allocation


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"qk": ["q", "kk"]}, r"'qk' names 'kk'"),
        ({"qk": ["q", "k"], "kv": ["k", "v"]}, r"'k' is named twice.*'qk' and 'kv'"),
        ({"qk": []}, r"'qk' has no members"),
        ({"o": ["q", "k"]}, r"'o' has the name of a layer outside it"),
    ],
)
def test_bad_groups_are_named(groups: dict[str, list[str]], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        merge_groups(CURVES, groups)


def test_members_without_a_common_choice_are_named() -> None:
    curves = {"gate": [RatePoint(1, 1.0, "int4")], "up": [RatePoint(1, 1.0, "int8")]}
    with pytest.raises(BadInput, match=r"'mlp' \(gate, up\) have no choice in common"):
        merge_groups(curves, {"mlp": ["gate", "up"]})


def test_two_points_of_one_choice_are_refused_in_a_group() -> None:
    curves = {"gate": [RatePoint(1, 1.0, "int4"), RatePoint(2, 0.5, "int4")], "up": [RatePoint(1, 1.0, "int4")]}
    with pytest.raises(BadInput, match=r"'gate' has two points of the same choice"):
        merge_groups(curves, {"mlp": ["gate", "up"]})


def test_an_allocation_of_other_groups_is_refused() -> None:
    with pytest.raises(BadInput, match=r"no entry for 'qkv'"):
        expand_groups({key: points[0] for key, points in CURVES.items()}, CURVES, GROUPS)
    with pytest.raises(BadInput, match=r"gives 'bf16' to 'qkv', but its member 'k'"):
        expand_groups({"qkv": CURVES["q"][2], "o": CURVES["o"][0]}, CURVES, GROUPS)
