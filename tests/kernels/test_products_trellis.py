"""Products with trellis codes against their torch specification, at every level of instructions."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs.trellis import WINDOWS, Trellis
from tersor.codecs.trellis_tables import TABLES
from tersor.kernels import products, products_trellis
from tersor.kernels.products_trellis import TrellisCode

pytestmark = pytest.mark.skipif(not products.available, reason="nothing was compiled")
LEVELS = ("avx512", "avx2", "portable")
CODES = [(bits, window) for bits in WINDOWS for window in WINDOWS[bits]]


@pytest.fixture(autouse=True)
def _all_levels_again() -> Iterator[None]:
    yield
    products._products.limit_isa("avx512")


def _code(bits: int, window: int) -> TrellisCode:
    masks, unit, integers = TABLES[bits, window]
    return TrellisCode(bits, window, masks, integers, unit / 4096)


def _tensors(seed: int, bits: int, window: int, rows: int, columns: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    codes, scale = Trellis(bits, window).parts((rows, columns))
    return {
        "codes": torch.randint(256, codes.shape, generator=draw, dtype=torch.uint8),
        "scale": (torch.rand(scale.shape, generator=draw) + 0.1).half(),
    }


def _inputs(seed: int, tokens: int, columns: int) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = 25.0
    return x


@pytest.mark.parametrize(("bits", "window"), CODES)
def test_equals_the_specification_to_the_bit(bits: int, window: int) -> None:
    code = _code(bits, window)
    # Whole tiles, two tiles of 192 rows and one of fewer, bits that fill no byte, rings shorter than a window.
    for rows, columns, tokens in ((256, 132, 1), (576, 70, 3), (100, 37, 9), (500, 5, 2), (3, 9, 1), (1, 1, 1)):
        tile = Trellis(bits, window).tile(rows)
        stored = _tensors(rows, bits, window, rows, columns)
        x = _inputs(columns, tokens, columns)
        for rounded in (8, 16):
            wanted = products_trellis.product(**stored, code=code, x=x, tile=tile, bits=rounded)
            for level in LEVELS:
                products._products.limit_isa(level)
                made = products_trellis.trellis(**stored, code=code, tile=tile, columns=columns)
                assert torch.equal(products.multiply(made, x, bits=rounded), wanted), (level, rows)


@given(
    st.sampled_from(CODES),
    st.integers(1, 700),
    st.integers(1, 300),
    st.integers(1, 64),
    st.integers(1, 32),
    st.sampled_from(LEVELS),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_and_any_tile(
    known: tuple[int, int], rows: int, columns: int, tokens: int, eighth: int, level: str
) -> None:
    code, tile = _code(*known), 8 * eighth
    draw = torch.Generator().manual_seed(rows)
    stored = (-(-rows // tile), -(-columns // 4), tile * code.bits // 8, 4)
    codes = torch.randint(256, stored, generator=draw, dtype=torch.uint8)
    scale = torch.rand(rows, 1, generator=draw).half()
    x = _inputs(columns, tokens, columns)
    products._products.limit_isa(level)
    made = products_trellis.trellis(codes, scale, code, tile=tile, columns=columns)
    assert torch.equal(products.multiply(made, x), products_trellis.product(codes, scale, code, x, tile=tile))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("bits", "window"), [(1, 16), (2, 12), (3, 10), (4, 10)])
def test_unit_vectors_give_the_decoded_weight(bits: int, window: int, level: str) -> None:
    codec = Trellis(bits, window)
    stored = _tensors(0, bits, window, 300, 40)
    decoded = codec.decode_rows(stored, (300, 40), slice(None))
    products._products.limit_isa(level)
    made = products_trellis.trellis(**stored, code=_code(bits, window), tile=codec.tile(300), columns=40)
    found = products.multiply(made, torch.eye(40)).T
    assert torch.allclose(found, decoded, rtol=1e-6, atol=0)
    weight = products_trellis.weight(**stored, code=_code(bits, window), tile=codec.tile(300), columns=40)
    assert torch.allclose(weight, decoded, rtol=1e-6, atol=0)


def test_threads_and_company_change_nothing() -> None:
    # Two tiles and many columns: those are shared out as well. More columns than may be summed up in 32 bits.
    for rows, columns in ((512, 5000), (8, 33000)):
        stored = _tensors(1, 2, 12, rows, columns)
        tile = Trellis(2, 12).tile(rows)
        made = products_trellis.trellis(**stored, code=_code(2, 12), tile=tile, columns=columns)
        x = _inputs(2, 5, columns)
        threads = torch.get_num_threads()
        try:
            found = []
            for count in (1, 3):
                torch.set_num_threads(count)
                found.append(products.multiply(made, x))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(*found)
        assert torch.equal(products.multiply(made, x[3:4]), found[0][3:4])


def test_the_extremes_of_inputs_and_tables_do_not_overflow() -> None:
    code = TrellisCode(2, 8, (1, 2, 4, 8, 16), (-128, 127) * 16, 1.0)
    codes = torch.zeros(1, 10000, 64, 4, dtype=torch.uint8)
    scale = torch.ones(256, 1).half()
    x = torch.full((1, 40000), -3.0)
    wanted = products_trellis.product(codes, scale, code, x, tile=256)
    for level in LEVELS:
        products._products.limit_isa(level)
        made = products_trellis.trellis(codes, scale, code, tile=256, columns=40000)
        assert torch.equal(products.multiply(made, x), wanted)


@pytest.mark.parametrize("level", LEVELS)
def test_zeros_and_what_is_not_finite(level: str) -> None:
    stored = _tensors(3, 4, 10, 64, 64)
    products._products.limit_isa(level)
    made = products_trellis.trellis(**stored, code=_code(4, 10), tile=64, columns=64)
    x = _inputs(0, 4, 64)
    alone = products.multiply(made, x[1:2])
    x[0], x[2, 5], x[3, 5] = 0.0, torch.inf, torch.nan
    found = products.multiply(made, x)
    assert torch.equal(found[0], torch.zeros(64))
    assert torch.equal(found[1:2], alone)
    assert found[2:].isnan().all()


def test_codes_are_kept_alive() -> None:
    stored = _tensors(4, 2, 12, 512, 512)
    x = _inputs(0, 1, 512)
    wanted = products_trellis.product(**stored, code=_code(2, 12), x=x, tile=256)
    copies = (stored["codes"].clone(), stored["scale"].clone())
    made = products_trellis.trellis(*copies, _code(2, 12), tile=256, columns=512)
    del copies
    gc.collect()
    others = [torch.full_like(stored["codes"], 255) for _ in range(4)]
    assert torch.equal(products.multiply(made, x), wanted)
    del others


def test_refuses_what_does_not_fit() -> None:
    stored, code = _tensors(5, 2, 12, 64, 32), _code(2, 12)
    masks, _, integers = TABLES[2, 12]
    for codes, tile, given_code, said in (
        (stored["codes"][:, :, :-1], 64, code, "not 1 of 8 of 15 by 4"),
        (stored["codes"][:, :-1], 64, code, "32 columns are 1 tiles of 8 groups"),
        (stored["codes"][..., :-1], 64, code, "by 4 bytes, not 1 of 8 of 16 by 3"),
        (stored["codes"], 32, code, "2 tiles of 8 groups of 8 by 4"),
        (stored["codes"], 257, code, "1 to 256 rows"),
        (stored["codes"], 64, TrellisCode(5, 12, masks, integers, 1.0), "1 to 4 bits"),
        (stored["codes"], 64, TrellisCode(2, 17, masks, integers, 1.0), "8 to 16 bits"),
        (stored["codes"], 64, TrellisCode(2, 12, masks, integers[:-1], 1.0), "at most 64 values"),
        (stored["codes"], 64, TrellisCode(2, 12, (*masks[:-1], 1 << 12), integers, 1.0), "beyond the window"),
    ):
        with pytest.raises(ValueError, match=said):
            products_trellis.trellis(codes, stored["scale"], given_code, tile=tile, columns=32)
    made = products_trellis.trellis(**stored, code=code, tile=64, columns=32)
    with pytest.raises(ValueError, match="33 columns, the weight 32"):
        products.multiply(made, torch.zeros(1, 33))


@pytest.mark.parametrize("level", LEVELS)
def test_tiles_whose_rings_fill_no_bytes(level: str) -> None:
    code, tile, rows = _code(1, 8), 10, 18
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(256, (2, 3, 2, 4), generator=draw, dtype=torch.uint8)
    scale, x = torch.rand(rows, 1, generator=draw).half(), _inputs(4, 3, 12)
    products._products.limit_isa(level)
    made = products_trellis.trellis(codes, scale, code, tile=tile, columns=12)
    assert torch.equal(products.multiply(made, x), products_trellis.product(codes, scale, code, x, tile=tile))
