"""Products of floats and products made of others, against their torch specification, at every level of instructions."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.kernels import givens, products, products_composed, reference_composed

pytestmark = pytest.mark.skipif(not products.available, reason="nothing was compiled")
LEVELS = ("avx512", "avx2", "portable")
SIZES = [1, 2, 3, 7, 8, 15, 16, 24, 31, 32, 64, 96, 100, 144, 301, 576]


@pytest.fixture(autouse=True)
def _all_levels_again() -> Iterator[None]:
    yield
    products._products.limit_isa("avx512")


def weight_of(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(tokens: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def check(product: products.Product, x: Tensor, wanted: Tensor, weight: Tensor, share: float = 4e-7) -> None:
    """All levels within the rounding of float32 sums: ``share`` of what all terms of one sign would come to, a term."""
    bound = x.abs().amax(1, keepdim=True) * weight.float().abs().sum(1) * x.shape[1] ** 0.5
    for level in LEVELS:
        products._products.limit_isa(level)
        found = products.multiply(product, x)
        assert ((found - wanted).abs() <= share * bound + 1e-30).all(), level
        # A token's outputs are the same bits whatever other tokens there are.
        assert torch.equal(products.multiply(product, x[-1:]), found[-1:]), level


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.sampled_from(SIZES),
    tokens=st.integers(1, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**31),
)
def test_dense(rows: int, columns: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    weight, x = weight_of(rows, columns, seed, dtype), inputs(tokens, columns)
    check(products_composed.dense(weight), x, reference_composed.dense(weight, x), weight)


def test_every_float16_is_itself() -> None:
    bits = torch.arange(0, 0x7C00, dtype=torch.int32)
    weight = torch.cat([bits, bits + 0x8000]).to(torch.uint16).view(torch.float16)[:, None]
    product = products_composed.dense(weight)
    values = torch.zeros(1, 1)
    values[0, 0] = 1.0
    for level in LEVELS:
        products._products.limit_isa(level)
        assert torch.equal(products.multiply(product, values)[0], weight[:, 0].float()), level


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 300),
    columns=st.sampled_from(SIZES),
    count=st.integers(0, 400),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_sparse(rows: int, columns: int, count: int, tokens: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=draw).half()
    places = torch.randint(columns, (count,), generator=draw).to(torch.int32).to(torch.uint16)
    cuts = torch.randint(count + 1, (rows - 1,), generator=draw).sort().values
    starts = torch.cat([torch.zeros(1), cuts, torch.tensor([count])]).to(torch.int32)
    x = inputs(tokens, columns)
    wanted = reference_composed.sparse(values, places, starts, x)
    product = products_composed.sparse(values, places, starts, columns)
    bound = values.float().abs().sum() * x.abs().max()
    for level in LEVELS:
        products._products.limit_isa(level)
        assert ((products.multiply(product, x) - wanted).abs() <= 1e-6 * bound + 1e-30).all()


@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("seed", [0, 7])
def test_rotated_inputs_are_the_same_bits(columns: int, seed: int) -> None:
    inner, x = weight_of(5, columns), inputs(3, columns)
    product = products_composed.rotated(products_composed.dense(inner), seed)
    check(product, x, reference_composed.rotated(inner, x, seed), inner)
    # With an inner weight of ones on the diagonal what comes out are the rotated inputs themselves.
    one = products_composed.rotated(products_composed.dense(torch.eye(columns)), seed)
    assert torch.equal(products.multiply(one, x), reference_composed.rotate(x, seed))


@pytest.mark.parametrize(("blocks", "size"), [(1, 2), (3, 2), (1, 5), (40, 4), (6, 16), (1, 33), (2, 64)])
def test_turned_inputs_are_the_same_bits(blocks: int, size: int) -> None:
    columns = blocks * size
    draw = torch.Generator().manual_seed(2)
    angles = torch.randint(-128, 128, (blocks, givens.count(size)), generator=draw, dtype=torch.int8)
    inner, x = weight_of(5, columns), inputs(3, columns)
    product = products_composed.turned(products_composed.dense(inner), angles)
    check(product, x, reference_composed.turned(inner, x, angles), inner)
    one = products_composed.turned(products_composed.dense(torch.eye(columns)), angles)
    assert torch.equal(products.multiply(one, x), givens.turn(x, angles))


@settings(deadline=None, max_examples=30)
@given(columns=st.sampled_from(SIZES), tokens=st.integers(1, 5), threads=st.integers(1, 3), seed=st.integers(0, 99))
def test_compositions(columns: int, tokens: int, threads: int, seed: int) -> None:
    x = inputs(tokens, columns, seed)
    first, second = weight_of(6, columns, seed), weight_of(9, columns, seed + 1)
    more, after = weight_of(6, columns, seed + 2), weight_of(4, 6, seed + 3)
    a, b, c, d = (products_composed.dense(weight) for weight in (first, second, more, after))
    factor = torch.rand(columns, generator=torch.Generator().manual_seed(seed))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(products_composed.scaled(a, factor), x, reference_composed.scaled(first, x, factor), first)
        check(
            products_composed.stacked([a, b]),
            x,
            reference_composed.stacked([first, second], x),
            torch.cat([first, second]),
        )
        check(products_composed.total([a, c]), x, reference_composed.total([first, more], x), first.abs() + more.abs())
        nested = products_composed.stacked([products_composed.total([a, c]), b])
        wanted = torch.cat([reference_composed.total([first, more], x), reference_composed.dense(second, x)], 1)
        check(nested, x, wanted, torch.cat([first.abs() + more.abs(), second]))
        check(
            products_composed.chain(a, d), x, reference_composed.chain(first, after, x), after.abs() @ first.abs(), 2e-6
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("columns", [2, 3, 17, 64])
def test_columns_of_two_weights(columns: int) -> None:
    x = inputs(4, columns)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(3))
    own = [order[: columns // 2], order[columns // 2 :]]
    weights = [weight_of(7, len(numbers), seed) for seed, numbers in enumerate(own)]
    product = products_composed.side_by_side([products_composed.dense(weight) for weight in weights], own)
    assert (product.rows, product.columns) == (7, columns)
    check(product, x, reference_composed.side_by_side(weights, own, x), torch.cat(weights, 1))


def test_a_product_keeps_what_it_is_made_of_alive() -> None:
    def made() -> products.Product:
        parts = [products_composed.dense(weight_of(4096, 64, seed)) for seed in range(2)]
        return products_composed.rotated(products_composed.stacked(parts), 3)

    product, x = made(), inputs(2, 64)
    torch.randn(4096, 64)
    inner = torch.cat([weight_of(4096, 64, seed) for seed in range(2)])
    check(product, x, reference_composed.rotated(inner, x, 3), inner)


WIDE, NARROW = weight_of(4, 8), weight_of(4, 6)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda pair: products_composed.stacked([*pair]), "different numbers of columns"),
        (lambda pair: products_composed.stacked([*pair][:0]), "no products"),
        (lambda pair: products_composed.total([*pair]), "different numbers of columns"),
        (lambda pair: products_composed.total([*pair][:0]), "no products"),
        (lambda pair: products_composed.chain(pair[0], pair[0]), "4 inputs do not go with"),
        (lambda pair: products_composed.scaled(pair[0], torch.ones(9)), "9 inputs"),
        (lambda pair: products_composed.turned(pair[1], torch.zeros(2, 4, dtype=torch.int8)), "angles"),
        (lambda pair: products_composed.side_by_side([pair[0]], [torch.arange(1, 9)]), "input 8"),
        (lambda pair: products_composed.side_by_side([pair[0]], [torch.arange(7)]), "7 inputs"),
        (lambda pair: products_composed.side_by_side([pair[0]], []), "list of inputs"),
        (lambda pair: products.multiply(pair[0], torch.zeros(1, 7)), "7 columns"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[..., object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        make((products_composed.dense(WIDE), products_composed.dense(NARROW)))


@pytest.mark.parametrize(
    ("starts", "places", "what"),
    [([0, 3, 2], [0, 1, 2], "row 1"), ([0, 1, 4], [0, 1, 2], "row 1"), ([-1, 1, 3], [0, 1, 2], "before"),
     ([0, 1, 3], [0, 1, 9], "value 2 is in column 9"), ([0, 1, 2], [0, 1], "for every value")],
)  # fmt: skip
def test_broken_sparse_weights_are_refused(starts: list[int], places: list[int], what: str) -> None:
    values = torch.ones(3, dtype=torch.float16)
    with pytest.raises(ValueError, match=what):
        products_composed.sparse(
            values, torch.tensor(places).to(torch.uint16), torch.tensor(starts, dtype=torch.int32), 9
        )
