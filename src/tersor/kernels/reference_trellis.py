"""Plain torch version of the trellis search: its specification, and what runs where nothing was compiled.

A bit-shift trellis (TCQ as in QTIP, arXiv:2406.11235) writes ``bits`` bits a row into a stream; the state at a row is
the last ``window`` bits up to and including its own, newest lowest, and ``values[state] * scale[row]`` is what the row
decodes to. The stream of a tile is a ring: the first rows' windows reach into the last rows' bits, so that no bits are
spent on an initial state.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PATHS = 1 << 20
"""Candidate values held at one time by the search of short tiles."""


def trellis_search(
    target: Tensor, scale: Tensor, values: Tensor, *, bits: int, window: int, tile: int, context: int, turns: int = 1
) -> Tensor:
    """States ``(rows, n)`` int32 of paths that come near to ``target (rows, n)`` in ``Σ (target − scale · value)²``.

    A state's lowest ``bits`` bits are the row's code; :func:`states` leads back.

    Each column is searched by itself, in tiles of ``tile`` rows, the last shorter. ``scale``: ``(rows,)``; ``values``:
    ``(2^window,)``, by state. All float32.

    The exact optimum over the ring would take one search for each state. Instead a free search over ``context`` rows
    to either side of the seam says which state to go through there, and a second one finds the best path that begins
    and ends in it. With more ``turns``, each further one finds the best path through the state where the last one is
    on the far side of the ring. Costs are sums of squares in the order of the rows; ties go to the lowest state.
    """
    path = torch.empty(target.shape, dtype=torch.int32)
    for start in range(0, len(target), tile):
        here = slice(start, start + tile)
        rows = len(target[here])
        if rows * bits < window:
            path[here] = search_short(target[here], scale[here], values, bits, window)
        else:
            path[here] = _search_tile(target[here], scale[here], values, bits, window, context, turns)
    return path


def search_short(target: Tensor, scale: Tensor, values: Tensor, bits: int, window: int) -> Tensor:
    """:func:`trellis_search` of one tile that has fewer than ``window`` bits: the best of all streams."""
    rows, columns = target.shape
    streams = torch.arange(1 << (rows * bits))
    # Row 0 is oldest, hence highest.
    shifts = torch.arange(rows - 1, -1, -1) * bits
    every = ((streams >> shifts[:, None]) & ((1 << bits) - 1)).to(torch.int32)
    ways = states(every, bits, window, rows)
    decoded = values[ways.long()] * scale[:, None]
    best = torch.empty(columns, dtype=torch.int64)
    step = max(_PATHS // len(streams), 1)
    for first in range(0, columns, step):
        cost = torch.zeros(len(streams), len(best[first : first + step]))
        for row in range(rows):
            error = target[row, first : first + step] - decoded[row][:, None]
            cost += error * error
        best[first : first + step] = _lowest(cost)
    return ways[:, best]


def states(codes: Tensor, bits: int, window: int, tile: int) -> Tensor:
    """The state ``(rows, n)`` int32 at each row of ``codes (rows, n)``, which are whole tiles but for the last."""
    result = torch.zeros_like(codes)
    for start in range(0, len(codes), tile):
        here = slice(start, start + tile)
        for age in range(-(-window // bits)):
            result[here] |= torch.roll(codes[here], age, 0) << (bits * age)
    return result & ((1 << window) - 1)


def window_map(masks: tuple[int, ...], window: int) -> Tensor:
    """``M s`` over GF(2) for all states ``s``: ``(2^window,)`` int64, below ``2^len(masks)``.

    Each mask is a row of ``M``: it says which bits of the state are added up to one bit of the result, highest first.
    """
    state = torch.arange(1 << window)
    result = torch.zeros_like(state)
    for mask in masks:
        parity = state & mask
        for shift in (8, 4, 2, 1):
            parity = parity ^ (parity >> shift)
        result = (result << 1) | (parity & 1)
    return result


def _search_tile(
    target: Tensor, scale: Tensor, values: Tensor, bits: int, window: int, context: int, turns: int
) -> Tensor:
    rows, columns = target.shape
    groups = 1 << (window - bits)
    around = (torch.arange(2 * context) - context) % rows
    cost, back = _forward(target[around], scale[around], values, torch.zeros(columns, len(values)), bits)
    seam = _lowest(cost.T)
    for oldest in reversed(back[context:]):
        seam = _previous(seam, oldest, bits, groups)
    path = _ring(target, scale, values, bits, groups, seam)
    for turn in range(1, turns):
        start = rows // 2 if turn % 2 else 0
        around = (torch.arange(rows) + start) % rows
        path[around] = _ring(target[around], scale[around], values, bits, groups, path[start - 1].long())
    return path


def _ring(target: Tensor, scale: Tensor, values: Tensor, bits: int, groups: int, seam: Tensor) -> Tensor:
    """The best paths ``(rows, columns)`` around the ring that begin and end in the states ``seam (columns,)``."""
    rows, columns = target.shape
    start = torch.full((columns, len(values)), torch.inf).scatter_(1, seam[:, None], 0.0)
    _, back = _forward(target, scale, values, start, bits)
    path = torch.empty(rows, columns, dtype=torch.int32)
    state = seam
    for row in range(rows - 1, -1, -1):
        path[row] = state.to(torch.int32)
        state = _previous(state, back[row], bits, groups)
    return path


def _forward(target: Tensor, scale: Tensor, values: Tensor, cost: Tensor, bits: int) -> tuple[Tensor, list[Tensor]]:
    """Least costs ``(columns, states)`` after all rows, and for each row the oldest bits of the predecessors taken.

    The ``2^bits`` predecessors of a state share all but their oldest bits, and so do its siblings: the least of them is
    found once for a group.
    """
    fan = 1 << bits
    columns = len(cost)
    back = []
    for row in range(len(target)):
        before = cost.view(columns, fan, -1)
        least = before[:, 0].clone()
        oldest = torch.zeros(least.shape, dtype=torch.uint8)
        for other in range(1, fan):
            closer = before[:, other] < least
            oldest[closer] = other
            least = torch.where(closer, before[:, other], least)
        error = target[row][:, None] - scale[row] * values
        cost = least.repeat_interleave(fan, 1) + error * error
        back.append(oldest)
    return cost, back


def _previous(state: Tensor, oldest: Tensor, bits: int, groups: int) -> Tensor:
    group = state >> bits
    return oldest.gather(1, group[:, None])[:, 0].long() * groups + group


def _lowest(cost: Tensor) -> Tensor:
    """The first position of the least entry of each column of ``cost (n, columns)``."""
    least = cost.amin(0)
    return (cost == least).to(torch.uint8).argmax(0)


def interleave(streams: Tensor, bits: int) -> Tensor:
    """Streams ``(tiles, columns, bytes)`` as they are stored: ``(tiles, ceil(columns / 4), width, 4)`` uint8.

    Four columns lie side by side, byte by byte, which is what wide vectors multiply by as it is. At 3 bits all first
    bytes of 8 rows come first, then all second ones. Zeros fill what is missing.
    """
    tiles, columns, width = streams.shape
    size = unit_bytes(bits)
    padded = torch.nn.functional.pad(streams, (0, -width % size, 0, -columns % 4))
    units = padded.reshape(tiles, -1, 4, -(-width // size), size)
    return units.permute(0, 1, 4, 3, 2).flatten(2, 3).contiguous()


def columns_apart(stored: Tensor, bits: int, columns: int, width: int) -> Tensor:
    """The inverse of :func:`interleave`: streams ``(tiles, columns, width)``."""
    tiles, groups, found, _ = stored.shape
    size = unit_bytes(bits)
    units = stored.reshape(tiles, groups, size, found // size, 4).permute(0, 1, 4, 3, 2)
    return units.reshape(tiles, 4 * groups, found)[:, :columns, :width]


def unit_bytes(bits: int) -> int:
    """The least number of bytes that holds whole codes."""
    return 3 if bits == 3 else 1
