"""Products of codecs that hold codes or floats of their own."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tersor.codecs import (
    BinaryPlanes,
    Dense,
    Integer,
    LookupTable,
    MicroFloat,
    NvFloat,
    RowFloat,
    SignedInteger,
    SmallFloat,
    Sparse,
    Ternary,
    Trellis,
)
from tersor.codecs.packing import pack, unpack
from tersor.codecs.trellis_tables import TABLES
from tersor.contracts import Shape
from tersor.kernels import products, products_composed, products_trellis
from tersor.kernels.products import Product
from tersor.kernels.products_trellis import TrellisCode
from tersor.runtime.products.others import integers
from tersor.runtime.products.pieces import pieces
from tersor.runtime.products.table import Parts, makes

_STEP = 4
"""Columns of groups that loops over codes take are multiples of this."""
_MOST_COLUMNS = 1 << 16


def _takes(group: int | None) -> bool:
    return group is None or group % _STEP == 0


@makes(Integer, SignedInteger)
def _integer(codec: Integer | SignedInteger, parts: Parts, shape: Shape) -> Product:
    if not _takes(codec.group):
        return integers(codec, parts, shape[1])
    levels = 2**codec.bits_per_code
    return products.row_codes(
        parts["codes"],
        bits=codec.bits_per_code,
        columns=shape[1],
        group=codec.group,
        scale=parts["scale"],
        super_scale=parts.get("super"),
        zero=parts.get("zero"),
        middle=levels / 2 if isinstance(codec, SignedInteger) else (levels - 1) / 2,
    )


@makes(LookupTable)
def _lookup(codec: LookupTable, parts: Parts, shape: Shape) -> Product | None:
    if codec.group is not None:
        return None  # loops over codes have one table a row
    return products.row_codes(
        parts["codes"], bits=codec.bits_per_code, columns=shape[1], group=None, scale=None, table=parts["table"]
    )


@makes(SmallFloat, MicroFloat, NvFloat)
def _small_float(codec: SmallFloat, parts: Parts, shape: Shape) -> Product | None:
    if not _takes(codec.group):
        return None
    if isinstance(codec, MicroFloat):
        # Powers of two, and float8 times one, are exact in bfloat16: two bytes a group beside the stored one.
        number = parts["exponent"].to(torch.int32) - 127
        scale = torch.ldexp(torch.ones_like(number, dtype=torch.float32), number).to(torch.bfloat16)
    elif isinstance(codec, NvFloat):
        scale = parts["scale"].contiguous().view(torch.float8_e4m3fn).to(torch.float32) * 2.0**-codec.shift
        scale = scale.to(torch.bfloat16)
    else:
        scale = parts["scale"]
    return products.row_codes(
        parts["codes"],
        bits=codec.bits_per_code,
        columns=shape[1],
        group=codec.group,
        scale=scale,
        super_scale=parts.get("super"),
        table=_by_code(codec.bits_per_code, codec.exponent),
    )


@makes(RowFloat)
def _row_float(codec: RowFloat, parts: Parts, shape: Shape) -> Product | None:
    """Scales as float16; where some are too small for it to hold them exactly, powers, and a table for every row."""
    if not _takes(codec.group):
        return None
    table, row = _by_code(codec.bits_per_code, codec.exponent), parts["super"].to(torch.float32)
    power = codec.powers(parts["shift"], shape[1])
    scale = (row * power).to(torch.float16)
    if not torch.equal(scale.to(torch.float32), row * power):
        scale, table = power.to(torch.bfloat16), row * table
    return products.row_codes(
        parts["codes"], bits=codec.bits_per_code, columns=shape[1], group=codec.group, scale=scale, table=table
    )


@lru_cache(maxsize=16)
def _by_code(bits: int, exponent: int) -> Tensor:
    """Values of small floats in the order of their stored codes, ``(1, 2^bits)``, as decoding has them."""
    plain = SmallFloat(bits, exponent=exponent)
    return plain.table()[plain.from_stored(torch.arange(2**bits)).long()][None]


@makes(Ternary)
def _ternary(codec: Ternary, parts: Parts, shape: Shape) -> Product | None:
    """Digits of base 3 become codes of two bits."""
    if not _takes(codec.group):
        return None
    packed = []
    for rows in pieces(shape):
        mine = {name: part[rows] for name, part in parts.items()}
        packed.append(pack(codec.unpack(mine, (len(mine["codes"]), shape[1])).codes, 2))
    return products.row_codes(
        torch.cat(packed),
        bits=2,
        columns=shape[1],
        group=codec.group,
        scale=parts["scale"],
        super_scale=parts.get("super"),
        middle=1.0,
    )


@makes(BinaryPlanes)
def _planes(codec: BinaryPlanes, parts: Parts, shape: Shape) -> Product | None:
    """A plane by itself is used as it is stored; of several, each gets codes of one bit."""
    if not _takes(codec.group):
        return None
    count = codec.bits_per_code
    found = []
    for plane in range(count):
        codes = parts["codes"]
        if count > 1:
            own = [pack(unpack(codes[rows], count, shape[1]) >> plane & 1, 1) for rows in pieces(shape)]
            codes = torch.cat(own)
        product = products.row_codes(
            codes,
            bits=1,
            columns=shape[1],
            group=codec.group,
            scale=parts["scale"][:, plane::count],
            super_scale=parts.get("super"),
            table=torch.tensor([codec.choices(plane)]),
        )
        found.append(product)
    return products_composed.total(found) if count > 1 else found[0]


@makes(Trellis)
def _trellis(codec: Trellis, parts: Parts, shape: Shape) -> Product:
    code = _trellis_code(codec.bits_per_code, codec.window)
    return products_trellis.trellis(parts["codes"], parts["scale"], code, tile=codec.tile(shape[0]), columns=shape[1])


@lru_cache(maxsize=32)
def _trellis_code(bits: int, window: int) -> TrellisCode:
    masks, unit, integers = TABLES[bits, window]
    return TrellisCode(bits, window, tuple(masks), tuple(integers), unit / 4096)


@makes(Dense)
def _dense(_codec: Dense, parts: Parts, _shape: Shape) -> Product:
    return products_composed.dense(parts["weight"])


@makes(Sparse)
def _sparse(codec: Sparse, parts: Parts, shape: Shape) -> Product | None:
    """Columns of 16 bits and starts of rows are made of the stored places; wider layers have no such product."""
    if shape[1] > _MOST_COLUMNS:
        return None
    columns, starts = codec.rows_of(parts, shape)
    return products_composed.sparse(
        parts["values"], columns.to(torch.int32).to(torch.uint16), starts.to(torch.int32), shape[1]
    )
