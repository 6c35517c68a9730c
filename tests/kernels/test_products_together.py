"""Products of the same inputs in one operation: the same bits as one by one, whatever they share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tersor.codecs.packing import pack
from tersor.codecs.trellis import Trellis
from tersor.codecs.trellis_tables import TABLES
from tersor.kernels import products, products_composed, products_floats, products_trellis, step
from tersor.kernels.products import Product
from tersor.kernels.products_trellis import TrellisCode

pytestmark = pytest.mark.skipif(not step.available, reason="products were not compiled")
COLUMNS = 384


@pytest.fixture(params=["portable", "avx2", "avx512"], autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    from tersor.kernels import _products

    _products.limit_isa(request.param)
    yield request.param
    _products.limit_isa("avx512")


def row_codes(rows: int, bits: int, group: int, draw: torch.Generator) -> Product:
    codes = pack(torch.randint(2**bits, (rows, COLUMNS), generator=draw, dtype=torch.int32), bits)
    scale = (torch.rand(rows, COLUMNS // group, generator=draw) + 0.1).half()
    return products.row_codes(codes, bits=bits, columns=COLUMNS, group=group, scale=scale, middle=2.0 ** (bits - 1))


def trellis(rows: int, bits: int, draw: torch.Generator) -> Product:
    codes, scale = Trellis(bits, 10).parts((rows, COLUMNS))
    masks, unit, integers = TABLES[bits, 10]
    return products_trellis.trellis(
        torch.randint(256, codes.shape, generator=draw, dtype=torch.uint8),
        (torch.rand(scale.shape, generator=draw) + 0.1).half(),
        TrellisCode(bits, 10, masks, integers, unit / 4096),
        tile=Trellis(bits, 10).tile(rows),
        columns=COLUMNS,
    )


def no_steps(draw: torch.Generator) -> Product:
    return products_composed.total([row_codes(20, 3, 32, draw), row_codes(20, 2, 32, draw)])


def all_kinds() -> list[Product]:
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(256, (30, COLUMNS // 4), generator=draw, dtype=torch.uint8)
    dense = products_composed.dense(torch.randn(70, COLUMNS, generator=draw))
    return [
        row_codes(100, 4, 32, draw),
        products_composed.rotated(trellis(300, 2, draw), 5),
        row_codes(33, 4, 32, draw),
        row_codes(40, 4, 64, draw),  # groups of another size
        products_composed.rotated(trellis(256, 3, draw), 5),
        products_composed.rotated(trellis(64, 3, draw), 6),  # another rotation
        trellis(61, 2, draw),  # not a whole number of bytes to a column
        products_composed.rotated(dense, 5),
        dense,
        no_steps(draw),
        products_composed.stacked([row_codes(9, 2, 128, draw), products_composed.rotated(trellis(128, 2, draw), 5)]),
        products_floats.codebook(codes, torch.ones(30, 1).half(), torch.randn(1, 256, 4, generator=draw), COLUMNS),
        products_floats.codebook(codes, torch.ones(30, 1).half(), torch.randn(2, 16, 4, generator=draw), COLUMNS),
        products_floats.codebook(codes, torch.ones(30, 1).half(), torch.randn(1, 64, 3, generator=draw), COLUMNS),
        products_composed.stacked(
            [
                row_codes(9, 4, 32, draw),
                products_composed.total([row_codes(20, 3, 32, draw), row_codes(20, 2, 32, draw)]),
            ]
        ),
        products_composed.rotated(products_composed.total([row_codes(20, 3, 32, draw), row_codes(20, 2, 32, draw)]), 5),
        products_composed.scaled(row_codes(50, 8, 32, draw), torch.rand(COLUMNS, generator=draw) + 0.5),
    ]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_together_as_alone(tokens: int, threads: int) -> None:
    found, before = all_kinds(), torch.get_num_threads()
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(4))
    outputs = [torch.full((tokens, product.rows + 3), 7.0) for product in found]
    program = step.Program(tokens, 8)
    program.products(x, *((y[:, : product.rows], product, None) for y, product in zip(outputs, found, strict=True)))
    torch.set_num_threads(threads)
    try:
        program.run(0, 1, tokens=tokens, position=0)
    finally:
        torch.set_num_threads(before)
    for y, product in zip(outputs, found, strict=True):
        assert torch.equal(y[:, : product.rows], products.multiply(product, x))
        assert bool((y[:, product.rows :] == 7.0).all())
