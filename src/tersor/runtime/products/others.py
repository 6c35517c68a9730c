"""Products of blocks, of n:m sparsity, and of stacks of signs; and of groups that loops over codes do not take."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from tersor.codecs import BitStack, Block, Dense, Integer, SemiStructured, SignedInteger
from tersor.codecs.inner import under
from tersor.codecs.packing import unpack
from tersor.codecs.semi_structured import subsets
from tersor.contracts import Codec, Shape
from tersor.kernels import products, products_composed, products_floats
from tersor.kernels.products import Product
from tersor.runtime.products.table import Parts, makes

_MOST = 256
"""Columns that are decoded to floats at one time."""


@makes(Block)
def _block(codec: Block, parts: Parts, shape: Shape) -> Product:
    """A scale for each row and group where nothing is shifted; grids of blocks else."""
    rows, columns = shape
    tile, width = codec.tile(rows), codec.width(columns)
    middle = 2.0 ** (codec.bits_per_code - 1)
    if codec.float_scale:
        scale = parts["scale"]
    else:
        number = parts["exponent"].to(torch.int32) - 127
        # Powers of two are exact in bfloat16.
        scale = torch.ldexp(torch.ones_like(number, dtype=torch.float32), number).to(torch.bfloat16)
    if not codec.shift and (width == columns or width % 4 == 0):
        return products.row_codes(
            parts["codes"],
            bits=codec.bits_per_code,
            columns=columns,
            group=width,
            scale=scale.repeat_interleave(tile, 0)[:rows],
            middle=middle,
        )
    scale = scale.to(torch.float32)
    zero = torch.full_like(scale, middle)
    if codec.shift:
        zero = zero + 128.0 - parts["shift"].to(torch.float32)
    return products_floats.grid(parts["codes"], scale, zero, bits=codec.bits_per_code, columns=columns, tile=tile)


def integers(codec: Integer | SignedInteger, parts: Parts, columns: int) -> Product:
    """Integers with groups of any number of columns."""
    scale = parts["scale"].to(torch.float32)
    if "super" in parts:
        scale = scale * parts["super"].to(torch.float32)
    levels = 2**codec.bits_per_code
    middle = levels / 2 if isinstance(codec, SignedInteger) else (levels - 1) / 2
    zero = torch.full_like(scale, middle)
    if "zero" in parts:
        zero = unpack(parts["zero"], codec.bits_per_code, scale.shape[1]).to(torch.float32)
    return products_floats.grid(parts["codes"], scale, zero, bits=codec.bits_per_code, columns=columns)


@makes(SemiStructured)
def _sparse(codec: SemiStructured, parts: Parts, shape: Shape) -> Product | None:
    """Of kept floats and integers, which are decoded row by row; other codecs inside have no such product."""
    inner = _row_by_row(codec.inner, under(parts, "v_"), (shape[0], codec.width(shape[1])))
    if inner is None or codec.group * 16 // gcd(codec.group, 16) > _MOST:
        return None
    return products_floats.spread(parts["patterns"], _patterns(codec), codec.group, inner)


def _row_by_row(codec: Codec, parts: Parts, shape: Shape) -> Product | None:
    if isinstance(codec, Dense):
        return products_floats.kept(parts["weight"])
    if isinstance(codec, Integer | SignedInteger):
        return integers(codec, parts, shape[1])
    return None


def _patterns(codec: SemiStructured) -> Tensor:
    """Columns by pattern, ``(2^bits, kept)``; numbers that no pattern has stand for the last one, as in decoding."""
    known = subsets(codec.kept, codec.group)
    return known[torch.arange(2**codec.pattern_bits).clamp(max=len(known) - 1)]


@makes(BitStack)
def _stack(codec: BitStack, parts: Parts, _shape: Shape) -> Product:
    signs, left, right = ([parts[f"{name}{s}"] for s in range(codec.stages)] for name in ("signs", "left", "right"))
    product = products_floats.magnitudes(signs, left, right)
    return product if codec.plain else products_composed.scaled(product, parts["scale"])
