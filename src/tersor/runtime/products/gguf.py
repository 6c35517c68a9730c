"""Products of llama.cpp's tensor types: on the bytes of their blocks, or on codes row by row that say the same."""

from __future__ import annotations

import torch

from tersor.codecs import GgufScalar, GgufVector
from tersor.codecs.packing import pack
from tersor.contracts import Shape
from tersor.kernels import products, products_floats
from tersor.kernels.products import Product
from tersor.runtime.products.pieces import pieces
from tersor.runtime.products.table import Parts, makes

_AS_ROWS = {"q4_0": 4, "q5_0": 5, "q8_0": 8, "iq4_nl": 4, "tq1_0": 2, "tq2_0": 2}
"""Types with nothing but a float16 scale for each block, and the bits of a code. Loops over codes row by row are five
times as fast as those over blocks. Types with scales in two levels, or with offsets in float16, are no such codes."""


@makes(GgufScalar)
def _scalar(codec: GgufScalar, parts: Parts, shape: Shape) -> Product:
    bits = _AS_ROWS.get(codec.name)
    if bits is None:
        return products_floats.gguf(parts["blocks"], codec.name, shape[1])
    kind = codec.kind
    # Code -1, which q8_0 can have, becomes 0.
    least = 1 if codec.name == "q8_0" else 0
    codes, scale = [], []
    for rows in pieces(shape):
        blocks = parts["blocks"][rows]
        found = codec.unpack({"blocks": blocks}, (len(blocks), shape[1]))
        codes.append(pack(found.codes + least, bits))
        scale.append(found.side["d"].to(torch.float16))
    table = None if kind.table is None else torch.tensor([kind.table], dtype=torch.float32)
    return products.row_codes(
        torch.cat(codes),
        bits=bits,
        columns=shape[1],
        group=kind.block,
        scale=torch.cat(scale),
        middle=float(kind.zero + least),
        table=table,
    )


@makes(GgufVector)
def _vector(codec: GgufVector, parts: Parts, shape: Shape) -> Product:
    return products_floats.gguf(parts["blocks"], codec.name, shape[1], codec.kind.grid)
