"""Independent pieces of work on several threads, with results that do not depend on how many there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def in_order(work: Callable[[int], Result], count: int, workers: int) -> Iterator[Result]:
    """Results of ``work(0) … work(count − 1)`` in order, at most ``workers`` at a time and waiting.

    Whatever the number of workers, each piece is computed alike and results are consumed in the same order: that is
    what makes the bytes of an artifact independent of the machine's number of cores.
    """
    return (result for _, result in in_turn(iter(range(count)), work, workers, waiting=workers))


def in_turn(
    pieces: Iterator[Piece], work: Callable[[Piece], Result], workers: int, *, waiting: int | None = None
) -> Iterator[tuple[Piece, Result]]:
    """Each of ``pieces`` with what ``work`` makes of it, in order, ``workers`` at a time.

    Pieces are asked for on the caller's thread and not before they are needed: ``waiting`` are begun or done and not
    yet taken, by default four times as many as there are workers, so that none waits for another's slow piece.
    """
    if workers <= 1:
        for piece in pieces:
            yield piece, work(piece)
        return
    most = 4 * workers if waiting is None else waiting
    with ThreadPoolExecutor(workers) as pool:
        begun: deque[tuple[Piece, Future[Result]]] = deque()
        try:
            for piece in pieces:
                done = None
                if len(begun) == most:
                    first, future = begun.popleft()
                    done = first, future.result()
                begun.append((piece, pool.submit(work, piece)))
                if done is not None:
                    yield done
            while begun:
                first, future = begun.popleft()
                yield first, future.result()
        except BaseException:
            # An error, or nobody wants the rest: what has not begun is not worth waiting for.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
