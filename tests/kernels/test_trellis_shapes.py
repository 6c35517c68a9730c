"""Trellis codes of any map, any tile and any shape: how they are stored, and what their products give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs.trellis_tables import TABLES
from tersor.kernels import products, products_trellis
from tersor.kernels.products_trellis import TrellisCode
from tersor.kernels.reference_trellis import columns_apart, interleave

needs_compiled = pytest.mark.skipif(not products.available, reason="nothing was compiled")
LEVELS = ("avx512", "avx2", "portable")


@pytest.fixture(autouse=True)
def _all_levels_again() -> Iterator[None]:
    yield
    if products.available:
        products._products.limit_isa("avx512")


def _drawn(bits: int, window: int, index_bits: int, draw: torch.Generator) -> TrellisCode:
    """A code whose masks take any bits of the window, with a table of any integers."""
    masks = torch.randint(1 << window, (index_bits,), generator=draw)
    masks[0] = (1 << window) - 1
    integers = torch.randint(-128, 128, (1 << index_bits,), generator=draw)
    return TrellisCode(bits, window, tuple(masks.tolist()), tuple(integers.tolist()), 2.0**-7)


def _stored(bits: int, tile: int, rows: int, columns: int, draw: torch.Generator) -> Tensor:
    """Codes whose padding holds anything."""
    size = 3 if bits == 3 else 1
    width = -(-tile * bits // (8 * size)) * size
    return torch.randint(256, (-(-rows // tile), -(-columns // 4), width, 4), generator=draw, dtype=torch.uint8)


@needs_compiled
@given(
    seed=st.integers(0, 2**31),
    bits=st.integers(1, 4),
    window=st.integers(8, 16),
    index_bits=st.integers(1, 8),
    # Where rows fill no byte, only the last tile may have loops with wide vectors, or only those before it.
    tile=st.one_of(st.integers(1, 256), st.integers(1, 32).map(lambda eighth: 8 * eighth)),
    rows=st.integers(1, 600),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 10),
    rounded=st.sampled_from((8, 16)),
)
@settings(max_examples=100, deadline=None)
def test_any_map_tile_and_shape(
    seed: int, bits: int, window: int, index_bits: int, tile: int, rows: int, columns: int, tokens: int, rounded: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    code = _drawn(bits, window, min(index_bits, (6, 6, 7, 8)[bits - 1]), draw)
    rows = min(rows, 6 * tile)
    codes, scale = _stored(bits, tile, rows, columns, draw), torch.rand(rows, 1, generator=draw).half()
    x = torch.randn(tokens, columns, generator=draw)
    wanted = products_trellis.product(codes, scale, code, x, tile=tile, bits=rounded)
    made = products_trellis.trellis(codes, scale, code, tile=tile, columns=columns)
    for level in LEVELS:
        products._products.limit_isa(level)
        assert torch.equal(products.multiply(made, x, bits=rounded), wanted), level
    numbers = torch.randint(rows, (5,), generator=draw)
    found = products.read_rows(made, numbers)
    assert found is not None
    weight = products_trellis.weight(codes, scale, code, tile=tile, columns=columns)
    assert torch.allclose(found, weight[numbers], rtol=1e-6, atol=0)


@needs_compiled
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("key", sorted(TABLES))
def test_every_bit_of_a_stream_counts_where_it_should(key: tuple[int, int], level: str) -> None:
    # One bit of a stream of zeros reaches the rows of its window and no others: across bytes, units, vectors of units
    # and the seam, in rings of fewer units than a vector has, and of one unit.
    masks, unit, integers = TABLES[key]
    code = TrellisCode(*key, masks, integers, unit / 4096)
    products._products.limit_isa(level)
    for tile in (8, 72, 136):
        stream = torch.eye(tile * key[0], dtype=torch.uint8)[None]  # a column for every bit
        streams = (
            (stream.reshape(1, len(stream[0]), -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(3).to(torch.uint8)
        )
        codes, columns, scale = interleave(streams, key[0]), streams.shape[1], torch.ones(tile, 1).half()
        made = products_trellis.trellis(codes, scale, code, tile=tile, columns=columns)
        wanted = products_trellis.weight(codes, scale, code, tile=tile, columns=columns)
        assert torch.allclose(products.multiply(made, torch.eye(columns)).T, wanted, rtol=1e-6, atol=0)


@given(
    bits=st.integers(1, 4),
    tiles=st.integers(1, 3),
    columns=st.integers(1, 9),
    tile=st.integers(1, 40),
    seed=st.integers(0),
)
@settings(max_examples=40, deadline=None)
def test_bytes_are_where_the_specification_says(bits: int, tiles: int, columns: int, tile: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed % 2**31)
    length = -(-tile * bits // 8)
    streams = torch.randint(1, 256, (tiles, columns, length), generator=draw, dtype=torch.uint8)
    stored = interleave(streams, bits)
    thirds = 3 if bits == 3 else 1
    units = -(-tile * bits // (8 * thirds))
    assert stored.shape == (tiles, -(-columns // 4), thirds * units, 4)
    for c in range(columns):
        for y in range(length):
            assert torch.equal(stored[:, c // 4, y % thirds * units + y // thirds, c % 4], streams[:, c, y])
    assert int((stored > 0).sum()) == streams.numel()  # all else is 0
    assert torch.equal(columns_apart(stored, bits, columns, length), streams)
