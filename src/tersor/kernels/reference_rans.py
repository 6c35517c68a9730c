"""The entropy coder's stream, plainly: its specification, and what runs where nothing was compiled.

A stream holds grid numbers ``k (rows, columns)``. ``k`` is written as ``index = k >> 1``; its lowest bit, the *union*,
follows from the trellis state of its column. The level of its row and that of its column say its context:
``(row + level) >> shift``, the first or last beyond these. Each context has two tables of 32 frequencies that add up to
4096 (one for each union), and ``low`` raw bits. Symbol ``s = (index >> low) + 15`` for ``0 <= s <= 30`` where that has
a frequency, then ``low`` raw bits; symbol 31 for all else, then the high and the low byte of ``index`` as 16 bits,
two's complement.

With ``n`` lanes, columns ``n g`` to ``n g + n - 1`` of a row are one group, column ``n g + i`` is coded in lane ``i``.
Rows follow one another, groups within a row; within a group come the symbols of all lanes, then their raw bits, then
the high bytes, then the low bytes. A lane is a range coder (rANS, arXiv:1311.2540) with a state of 32 bits,
probabilities of 12 and refills of 16. The stream: the first state of each lane, uint32; then uint16 words in the order
they are read; all little-endian; then anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SYMBOLS, REACH, ESCAPE, TOTAL_BITS, LANES = 32, 15, 31, 12, 32
TOTAL = 1 << TOTAL_BITS
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Contexts:
    """``row (rows,)``, ``level (columns,)``, and what to shift their sum by; of each context frequencies and raw bits.

    ``frequency (n, 2, 32)``, ``low (n,)``.
    """

    row: Ints
    level: Ints
    shift: int
    frequency: Ints
    low: Ints

    def at(self, row: int, columns: slice) -> Ints:
        """The context of some columns of a row."""
        found: Ints = np.clip((self.row[row] + self.level[columns]) >> self.shift, 0, len(self.low) - 1)
        return found


def stages(codes: Ints, kinds: Ints, contexts: Contexts) -> tuple[Ints, Ints]:
    """Frequencies are looked up with the symbol ``(n,)``; the rest ``(n, 4)`` are values of 0 or ``bits`` raw bits.

    ``codes (n,)`` grid numbers of ``kinds (n,)``. Returns values and numbers of bits, ``(n, 4)``; column 0 is the
    symbol.
    """
    low, index = contexts.low[kinds], codes >> 1
    top = index >> low
    coded = contexts.frequency[kinds, codes & 1, np.clip(top, -REACH, REACH) + REACH] > 0
    escape = (abs(top) > REACH) | ~coded
    values = np.stack(
        [
            np.where(escape, ESCAPE, top + REACH),
            np.where(escape, 0, index & ((1 << low) - 1)),
            np.where(escape, (index >> 8) & 255, 0),
            np.where(escape, index & 255, 0),
        ],
        1,
    )
    bits = np.stack([np.zeros_like(low), np.where(escape, 0, low), escape * 8, escape * 8], 1)
    return values, bits


def encode(codes: Ints, contexts: Contexts, lanes: int) -> bytes:
    """The stream of ``codes (rows, columns)``. Raises ValueError for a symbol whose frequency is 0."""
    rows, columns = codes.shape
    frequency = contexts.frequency
    before = np.cumsum(frequency, 2) - frequency
    state = [1 << 16] * lanes
    words: list[int] = []

    def put(lane: int, f: int, c: int) -> None:
        x = state[lane]
        if x >= f << 20:
            words.append(x & 0xFFFF)
            x >>= 16
        state[lane] = (x // f << TOTAL_BITS) + x % f + c

    for row in range(rows - 1, -1, -1):
        for first in reversed(range(0, columns, max(lanes, 1))):
            here = slice(first, min(first + lanes, columns))
            kinds, unions = contexts.at(row, here), codes[row, here] & 1
            values, bits = stages(codes[row, here], kinds, contexts)
            for stage in (3, 2, 1):
                for lane in range(len(kinds) - 1, -1, -1):
                    count = int(bits[lane, stage])
                    if count:
                        put(lane, 1 << (TOTAL_BITS - count), int(values[lane, stage]) << (TOTAL_BITS - count))
            for lane in range(len(kinds) - 1, -1, -1):
                at = (kinds[lane], unions[lane], values[lane, 0])
                if not frequency[at] or not -32768 <= codes[row, first + lane] >> 1 < 32768:
                    raise ValueError("a grid number has no code")
                put(lane, int(frequency[at]), int(before[at]))
    return np.array(state, "<u4").tobytes() + np.array(words[::-1], "<u2").tobytes()


def decode(
    stream: NDArray[np.uint8], shape: tuple[int, int], contexts: Contexts, lanes: int, trellis: tuple[int, int, int]
) -> NDArray[np.int32]:
    """The inverse of :func:`encode`: grid numbers of ``shape``; ``trellis``: states and both polynomials.

    Raises ValueError when the stream ends early.
    """
    rows, columns = shape
    states, h0, h1 = trellis
    frequency, low = contexts.frequency, contexts.low
    before = np.cumsum(frequency, 2) - frequency
    symbol_of = np.array([[np.repeat(np.arange(SYMBOLS), row) for row in pair] for pair in frequency])
    words = np.frombuffer(stream.tobytes()[4 * lanes : len(stream) // 2 * 2], "<u2").astype(np.int64)
    x = np.frombuffer(stream.tobytes()[: 4 * lanes], "<u4").astype(np.int64)
    path = np.zeros(columns, np.int64)
    codes = np.empty(shape, np.int32)
    read = 0

    def step(who: Any, f: Any, c: Any) -> None:
        nonlocal read
        x[who] = f * (x[who] >> TOTAL_BITS) + (x[who] & (TOTAL - 1)) - c
        empty = who[x[who] < 1 << 16]
        if read + len(empty) > len(words):
            raise ValueError("the stream ends before its last symbol")
        x[empty] = x[empty] << 16 | words[read : read + len(empty)]
        read += len(empty)

    def raw(who: Any, bits: Any) -> Any:
        shift = TOTAL_BITS - bits
        value = (x[who] & (TOTAL - 1)) >> shift
        step(who, 1 << shift, value << shift)
        return value

    for row in range(rows):
        for first in range(0, columns, max(lanes, 1)):
            here = slice(first, min(first + lanes, columns))
            kinds, unions = contexts.at(row, here), path[here] & 1
            everyone = np.arange(len(kinds))
            symbols = symbol_of[kinds, unions, x[everyone] & (TOTAL - 1)]
            step(everyone, frequency[kinds, unions, symbols], before[kinds, unions, symbols])
            index = symbols - REACH
            more = ((low[kinds] > 0) & (symbols < ESCAPE)).nonzero()[0]
            if len(more):
                index[more] = (index[more] << low[kinds[more]]) + raw(more, low[kinds[more]])
            far = (symbols == ESCAPE).nonzero()[0]
            if len(far):
                high = raw(far, 8)
                index[far] = ((high << 8 | raw(far, 8)) ^ 32768) - 32768
            codes[row, here] = 2 * index + unions
            if states > 1:
                path[here] = path[here] >> 1 ^ unions * (h0 >> 1) ^ (index & 1) * (h1 >> 1)
    return codes
