"""The blocks of llama.cpp's tensor types: which bits of which byte hold what (ggml-common.h; gguf's quants.py).

A block of ``block`` weights has a float16 ``d`` and codes, and by type a float16 ``dmin`` and small integers that scale
both for each ``group`` of its weights:

``weight = (code − zero) · (d · step) − dmin · low``, or ``table[code] · (d · step)``,

in float32 and in this order, where a type without ``step`` or ``low`` has 1 for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_CURVED = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_POWERS = (81, 27, 9, 3, 1)


@dataclass(frozen=True)
class Field:
    """A stretch of a block's bytes: ``bits`` of each of some numbers, from bit ``shift`` on.

    Numbers lie in runs of ``stride``: byte ``i`` of a run holds numbers ``i``, ``i + stride``, ``i + 2·stride``, … of
    it, the first in the lowest bits. ``what``: ``codes``, ``step``, ``low``, ``both`` (all steps, then all lows), or
    one of the forms that are not planes of bits: ``d``, ``dmin``, ``-dmin``, ``six`` and ``digits``. ``signed``: bytes
    are int8, of numbers less this one.
    """

    what: str
    nbytes: int
    bits: int = 8
    stride: int = 1
    shift: int = 0
    signed: int = 0


@dataclass(frozen=True)
class Kind:
    """One type. ``steps``, ``lows``: least and greatest, None where there are none; numbers are kept from 0 up.

    ``offset``: whether values have a subtrahend. ``fields``: in the order of their bytes. A step counts as
    ``(number + shift) · factor``.
    """

    name: str
    block: int
    group: int
    levels: int
    zero: int
    fields: tuple[Field, ...]
    steps: tuple[int, int] | None = None
    lows: tuple[int, int] | None = None
    offset: bool = False
    table: tuple[int, ...] | None = None
    shift: float = 0.0
    factor: float = 1.0

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest step."""
        assert self.steps is not None
        return (self.steps[0] + self.shift) * self.factor, (self.steps[1] + self.shift) * self.factor

    def nearest_step(self, wanted: Tensor) -> Tensor:
        """The nearest steps that there are."""
        assert self.steps is not None
        return ((wanted / self.factor - self.shift).round_().clamp_(*self.steps) + self.shift) * self.factor

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return sum(field.nbytes for field in self.fields)

    @property
    def groups(self) -> int:
        """Groups in a block."""
        return self.block // self.group


_D, _DMIN, _SUM, _SIX = Field("d", 2), Field("dmin", 2), Field("-dmin", 2), Field("six", 12)
_NIBBLES, _FIFTH = Field("codes", 16, 4, 16), Field("codes", 4, 1, 1, shift=4)
_TWOS, _HIGHEST = Field("codes", 64, 2, 32), Field("codes", 32, 1, 32, shift=4)

KINDS = {
    kind.name: kind
    for kind in (
        # Code 0, which would be -128, is read but not written: some engines negate int8.
        Kind("q8_0", 32, 32, 255, 127, (_D, Field("codes", 32, signed=127))),
        Kind("q4_0", 32, 32, 16, 8, (_D, _NIBBLES)),
        Kind("q4_1", 32, 32, 16, 0, (_D, _SUM, _NIBBLES), offset=True),
        Kind("q5_0", 32, 32, 32, 16, (_D, _FIFTH, _NIBBLES)),
        Kind("q5_1", 32, 32, 32, 0, (_D, _SUM, _FIFTH, _NIBBLES), offset=True),
        Kind("iq4_nl", 32, 32, 16, 0, (_D, _NIBBLES), table=_CURVED),
        Kind("q2_k", 256, 16, 4, 0, (Field("both", 16, 4, 16), _TWOS, _D, _DMIN), (0, 15), (0, 15), offset=True),
        Kind(
            "q3_k", 256, 16, 8, 4,
            (Field("codes", 32, 1, 32, shift=2), _TWOS, Field("step", 8, 4, 8), Field("step", 4, 2, 4, shift=4), _D),
            (-32, 31),
        ),
        Kind("q4_k", 256, 32, 16, 0, (_D, _DMIN, _SIX, Field("codes", 128, 4, 32)), (0, 63), (0, 63), offset=True),
        Kind(
            "q5_k", 256, 32, 32, 0, (_D, _DMIN, _SIX, _HIGHEST, Field("codes", 128, 4, 32)), (0, 63), (0, 63),
            offset=True,
        ),
        Kind(
            "q6_k", 256, 16, 64, 32,
            (Field("codes", 128, 4, 64), Field("codes", 64, 2, 32, shift=4), Field("step", 16, signed=128), _D),
            (-128, 127),
        ),
        Kind(
            "iq4_xs", 256, 32, 16, 0,
            (_D, Field("step", 2, 2, 1, shift=4), Field("step", 4, 4, 1), Field("codes", 128, 4, 16)),
            (-32, 31), table=_CURVED,
        ),
        Kind("tq1_0", 256, 256, 3, 1, (Field("digits", 52), _D)),
        Kind("tq2_0", 256, 256, 3, 1, (_TWOS, _D)),
    )
}  # fmt: skip


