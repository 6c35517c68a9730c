"""Operations of a step against their specification, at every level of instructions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from tersor.kernels import products_composed, reference_step, step

pytestmark = pytest.mark.skipif(not step.available, reason="products were not compiled")

TOKENS = 5
CONTEXT = 75


@pytest.fixture(params=["portable", "avx2", "avx512"], autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    from tersor.kernels import _products

    _products.limit_isa(request.param)
    yield request.param
    _products.limit_isa("avx512")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def both(build: Any, *buffers: Tensor, steps: tuple[int, ...] = (TOKENS, 1, 3)) -> list[tuple[Tensor, Tensor]]:
    """The buffers after a program's steps, of the compiled one and of the specification."""
    found = []
    for kind in (step.Program, reference_step.Program):
        copies = [buffer.clone() for buffer in buffers]
        program: Any = kind(TOKENS, CONTEXT)
        build(program, *copies)
        position = 0
        for n in steps:
            program.run(0, program.size, tokens=n, position=position)
            position += n
        found.append(copies)
    return list(zip(*found, strict=True))


def agree(pairs: list[tuple[Tensor, Tensor]], tolerance: float = 2e-6) -> None:
    for mine, spec in pairs:
        torch.testing.assert_close(mine, spec, rtol=tolerance, atol=tolerance * float(spec.abs().max() + 1e-9))


@pytest.mark.parametrize("width", [1, 7, 16, 33, 576])
@pytest.mark.parametrize("heads", [1, 3])
def test_norms(width: int, heads: int) -> None:
    x, weight, bias = torch.randn(TOKENS, heads * width), torch.randn(width), torch.randn(width)
    agree(both(lambda p, a, b: p.norm(a, b, weight, eps=1e-5), x, torch.zeros_like(x)))
    agree(both(lambda p, a: p.norm(a, a, weight, eps=1e-5), x, steps=(3,)))
    if width > 1:
        agree(
            both(lambda p, a, b: p.norm(a, b, weight, bias=bias, eps=1e-5, centred=True), x, torch.zeros_like(x)), 1e-5
        )


def test_a_row_of_zeros_stays_zero() -> None:
    x = torch.zeros(TOKENS, 40)
    ((mine, _),) = both(lambda p, a: p.norm(a, a, torch.ones(40), eps=1e-6), x)
    assert not mine.any()


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize(("dim", "rotary"), [(8, 8), (64, 64), (80, 80), (96, 72), (10, 6)])
def test_rope(dim: int, rotary: int, neighbours: bool) -> None:
    angles = torch.randn(CONTEXT, rotary)
    wide = torch.randn(TOKENS, 4 * dim)  # a view of some of its columns is rotated

    def build(program: Any, x: Tensor) -> None:
        program.rope(x[:, dim : 3 * dim], angles.cos(), angles.sin(), dim=dim, neighbours=neighbours)

    agree(both(build, wide))


@pytest.mark.parametrize("activation", step.ACTIVATIONS)
def test_gates(activation: str) -> None:
    x = torch.cat([torch.linspace(-100, 100, 61), torch.randn(40)]).repeat(TOKENS, 1)
    up = torch.randn(TOKENS, 101)
    agree(both(lambda p, a, b, c: p.gate(a, b, c, activation), x, up, torch.zeros_like(x)), 3e-6)


def test_sums_scales_caps_and_the_last_row() -> None:
    def build(program: Any, x: Tensor, y: Tensor, last: Tensor) -> None:
        program.add(x, y)
        program.scale(y, 0.3)
        program.soft_cap(y, 0.5)
        program.take_last(y, last)
        program.scale(last, 2.0)

    agree(both(build, torch.randn(TOKENS, 37), torch.randn(TOKENS, 37), torch.zeros(1, 37)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "group", "dim"), [(1, 1, 8), (3, 3, 64), (2, 6, 80), (1, 9, 100), (4, 2, 17)])
