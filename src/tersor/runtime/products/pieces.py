"""Stretches of rows, where stored codes are packed in another way."""

from __future__ import annotations

from tersor.contracts import Shape

_CODES = 1 << 22


def pieces(shape: Shape) -> list[slice]:
    """Stretches of rows with few enough columns to be unpacked at one time."""
    step = max(_CODES // shape[1], 1)
    return [slice(start, start + step) for start in range(0, shape[0], step)]