def read(kind: Kind, blocks: Tensor) -> dict[str, Tensor]:
    """What blocks ``(n, nbytes)`` uint8 hold.

    ``codes (n, block)`` int32, which others' bytes may put outside the levels; ``d (n, 1)`` and, where the type has
    them, ``dmin (n, 1)``, ``step`` and ``low (n, groups)``, all float32.
    """
    found: dict[str, Tensor] = {}
    start = 0
    for field in kind.fields:
        stream = blocks[:, start : start + field.nbytes]
        start += field.nbytes
        if field.what in ("d", "dmin", "-dmin"):
            number = stream.contiguous().view(torch.float16).to(torch.float32)
            found[field.what.lstrip("-")] = -number if field.what[0] == "-" else number
        elif field.what == "six":
            found["step"], found["low"] = _read_six(stream)
        elif field.what == "digits":
            found["codes"] = _read_digits(stream)
        else:
            planes = unfold(stream, field.bits, field.stride)
            part = (planes.view(torch.int8) if field.signed else planes).to(torch.int32) + field.signed
            pieces = dict(zip(("step", "low"), part.chunk(2, 1), strict=True)) if field.what == "both" else None
            for name, piece in (pieces or {field.what: part}).items():
                found[name] = found.get(name, 0) + (piece << field.shift)
    for name, range_ in (("step", kind.steps), ("low", kind.lows)):
        if range_ is not None:
            found[name] = (found[name] + range_[0]).to(torch.float32)
    return found


def write(kind: Kind, numbers: Mapping[str, Tensor]) -> Tensor:
    """The inverse of :func:`read`: blocks ``(n, nbytes)`` uint8."""
    whole = {"codes": numbers["codes"].to(torch.int32)}
    for name, range_ in (("step", kind.steps), ("low", kind.lows)):
        if range_ is not None:
            whole[name] = numbers[name].to(torch.int32) - range_[0]
    streams = []
    for field in kind.fields:
        if field.what in ("d", "dmin", "-dmin"):
            number = numbers[field.what.lstrip("-")]
            half = (-number if field.what[0] == "-" else number).to(torch.float16)
            streams.append(half.contiguous().view(torch.uint8))
        elif field.what == "six":
            streams.append(_write_six(whole["step"], whole["low"]))
        elif field.what == "digits":
            streams.append(_write_digits(whole["codes"]))
        else:
            what = torch.cat([whole["step"], whole["low"]], 1) if field.what == "both" else whole[field.what]
            part = (what - field.signed >> field.shift) & (2**field.bits - 1)
            streams.append(fold(part, field.bits, field.stride))
    return torch.cat(streams, 1)


def unfold(stream: Tensor, bits: int, stride: int) -> Tensor:
    """Numbers ``(n, m · 8 / bits)`` uint8 from bytes ``(n, m)`` that hold them in runs of ``stride``."""
    if bits == 8:
        return stream
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stream.device)
    runs = stream.reshape(len(stream), stream.shape[1] // stride, 1, stride)
    numbers: Tensor = (runs >> shifts[:, None]) & (2**bits - 1)
    return numbers.flatten(1)


def fold(numbers: Tensor, bits: int, stride: int) -> Tensor:
    """The inverse of :func:`unfold`: bytes uint8 from numbers ``(n, k)`` int32."""
    each = 8 // bits
    runs = numbers.reshape(len(numbers), numbers.shape[1] // (each * stride), each, stride)
    return (runs << torch.arange(0, 8, bits)[:, None]).sum(2).to(torch.uint8).flatten(1)


def _read_six(stream: Tensor) -> tuple[Tensor, Tensor]:
    """Eight steps and eight lows of 6 bits in 12 bytes; the upper four have their top bits in others' bytes."""
    first, second, third = stream.to(torch.int32).chunk(3, 1)
    step = torch.cat([first & 63, third & 15 | first >> 6 << 4], 1)
    low = torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)
    return step, low


def _write_six(step: Tensor, low: Tensor) -> Tensor:
    first = step[:, :4] | step[:, 4:] >> 4 << 6
    second = low[:, :4] | low[:, 4:] >> 4 << 6
    third = step[:, 4:] & 15 | (low[:, 4:] & 15) << 4
    return torch.cat([first, second, third], 1).to(torch.uint8)


def _read_digits(stream: Tensor) -> Tensor:
    """256 digits to the base 3: a byte is a fraction of 256 whose first digit is that of ``byte · 3 / 256``."""
    pieces = []
    for low, high, digits, width in ((0, 32, 5, 32), (32, 48, 5, 16), (48, 52, 4, 4)):
        powers = torch.tensor(_POWERS[::-1][:digits], dtype=torch.int32, device=stream.device)
        runs = stream[:, low:high].to(torch.int32).reshape(len(stream), (high - low) // width, 1, width)
        turned = runs * powers[:, None] & 0xFF
        pieces.append((turned * 3 >> 8).flatten(1))
    return torch.cat(pieces, 1)


def _write_digits(codes: Tensor) -> Tensor:
    pieces = []
    for low, high, digits, width in ((0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4)):
        powers = torch.tensor(_POWERS[:digits], dtype=torch.int32)
        number = (
            codes[:, low:high].reshape(len(codes), (high - low) // (digits * width), digits, width) * powers[:, None]
        ).sum(2)
        pieces.append(((number * 256 + 242) // 243).flatten(1))
    return torch.cat(pieces, 1).to(torch.uint8)
