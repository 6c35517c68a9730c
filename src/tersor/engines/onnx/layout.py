"""Which of our codecs are integers on a grid that ONNX operators read, and their bytes taken apart and put together.

No code, scale or zero point is changed on the way: the operators compute ``(code − zero) · scale`` as our decoders do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersor.codecs.gguf_scalar import GgufScalar
from tersor.codecs.integer import Integer
from tersor.codecs.packing import pack, packed_width, unpack
from tersor.codecs.signed import SignedInteger
from tersor.contracts import Codec, Encoded, Shape

Zero = Literal["stored", "middle", "half"]
Pieces = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtypes and shapes of a layer's tensors, by name."""
_SCALES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_GGUF = {"q4_0": (4, 0), "q8_0": (8, 1)}
"""Bits, and how far our positions in the list of values lie below codes with a zero of ``2^(bits − 1)``."""
_GGUF_BLOCK = 32
_PIECE = 1 << 22
"""Weights that are unpacked at a time."""


@dataclass(frozen=True)
class Grid:
    """Integers of ``bits`` bits, a scale for every ``group`` columns of a row (None: the whole row).

    ``zero``: an integer for each group; ``2^(bits − 1)`` for all (``middle``); or half a step below (``half``).
    """

    bits: int
    group: int | None
    zero: Zero
    scale: torch.dtype

    def groups(self, in_features: int) -> int:
        return in_features // (self.group or in_features)

    def pieces(self, shape: Shape) -> Pieces:
        """What :func:`take_apart` gives: dtypes and shapes by name."""
        rows, columns = shape
        groups = self.groups(columns)
        found: Pieces = {
            "codes": (torch.uint8, (rows, packed_width(columns, self.bits))),
            "scale": (self.scale, (rows, groups)),
        }
        if self.zero == "stored":
            found["zero"] = (torch.uint8, (rows, packed_width(groups, self.bits)))
        return found


def grid_of(codec: Codec) -> Grid | None:
    """The grid of a codec; None for those that are no integers on one."""
    if isinstance(codec, Integer) and codec.scales in _SCALES:
        zero: Zero = "stored" if codec.asymmetric else "half"
        return Grid(codec.bits_per_code, codec.group, zero, _SCALES[codec.scales])
    if isinstance(codec, SignedInteger) and codec.activations == 16:
        return Grid(codec.bits_per_code, codec.group, "middle", _SCALES[codec.scales])
    if isinstance(codec, GgufScalar) and codec.name in _GGUF:
        return Grid(_GGUF[codec.name][0], _GGUF_BLOCK, "middle", torch.float16)
    return None


def take_apart(codec: Codec, tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """A layer's stored tensors as ``codes (out, bytes)``, ``scale (out, groups)`` and, where stored, ``zero``."""
    if not isinstance(codec, GgufScalar):
        return dict(tensors)
    columns, grid = shape[1], grid_of(codec)
    assert grid is not None
    made = {name: torch.empty(size, dtype=dtype) for name, (dtype, size) in grid.pieces(shape).items()}
    for here in _spans(shape):
        found = codec.unpack({"blocks": tensors["blocks"][here]}, (here.stop - here.start, columns))
        made["codes"][here] = pack(found.codes + _GGUF[codec.name][1], grid.bits)
        made["scale"][here] = found.side["d"].to(torch.float16)
    return made


def put_together(codec: Codec, pieces: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The inverse of :func:`take_apart`, bit for bit."""
    if not isinstance(codec, GgufScalar):
        return dict(pieces)
    columns, grid = shape[1], grid_of(codec)
    assert grid is not None
    (part,) = codec.parts(shape)
    blocks = torch.empty(part.shape, dtype=part.dtype)
    for here in _spans(shape):
        codes = unpack(pieces["codes"][here], grid.bits, columns) - _GGUF[codec.name][1]
        side = {"d": pieces["scale"][here].to(torch.float32)}
        blocks[here] = codec.pack(Encoded(codes, side), (here.stop - here.start, columns))["blocks"]
    return {part.name: blocks}


def _spans(shape: Shape) -> list[slice]:
    rows, columns = shape
    step = max(_PIECE // columns, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
