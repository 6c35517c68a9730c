"""Independent pieces of work on several threads, with results that do not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_order(work: Callable[[int], Result], count: int, workers: int) -> Iterator[Result]:
    """Results of ``work(0) … work(count − 1)`` in order, at most ``workers`` at a time and waiting.

    Whatever the number of workers, each piece is computed alike and results are consumed in the same order: that is
    what makes the bytes of an artifact independent of the machine's number of cores.
    """
    if workers <= 1:
        for index in range(count):
            yield work(index)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(work, index) for index in range(min(workers, count))]
        for index in range(count):
            result = waiting.pop(0).result()
            if index + workers < count:
                waiting.append(pool.submit(work, index + workers))
            yield result
