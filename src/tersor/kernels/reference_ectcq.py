"""The trellis search of entropy-coded trellis-coded quantization, plainly: specification and fallback.

Fischer and Wang, IEEE Trans. Inf. Theory 38 (1992), with the one-dimensional codes of Ungerboeck (IEEE Trans. Inf.
Theory 28, 1982). Grid number ``k`` is in subset ``k mod 4``. In state ``s`` only numbers whose lowest bit is that of
``s`` may stand; with ``b`` the second bit of ``k``, the next state is ``s >> 1 ^ (s & 1)(h0 >> 1) ^ b (h1 >> 1)``.
A sequence begins in state 0 and may end in any.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tersor.kernels.reference_rans import ESCAPE, REACH

CODES: dict[int, tuple[int, int, int]] = {
    1: (1, 0, 0),
    4: (4, 0o5, 0o2),
    8: (8, 0o13, 0o4),
    16: (16, 0o23, 0o4),
    32: (32, 0o45, 0o10),
    64: (64, 0o103, 0o24),
    128: (128, 0o235, 0o126),
    256: (256, 0o515, 0o362),
}
"""States, ``h0``, ``h1``: the parity check polynomials of the one-dimensional codes; 1 state is no trellis."""

RENORM = 256
"""Steps between two subtractions of the least cost, which keep long sequences exact enough in float32."""

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def path(
    target: Floats,
    price_of_row: Floats,
    price_of_column: Floats,
    row: Ints,
    level: Ints,
    shift: int,
    price: Floats,
    shrink: Floats,
    low: Ints,
    trellis: tuple[int, int, int],
) -> NDArray[np.int32]:
    """Grid numbers ``(columns, rows)`` of least cost for ``target (columns, rows)`` in units of the step.

    The cost of ``k`` for ``x`` is ``(x - v)² + price_of_row[row] price_of_column[column] bits``: ``v`` is ``k`` moved
    towards zero by ``shrink[context, min(|k|, 4)]``, bits are ``price[context, k & 1, symbol]``. ``row (rows,)`` and
    ``level (columns,)`` say the context: ``(row + level) >> shift``, the first or last beyond these. Of each subset,
    only the two numbers around ``x`` are looked at. Ties go to the lower number, and to second bit 0.
    """
    columns, rows = target.shape
    states, h0, h1 = trellis
    top_bit = max(states.bit_length() - 2, 0)
    number = np.arange(states)
    union = number >> top_bit if states > 1 else number
    first = number ^ union * (h0 >> 1)
    before = np.stack([first, first ^ h1 >> 1]) << 1 | union if states > 1 else np.zeros((2, 1), np.int64)
    cost = np.full((columns, states), 1e30, np.float32)
    cost[:, 0] = 0
    best = np.empty((rows, columns, 4), np.int32)
    choice = np.empty((rows, columns, states), np.uint8)
    subset = np.arange(4)
    for step in range(rows):
        x = target[:, step, None]
        weight = (price_of_row[step] * price_of_column)[:, None]
        kind = np.clip((row[step] + level[:, None]) >> shift, 0, len(price) - 1)
        under = np.floor((x - subset.astype(np.float32)) * np.float32(0.25)).astype(np.int64) * 4 + subset
        costs = []
        for k in (under, under + 4):
            symbol = (k >> 1) >> low[kind]
            symbol = np.where(abs(symbol) > REACH, ESCAPE, symbol + REACH)
            value = k.astype(np.float32) - np.sign(k).astype(np.float32) * shrink[kind, np.minimum(abs(k), 4)]
            costs.append((x - value) * (x - value) + weight * price[kind, k & 1, symbol])
        over = costs[1] < costs[0]
        best[step] = np.where(over, under + 4, under)
        branch = np.where(over, costs[1], costs[0])
        ways = [cost[:, before[bit]] + branch[:, union + 2 * bit] for bit in (0, 1)]
        choice[step] = ways[1] < ways[0]
        cost = np.where(choice[step], ways[1], ways[0])
        if step % RENORM == RENORM - 1:
            cost = cost - cost.min(1, keepdims=True)
    state = cost.argmin(1)
    each = np.arange(columns)
    codes = np.empty((columns, rows), np.int32)
    for step in range(rows - 1, -1, -1):
        bit = choice[step, each, state]
        codes[:, step] = best[step, each, union[state] + 2 * bit]
        state = before[bit, state]
    return codes