@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (4, 0.0), (20, 1.5)])
def test_attention(dtype: torch.dtype, heads: int, group: int, dim: int, window: int, cap: float) -> None:
    keys, values = step.make_cache(heads, CONTEXT, dim, dtype)
    inputs = [torch.randn(CONTEXT, n * dim) for n in (heads * group, heads, heads)]
    found = []
    for kind in (step.Program, reference_step.Program):
        q, k, v, y = (torch.empty(TOKENS, n * dim) for n in (heads * group, heads, heads, heads * group))
        program: Any = kind(TOKENS, CONTEXT)
        cache = {"keys": keys.clone(), "values": values.clone()}
        program.attention(q, k, v, y, **cache, scale=dim**-0.5, window=window, cap=cap)
        results, position = [], 0
        for n in (5, 5, 1, 1, 4, 5, 5, 1, 5, 5, 5, 5, 5, 5, 5, 5, 5, 3):
            for buffer, given in zip((q, k, v), inputs, strict=True):
                buffer[:n] = given[position : position + n]
            program.run(0, 1, tokens=n, position=position)
            results.append(y[:n].clone())
            position += n
        assert position == CONTEXT
        found.append(torch.cat(results))
    agree([(found[0], found[1])], 4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_left_from_another_text_are_not_touched(dtype: torch.dtype) -> None:
    keys, values = step.make_cache(2, CONTEXT, 8, dtype)
    q, k, v, y = (torch.randn(TOKENS, 16) for _ in range(4))
    program = step.Program(TOKENS, CONTEXT)
    program.attention(q, k, v, y, keys=keys, values=values, scale=1.0, window=0, cap=0.0)
    v[1:], k[1:] = torch.nan, torch.inf
    program.run(0, 1, tokens=3, position=0)
    program.run(0, 1, tokens=1, position=0)
    assert bool(y[0].isfinite().all())


def test_what_is_not_a_number_stays_so() -> None:
    program, x, y = step.Program(TOKENS, CONTEXT), torch.randn(TOKENS, 20), torch.ones(TOKENS, 20)
    x[0, 3] = torch.nan
    program.soft_cap(x, 30.0)
    program.run(0, 1, tokens=TOKENS, position=0)
    assert bool(x[0, 3].isnan())
    assert bool(x[0, 4:].isfinite().all())
    for activation in ("silu", "gelu_tanh"):
        gated, program = torch.ones(TOKENS, 20), step.Program(TOKENS, CONTEXT)
        program.gate(x, y, gated, activation)
        program.run(0, 1, tokens=TOKENS, position=0)
        assert bool(gated[0, 3].isnan())


def test_a_cache_takes_no_memory_before_it_is_used() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    keys, values = step.make_cache(8, 1 << 18, 64)
    assert keys.nbytes + values.nbytes == 2 * 8 * (1 << 18) * 64 * 4
    assert process.memory_info().rss - before < 50 << 20


def test_halves_are_rounded_to_nearest() -> None:
    """What a cache of float16 holds is what torch makes of the same numbers, subnormal and infinite ones included."""
    numbers = torch.cat(
        [torch.randn(20_000) * 10.0**power for power in (-8, -6, -5, 0, 3, 4.6)]
        + [torch.tensor([0.0, -0.0, 65519.9, 65520.0, 1e9, 2**-24, 2**-25, 2**-25 * 1.01, 6.1e-5])]
    )
    numbers = numbers[: len(numbers) // 8 * 8].view(1, -1)
    dim = numbers.shape[1]
    keys, values = step.make_cache(1, 1, dim, torch.float16)
    program = step.Program(1, 1)
    program.attention(numbers, numbers, numbers, torch.empty_like(numbers), keys=keys, values=values, scale=0.0)
    program.run(0, 1, tokens=1, position=0)
    assert torch.equal(keys[0, 0, :, 0].view(torch.int16), numbers[0].half().view(torch.int16))
    assert torch.equal(values[0, 0, 0, :dim].view(torch.int16), numbers[0].half().view(torch.int16))


def test_steps_of_any_length_and_threads_give_the_same_bits() -> None:
    heads, dim = 2, 32
    q, k = torch.randn(CONTEXT, 6 * dim), torch.randn(CONTEXT, heads * dim)
    results = []
    threads = torch.get_num_threads()
    for count, most in ((1, 1), (1, 32), (2, 32), (2, 1)):
        torch.set_num_threads(count)
        buffers = [torch.empty(most, n * dim) for n in (6, heads, heads, 6)]
        keys, values = step.make_cache(heads, CONTEXT, dim)
        program = step.Program(most, CONTEXT)
        program.attention(*buffers, keys=keys, values=values, scale=0.2)
        done = []
        for position in range(0, CONTEXT, most):
            n = min(most, CONTEXT - position)
            for buffer, given in zip(buffers, (q, k, k), strict=False):
                buffer[:n] = given[position : position + n]
            program.run(0, 1, tokens=n, position=position)
            done.append(buffers[3][:n].clone())
        results.append(torch.cat(done))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_products_of_the_same_inputs() -> None:
    from tersor.kernels import _products

    weights, bias = [torch.randn(rows, 40) for rows in (24, 7, 130)], torch.randn(24)
    made = [_products.dense(weight.numpy(), "fp32") for weight in weights]

    def build(program: Any, x: Tensor, y: Tensor, more: Tensor) -> None:
        ours = made if isinstance(program, step.Program) else weights
        program.products(x, (y[:, 3:27], ours[0], bias), (y[:, 27:34], ours[1], None), (more, ours[2], None))

    agree(both(build, torch.randn(TOKENS, 40), torch.zeros(TOKENS, 36), torch.zeros(TOKENS, 130)), 1e-5)


def test_what_does_not_fit_is_refused() -> None:
    program = step.Program(4, 20)
    x = torch.zeros(4, 16)
    keys, values = step.make_cache(1, 20, 8)
    with pytest.raises(ValueError, match="fewer than tokens"):
        program.add(x[:3], x)
    with pytest.raises(ValueError, match="as wide as"):
        program.add(x, torch.zeros(4, 17))
    with pytest.raises(ValueError, match="side by side"):
        program.scale(torch.zeros(16, 4).T, 1.0)
    with pytest.raises(ValueError, match="cannot work on"):
        program.norm(x, x, torch.ones(5), eps=0.0)
    with pytest.raises(ValueError, match="cannot be rotated"):
        program.rope(x, torch.zeros(20, 10), torch.zeros(20, 10), dim=8)
    with pytest.raises(ValueError, match="all 20 positions"):
        program.rope(x, torch.zeros(19, 8), torch.zeros(19, 8), dim=8)
    with pytest.raises(ValueError, match="shorter than the context"):
        program.attention(x, x[:, :8], x[:, :8], x, keys=keys[:, :1], values=values[:, :1], scale=1.0)
    with pytest.raises(ValueError, match="shared evenly"):
        program.attention(x[:, :12], x[:, :8], x[:, :8], x[:, :12], keys=keys, values=values, scale=1.0)
    weight = torch.randn(24, 16)
    dense = products_composed.dense(weight)
    with pytest.raises(ValueError, match="its 24 rows"):
        program.products(x, (torch.zeros(4, 23), dense, None))
    with pytest.raises(ValueError, match="its 16 columns"):
        program.products(x[:, :15], (torch.zeros(4, 24), dense, None))
    with pytest.raises(ValueError, match="for every output"):
        program.products(x, (torch.zeros(4, 24), dense, torch.zeros(23)))
    with pytest.raises(ValueError, match="for every product"):
        program.products(x)
    with pytest.raises(ValueError, match="an activation is"):
        program.gate(x, x, x, "swish")
    assert program.size == 0
    program.scale(x, 1.0)
    for tokens, position in ((0, 0), (5, 0), (2, 19), (1, -1)):
        with pytest.raises(ValueError):
            program.run(0, 1, tokens=tokens, position=position)
    with pytest.raises(ValueError, match="no such operations"):
        program.run(0, 2, tokens=1, position=0)
