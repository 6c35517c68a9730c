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
from tersor.codecs.lattice import patterns as lattice_patterns
from tersor.codecs.packing import pack, packed_width
from tersor.codecs.semi_structured import subsets
from tersor.kernels import products, products_composed, products_floats, reference_floats
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
        some = torch.arange(len(weight)).flip(0)
        assert torch.equal(products.read_rows(made, some), weight[some]), level
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
    parts = {"codes": draw_codes(draw, rows, columns // 8, 16), "scale": scale, "patterns": lattice_patterns()}
    for tokens in (1, 4, 9, 35):
        check(products_floats.e8p(**parts, columns=columns), reference_floats.e8p(**parts, columns=columns), tokens)


@pytest.mark.parametrize("bits", range(1, 9))
def test_grids_of_blocks(bits: int) -> None:
    for rows, columns, groups, tile in ((1, 1, 1, 1), (9, 35, 5, 4), (6, 264, 44, 1), (5, 300, 1, 9)):
        draw = torch.Generator().manual_seed(bits)
        sides = [torch.rand(-(-rows // tile), groups, generator=draw) for _ in range(2)]
        codes = draw_codes(draw, rows, columns, bits)
        made = products_floats.grid(codes, *sides, bits=bits, columns=columns, tile=tile)
        check(made, reference_floats.grid(codes, *sides, bits=bits, columns=columns, tile=tile), 3)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 2), (3, 5), (1, 8), (7, 16), (8, 16), (4, 7), (1, 3)])
def test_some_weights_of_each_group(kept: int, group: int) -> None:
    known = subsets(kept, group)
    bits = (len(known) - 1).bit_length()
    known = known[torch.arange(2**bits).clamp(max=len(known) - 1)]
    for rows, groups in ((1, 1), (6, 16), (9, 67)):
        draw = torch.Generator().manual_seed(rows)
        patterns = draw_codes(draw, rows, groups, bits)
        for dtype in (torch.float16, torch.bfloat16):
            inner = torch.randn(rows, groups * kept, generator=draw).to(dtype)
            made = products_floats.spread(patterns, known, group, products_floats.kept(inner))
            check(made, reference_floats.spread(patterns, known, group, inner.float()), 2)
        # Vectors that begin where a group does, and a scale for each row.
        if groups * kept % 8 == 0:
            words, scale = draw_codes(draw, rows, groups * kept // 8, 16), torch.rand(rows, 1, generator=draw).half()
            inside = reference_floats.e8p(words, scale, patterns=lattice_patterns(), columns=groups * kept)
            if group * 8 <= 32:
                product = products_floats.e8p(words, scale, lattice_patterns(), groups * kept)
                made = products_floats.spread(patterns, known, group, product)
                check(made, reference_floats.spread(patterns, known, group, inside), 2)


@pytest.mark.parametrize(("stages", "rank"), [(1, 1), (2, 4), (3, 16)])
def test_signs_of_magnitudes(stages: int, rank: int) -> None:
    for rows, columns in ((1, 1), (7, 31), (9, 290)):
        draw = torch.Generator().manual_seed(rank)
        signs = [draw_codes(draw, rows, columns, 1) for _ in range(stages)]
        left = [torch.randn(rows, rank, generator=draw).half() for _ in range(stages)]
        right = [torch.randn(rank, columns, generator=draw).half() for _ in range(stages)]
        weight = reference_floats.magnitudes(signs, left, right)
        for tokens in (1, 6):
            check(products_floats.magnitudes(signs, left, right), weight, tokens)


@pytest.mark.parametrize(("dim", "middle"), [(2, 1), (16, 7), (24, 11), (28, 3), (15, 20), (48, 2)])
def test_pyramids(dim: int, middle: int) -> None:
    bits = (2 * middle).bit_length()
    for rows, vectors in ((1, 1), (6, 5), (9, 19)):
        draw = torch.Generator().manual_seed(dim)
        whole = torch.randint(1, 2 * middle + 1, (rows, dim * vectors), generator=draw)
        whole[:, ::dim] = 0
        parts = {
            "codes": pack(whole, bits),
            "gains": torch.randint(256, (rows, vectors), generator=draw, dtype=torch.uint8),
            "scale": torch.rand(rows, 1, generator=draw).half(),
        }
        sizes = {"bits": bits, "dim": dim, "middle": middle}
        check(products_floats.pyramid(**parts, **sizes), reference_floats.pyramid(**parts, **sizes), 3)


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


PAIRS = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 3]])
BAD: list[tuple[str, Callable[[], object]]] = [
    ("take 32", lambda: products_floats.codebook(zeros(4, 31), halves(4), book(256, 4), 128)),
    ("do not divide", lambda: products_floats.codebook(zeros(4, 32), halves(4), book(256, 4), 130)),
    ("power of two", lambda: products_floats.codebook(zeros(4, 32), halves(4), book(250, 4), 128)),
    ("1 to 16 columns", lambda: products_floats.codebook(zeros(4, 4), halves(4), book(256, 32), 128)),
    ("1 to 30 bits", lambda: products_floats.codebook(zeros(4, 4), halves(4), book(256, 4, 4), 128)),
    ("3 scales for 4", lambda: products_floats.codebook(zeros(4, 32), halves(3), book(256, 4), 128)),
    ("take 16", lambda: products_floats.e8p(zeros(4, 15), halves(4), lattice_patterns(), 64)),
    ("do not divide", lambda: products_floats.e8p(zeros(4, 16), halves(4), lattice_patterns(), 60)),
    ("no product of the type q9_9", lambda: products_floats.gguf(zeros(1, 18), "q9_9", 32)),
    ("no product of the type q4_0", lambda: products_floats.gguf(zeros(1, 18), "q4_0", 32, torch.zeros(4, 4))),
    ("must be .4, 3., not", lambda: products_floats.grid(zeros(4, 4), ones(4, 2), ones(4, 2), bits=3, columns=8)),
    (
        "scales must be .2, 2.",
        lambda: products_floats.grid(zeros(4, 3), ones(3, 2), ones(2, 2), bits=3, columns=8, tile=2),
    ),
    ("scales must be .4, 4.", lambda: products_floats.grid(zeros(4, 3), ones(4, 3), ones(4, 3), bits=3, columns=8)),
    ("1 to 8 bits", lambda: products_floats.grid(zeros(4, 9), ones(4, 1), ones(4, 1), bits=9, columns=8)),
    (
        "patterns must be .4, 1.",
        lambda: products_floats.spread(zeros(4, 3), PAIRS, 4, products_floats.kept(halves(4, 8))),
    ),
    ("outside of its group", lambda: products_floats.spread(zeros(4, 2), PAIRS, 3, products_floats.kept(halves(4, 8)))),
    ("fill no groups", lambda: products_floats.spread(zeros(4, 2), PAIRS, 4, products_floats.kept(halves(4, 7)))),
    ("row by row", lambda: products_floats.spread(zeros(4, 2), PAIRS, 4, products_composed.dense(halves(4, 8)))),
    ("power of two", lambda: products_floats.spread(zeros(4, 2), PAIRS[:3], 4, products_floats.kept(halves(4, 8)))),
    ("signs must be .4, 2.", lambda: products_floats.magnitudes([zeros(4, 1)], [ones(4, 3)], [ones(3, 9)])),
    ("right factors must be", lambda: products_floats.magnitudes([zeros(4, 2)], [ones(4, 3)], [ones(2, 9)])),
    ("each stage", lambda: products_floats.magnitudes([zeros(4, 2)] * 2, [ones(4, 3)], [ones(3, 9)])),
    (
        "codes must be .4, 8.",
        lambda: products_floats.pyramid(zeros(4, 7), zeros(4, 2), halves(4), bits=4, dim=8, middle=7),
    ),
    (
        "gains must be .4, 2.",
        lambda: products_floats.pyramid(zeros(4, 8), zeros(3, 2), halves(4), bits=4, dim=8, middle=7),
    ),
    (
        "256 are the most",
        lambda: products_floats.pyramid(zeros(4, 17), zeros(4, 2), halves(4), bits=4, dim=17, middle=7),
    ),
    ("256 patterns", lambda: products_floats.e8p(zeros(4, 16), halves(4), lattice_patterns()[:9], 64)),
    ("0, 1 and 2", lambda: products_floats.e8p(zeros(4, 16), halves(4), lattice_patterns() + 1, 64)),
]


def zeros(rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width, dtype=torch.uint8)


def ones(rows: int, width: int) -> Tensor:
    return torch.ones(rows, width)


def halves(rows: int, width: int = 1) -> Tensor:
    return torch.ones(rows, width, dtype=torch.float16)


def book(entries: int, unit: int, stages: int = 1) -> Tensor:
    return torch.zeros(stages, entries, unit, dtype=torch.float16)


@pytest.mark.parametrize(("says", "make"), BAD, ids=[f"{says}-{i}" for i, (says, _) in enumerate(BAD)])
def test_what_does_not_fit_is_refused(says: str, make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=says):
        make()
