"""Pieces of work side by side."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.parallel import in_order, in_turn


@given(st.integers(0, 20), st.integers(1, 5))
def test_results_come_in_order_whatever_the_number_of_workers(count: int, workers: int) -> None:
    assert list(in_order(lambda index: index * index, count, workers)) == [index * index for index in range(count)]
    found = in_turn(iter("abcdefgh"[:count]), str.upper, workers)
    assert list(found) == [(letter, letter.upper()) for letter in "abcdefgh"[:count]]


@given(st.integers(1, 4), st.integers(1, 6))
def test_pieces_are_asked_for_when_they_are_needed_on_the_callers_thread(workers: int, waiting: int) -> None:
    asked, threads = [], set()

    def pieces() -> Iterator[int]:
        for index in range(30):
            asked.append(index)
            threads.add(threading.get_ident())
            yield index

    for taken, (piece, _) in enumerate(in_turn(pieces(), lambda piece: piece, workers, waiting=waiting)):
        assert piece == taken
        assert len(asked) <= taken + 1 + (waiting if workers > 1 else 0)
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("workers", [1, 3])
def test_what_goes_wrong_is_told(workers: int) -> None:
    def work(piece: int) -> float:
        return 1 / piece

    found = in_turn(iter([2, 1, 0, 4]), work, workers)
    assert [next(found), next(found)] == [(2, 0.5), (1, 1.0)]
    with pytest.raises(ZeroDivisionError):
        next(found)
