"""Layers that must share a choice: engines that fuse q/k/v or gate/up want one codec for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tersor.contracts import RatePoint
from tersor.errors import BadInput

Curves = Mapping[str, Sequence[RatePoint]]
Groups = Mapping[str, Sequence[str]]


def merge_groups(curves: Curves, groups: Groups) -> dict[str, tuple[RatePoint, ...]]:
    """Curves in which each group is one key, whose points sum the members' points of equal ``choice``.

    ``groups``: group key to the keys of its members; keys in no group stay as they are. A group takes the place of its
    first member. Choices that not every member has are left out.

    Raises :class:`~tersor.errors.BadInput` when a member is unknown, is in two groups or has two points of the same
    choice, when a group's key is that of another layer, or when its members have no choice in common.

    >>> q, k = RatePoint(64, 1.0, "int4:g64"), RatePoint(16, 2.0, "int4:g64")
    >>> merge_groups({"q": [q], "k": [k]}, {"qk": ["q", "k"]})
    {'qk': (RatePoint(nbytes=80, distortion=3.0, choice='int4:g64'),)}
    """
    home = _homes(curves, groups)
    merged: dict[str, tuple[RatePoint, ...]] = {}
    for key, curve in curves.items():
        group = home.get(key)
        if group is None:
            merged[key] = tuple(curve)
        elif group not in merged:
            merged[group] = _sum(group, groups[group], curves)
    return merged


def expand_groups(allocation: Mapping[str, RatePoint], curves: Curves, groups: Groups) -> dict[str, RatePoint]:
    """Each layer's own point of the choice that its group got: the inverse of :func:`merge_groups`.

    ``allocation``: what an allocator gave for the merged curves. ``curves``: the curves before merging.

    Raises :class:`~tersor.errors.BadInput` when the allocation lacks a key or names a choice its layers do not have.
    """
    home = _homes(curves, groups)
    expanded: dict[str, RatePoint] = {}
    for key, curve in curves.items():
        group = home.get(key, key)
        if group not in allocation:
            raise BadInput(f"the allocation has no entry for {group!r}; expand with the groups that were merged")
        if group == key and key not in home:
            expanded[key] = allocation[key]
            continue
        choice = allocation[group].choice
        own = _by_choice(key, curve).get(choice)
        if own is None:
            raise BadInput(f"the allocation gives {choice!r} to {group!r}, but its member {key!r} has no such point")
        expanded[key] = own
    return expanded


def _homes(curves: Curves, groups: Groups) -> dict[str, str]:
    """Member to group key."""
    home: dict[str, str] = {}
    for group, members in groups.items():
        if not members:
            raise BadInput(f"the group {group!r} has no members; leave it out")
        if group in curves and group not in members:
            raise BadInput(f"the group {group!r} has the name of a layer outside it; give the group another name")
        for member in members:
            if member not in curves:
                raise BadInput(f"the group {group!r} names {member!r}, which has no rate-distortion curve")
            if member in home:
                raise BadInput(f"{member!r} is named twice, in the groups {home[member]!r} and {group!r}; keep one")
            home[member] = group
    return home


def _sum(group: str, members: Sequence[str], curves: Curves) -> tuple[RatePoint, ...]:
    tables = [_by_choice(member, curves[member]) for member in members]
    common = [choice for choice in tables[0] if all(choice in table for table in tables)]
    if not common:
        raise BadInput(
            f"the members of the group {group!r} ({', '.join(members)}) have no choice in common; "
            "offer each of them at least one same codec"
        )
    return tuple(
        RatePoint(
            nbytes=sum(table[choice].nbytes for table in tables),
            distortion=sum(table[choice].distortion for table in tables),
            choice=choice,
        )
        for choice in common
    )


def _by_choice(key: str, curve: Sequence[RatePoint]) -> dict[str, RatePoint]:
    table = {point.choice: point for point in curve}
    if len(table) != len(curve):
        raise BadInput(f"the curve of {key!r} has two points of the same choice; a grouped layer may have one of each")
    return table
