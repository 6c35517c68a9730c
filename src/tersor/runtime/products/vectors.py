"""Products of codecs with a code for several weights."""

from __future__ import annotations

from math import lcm

import torch

from tersor.codecs import E8P, Codebook, Pyramid
from tersor.codecs.lattice import patterns
from tersor.codecs.packing import pack
from tersor.codecs.pyramid import shapes
from tersor.codecs.wide import unpack_wide
from tersor.contracts import Shape
from tersor.kernels import products_floats
from tersor.kernels.products import Product
from tersor.runtime.products.pieces import pieces
from tersor.runtime.products.table import Parts, makes

_MOST = 256
"""Columns that are decoded to floats at one time."""


@makes(Codebook)
def _codebook(_codec: Codebook, parts: Parts, shape: Shape) -> Product:
    return products_floats.codebook(parts["codes"], parts["scale"], parts["codebook"], shape[1])


@makes(E8P)
def _lattice(_codec: E8P, parts: Parts, shape: Shape) -> Product:
    return products_floats.e8p(parts["codes"], parts["scale"], patterns(), shape[1])


@makes(Pyramid)
def _pyramid(codec: Pyramid, parts: Parts, shape: Shape) -> Product | None:
    """The numbers of shapes become their integers: counting to them takes too long to do for every token.

    That is 1.5 to 2.7 times what is stored; None where it would be more than three times, as with one bit a weight.
    """
    dim, pulses = codec.dim, codec.pulses
    bits = (2 * pulses).bit_length()
    if bits > 8 or bits * dim + 8 > 3 * codec.code_bits or lcm(dim, 16) > _MOST:
        return None
    codes, gains = [], []
    for rows in pieces(shape):
        number = unpack_wide(parts["codes"][rows], codec.code_bits, codec.spans(shape[1]))
        whole = shapes(number.flatten() >> 8, dim, pulses) + pulses
        codes.append(pack(whole.reshape(len(number), -1), bits))
        gains.append((number & 255).to(torch.uint8))
    return products_floats.pyramid(
        torch.cat(codes), torch.cat(gains), parts["scale"], bits=bits, dim=dim, middle=pulses
    )
