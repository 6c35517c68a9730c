"""Products of codecs with a code for several weights."""

from __future__ import annotations

from tersor.codecs import E8P, Codebook
from tersor.codecs.lattice import patterns
from tersor.contracts import Shape
from tersor.kernels import products_floats
from tersor.kernels.products import Product
from tersor.runtime.products.table import Parts, makes


@makes(Codebook)
def _codebook(_codec: Codebook, parts: Parts, shape: Shape) -> Product:
    return products_floats.codebook(parts["codes"], parts["scale"], parts["codebook"], shape[1])


@makes(E8P)
def _lattice(_codec: E8P, parts: Parts, shape: Shape) -> Product:
    return products_floats.e8p(parts["codes"], parts["scale"], patterns(), shape[1])
