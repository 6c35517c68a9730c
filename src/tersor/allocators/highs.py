"""One item of each owner within limits, at least cost: the integer programme, by scipy's HiGHS."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, sparse

from tersor.allocators.problem import Floats, Ints

_SCALE = 1e4
"""Costs are multiplied by this, so that the objective is far above the solver's absolute tolerances of 1e-6."""

_STDOUT = 1
_silence = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """When the search may stop: relative gap to the optimum, nodes visited, seconds (None: no limit)."""

    gap: float
    nodes: int
    seconds: float | None


def choose(owner: Ints, extra: Floats, cost: Floats, *, room: Sequence[float], limits: Limits) -> Ints | None:
    """Positions of the chosen items, one an owner, with least total ``cost``, and in all at most ``room`` of ``extra``.

    ``extra``: ``(rooms, items)``, what each takes of each. ``cost`` should add up to about 1 for a good choice. The
    solver's tolerances mean that a room can be exceeded by about a millionth of its largest ``extra``: check. None when
    no choice was found within the limits.
    """
    count = len(owner)
    owners, row = np.unique(owner, return_inverse=True)
    one_each = sparse.csr_array((np.ones(count), (row, np.arange(count))), shape=(len(owners), count))
    options: dict[str, Any] = {"mip_rel_gap": limits.gap, "node_limit": limits.nodes}
    if limits.seconds is not None:
        options["time_limit"] = limits.seconds
    with _silent_stdout():
        result = optimize.milp(
            c=cost * _SCALE,
            integrality=np.ones(count),
            bounds=optimize.Bounds(0, 1),
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint(extra, -np.inf, np.asarray(room, np.float64)),
            ],
            options=options,
        )
    if result.x is None:
        return None
    order = np.lexsort((np.arange(count), -result.x, row))  # owner by owner, the largest variable of each first
    return order[np.unique(row[order], return_index=True)[1]]


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep what compiled code prints off standard output.

    HiGHS 1.12 (scipy 1.17) prints a debugging line of its own for every incumbent it must repair, whatever its output
    options; that would end up in the middle of a JSON answer. The file descriptor is put back at once.
    """
    if sys.platform == "win32":
        yield
        return
    flush_c = ctypes.CDLL(None).fflush
    with _silence:
        try:
            kept = os.dup(_STDOUT)
        except OSError:  # standard output is closed
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
            flush_c(None)
            os.dup2(nowhere, _STDOUT)
            yield
        finally:
            flush_c(None)
            os.dup2(kept, _STDOUT)
            os.close(kept)
            os.close(nowhere)
