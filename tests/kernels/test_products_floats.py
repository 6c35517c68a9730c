"""Products whose rows become floats against their torch specifications, at every level of instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs import GgufScalar, GgufVector, parse
from tersor.codecs.gguf_grids import GRIDS
from tersor.codecs.gguf_layout import KINDS
from tersor.codecs.lattice import patterns
from tersor.codecs.packing import packed_width
from tersor.kernels import products, products_floats, reference_floats
from tersor.kernels.products import Product

pytestmark = pytest.mark.skipif(not products.available, reason="nothing was compiled")
LEVELS = ("avx512", "avx2", "portable")


@pytest.fixture(autouse=True)
def _all_levels_again() -> Iterator[None]:
    yield
    products._products.limit_isa("avx512")


def check(made: Product, weight: Tensor, tokens: int, seed: int = 0, levels: tuple[str, ...] = LEVELS) -> None:
    """Weights to the bit; sums up to rounding, and the same bits for a token alone and for any number of threads."""
    columns = weight.shape[1]
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    wanted = x.double() @ weight.double().T
    room = 2.0**-22 * columns**0.5 * (x.double().abs() @ weight.double().abs().T) + 1e-30
    for level in levels:
        products._products.limit_isa(level)
        assert torch.equal(products.multiply(made, torch.eye(columns)), weight.T), level
        found = products.multiply(made, x)
        assert ((found - wanted).abs() <= room).all(), level
        alone = torch.cat([products.multiply(made, row[None]) for row in x])
        assert torch.equal(found, alone), level


def draw_codes(draw: torch.Generator, rows: int, count: int, bits: int) -> Tensor:
    return torch.randint(256, (rows, packed_width(count, bits)), generator=draw, dtype=torch.uint8)


@given(
    st.integers(1, 14), st.integers(1, 16), st.integers(1, 4), st.integers(1, 23), st.integers(1, 150),
    st.integers(1, 9), st.sampled_from(LEVELS),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_codebooks_of_any_shape(
    index: int, unit: int, stages: int, rows: int, count: int, tokens: int, level: str
) -> None:
    index = min(index, 30 // stages)
    draw = torch.Generator().manual_seed(rows * count)
    parts = {
        "codes": draw_codes(draw, rows, count, index * stages),
        "scale": torch.rand(rows, 1, generator=draw).half(),
        "book": torch.randn(stages, 2**index, unit, generator=draw).half(),
        "columns": count * unit,
    }
    weight = reference_floats.codebook(**parts)
    # A row of 900 and more columns is multiplied with its own stretches alone.
    if weight.shape[1] <= 900:
        check(products_floats.codebook(**parts), weight, tokens, levels=(level,))


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 24), (9, 200), (70, 264), (3, 520)])
def test_words_of_the_lattice(rows: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    scale = torch.rand(rows, 1, generator=draw).half()
    scale[0] = 2.0**-24  # a quarter of it is no float16
    parts = {"codes": draw_codes(draw, rows, columns // 8, 16), "scale": scale, "patterns": patterns()}
    for tokens in (1, 4, 9, 35):
        check(products_floats.e8p(**parts, columns=columns), reference_floats.e8p(**parts, columns=columns), tokens)


def blocks(name: str, rows: int, count: int) -> Tensor:
    """Any bytes, but for float16 numbers that are infinite or none."""
    kind = KINDS.get(name) or GRIDS[name]
    found = torch.randint(256, (rows, count, kind.nbytes), generator=torch.Generator().manual_seed(rows))
    start = 0
    for field in kind.fields:
        if field.what in ("d", "dmin", "-dmin"):
            found[:, :, start + 1] &= 0xBF
        start += field.nbytes
    return found.flatten(1).to(torch.uint8)


@pytest.mark.parametrize("name", [*KINDS, *GRIDS])
def test_blocks_of_bytes(name: str) -> None:
    codec = parse(name)
    assert isinstance(codec, GgufScalar | GgufVector)
    points = codec.kind.grid if isinstance(codec, GgufVector) else None
    for rows, count, tokens in ((1, 1, 1), (7, 3, 2), (5, 2, 9)):
        columns = codec.kind.block * count
        stored = blocks(name, rows, count)
        weight = codec.decode({"blocks": stored}, (rows, columns))
        check(products_floats.gguf(stored, name, columns, points), weight, tokens)
    with pytest.raises(ValueError, match="do not divide"):
        products_floats.gguf(stored, name, columns - 8, points)
    with pytest.raises(ValueError, match=f"rows of {name} have"):
        products_floats.gguf(stored[:, 1:], name, columns, points)
    if points is not None:
        with pytest.raises(ValueError, match="points of"):
            products_floats.gguf(stored, name, columns, points[1:])


def test_threads_change_nothing() -> None:
    draw = torch.Generator().manual_seed(1)
    book = torch.randn(1, 256, 4, generator=draw).half()
    made = products_floats.codebook(draw_codes(draw, 301, 64, 8), torch.ones(301, 1).half(), book, 256)
    x = torch.randn(70, 256, generator=draw)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = products.multiply(made, x)
        torch.set_num_threads(3)
        assert torch.equal(products.multiply(made, x), alone)
    finally:
        torch.set_num_threads(before)


BAD: list[tuple[str, Callable[[], object]]] = [
    ("take 32", lambda: products_floats.codebook(zeros(4, 31), halves(4), book(256, 4), 128)),
    ("do not divide", lambda: products_floats.codebook(zeros(4, 32), halves(4), book(256, 4), 130)),
    ("power of two", lambda: products_floats.codebook(zeros(4, 32), halves(4), book(250, 4), 128)),
    ("1 to 16 columns", lambda: products_floats.codebook(zeros(4, 4), halves(4), book(256, 32), 128)),
    ("1 to 30 bits", lambda: products_floats.codebook(zeros(4, 4), halves(4), book(256, 4, 4), 128)),
    ("3 scales for 4", lambda: products_floats.codebook(zeros(4, 32), halves(3), book(256, 4), 128)),
    ("take 16", lambda: products_floats.e8p(zeros(4, 15), halves(4), patterns(), 64)),
    ("do not divide", lambda: products_floats.e8p(zeros(4, 16), halves(4), patterns(), 60)),
    ("no product of the type q9_9", lambda: products_floats.gguf(zeros(1, 18), "q9_9", 32)),
    ("no product of the type q4_0", lambda: products_floats.gguf(zeros(1, 18), "q4_0", 32, torch.zeros(4, 4))),
    ("256 patterns", lambda: products_floats.e8p(zeros(4, 16), halves(4), patterns()[:9], 64)),
    ("0, 1 and 2", lambda: products_floats.e8p(zeros(4, 16), halves(4), patterns() + 1, 64)),
]


def zeros(rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width, dtype=torch.uint8)


def halves(rows: int) -> Tensor:
    return torch.ones(rows, 1, dtype=torch.float16)


def book(entries: int, unit: int, stages: int = 1) -> Tensor:
    return torch.zeros(stages, entries, unit, dtype=torch.float16)


@pytest.mark.parametrize(("says", "make"), BAD, ids=[f"{says}-{i}" for i, (says, _) in enumerate(BAD)])
def test_what_does_not_fit_is_refused(says: str, make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=says):
        make()
