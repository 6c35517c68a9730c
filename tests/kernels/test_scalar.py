"""The compiled loops against their plain torch specification, bit for bit where both do the same arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor import kernels
from tersor.contracts import ScalarGrid
from tersor.kernels import reference

needs_compiled = pytest.mark.skipif(not kernels.compiled, reason="the compiled kernels were not built")


def make_grid(rows: int, columns: int, group: int, kind: str, generator: torch.Generator) -> ScalarGrid:
    groups = -(-columns // group)
    scale = torch.rand(rows, groups, generator=generator) * 0.1 + 0.02
    if kind == "uniform":
        zero = torch.randint(0, 8, (rows, groups), generator=generator).float()
        return ScalarGrid(scale, zero, None, 8, group)
    if kind == "offset":  # scales of either sign
        signs = torch.randint(0, 2, (rows, groups), generator=generator) * 2.0 - 1.0
        offset = torch.randn(rows, groups, generator=generator)
        return ScalarGrid(scale * signs, torch.zeros(rows, groups), None, 8, group, offset)
    tables = groups if kind == "per group" else 1
    table = torch.randn(1 if kind == "shared" else rows, tables, 8, generator=generator).sort(dim=2).values
    return ScalarGrid(scale, None, table.flatten(1), 8, group)


@needs_compiled
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    group=st.sampled_from([8, 16, 70]),
    kind=st.sampled_from(["uniform", "offset", "shared", "per row", "per group"]),
    seed=st.integers(0, 2**31),
)
def test_sequential_round_equals_its_specification(rows: int, columns: int, group: int, kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = make_grid(rows, columns, group, kind, generator)
    target = torch.randn(rows, columns, generator=generator) * 0.3
    other = torch.randn(rows, columns, generator=generator) * 0.3
    mixing = torch.randn(columns, columns, generator=generator) * 0.2
    order = torch.randperm(columns, generator=generator)
    before = target.clone()
    compiled = kernels.sequential_round(target, other, mixing, grid, order)
    plain = reference.sequential_round(target, other, mixing, grid, order)
    assert torch.equal(target, before)
    for one, two in zip(compiled, plain, strict=True):
        assert torch.equal(one, two)


@needs_compiled
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 30),
    group=st.integers(1, 70),
    bits=st.integers(1, 8),
    asymmetric=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fit_uniform_is_as_good_as_its_specification(
    rows: int, group: int, bits: int, asymmetric: bool, shared: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, group, generator=generator)
    importance = torch.rand(1 if shared else rows, group, generator=generator) + 0.01
    shrinks = torch.linspace(0.4, 1.0, 9)
    losses = []
    for module in (kernels, reference):
        scale, zero = module.fit_uniform(weight, importance, levels=2**bits, asymmetric=asymmetric, shrinks=shrinks)
        assert (scale > 0).all()
        grid = ScalarGrid(scale[:, None], zero[:, None], None, 2**bits, group)
        _, values = kernels.nearest(weight, grid, torch.arange(group))
        losses.append((importance * (weight - values).square()).sum(1))
    # Sums run in another order, so near-ties may be decided differently; the loss is the same to rounding.
    assert torch.allclose(losses[0], losses[1], rtol=1e-4, atol=1e-9)


@needs_compiled
def test_mis_sized_buffers_are_refused() -> None:
    grid = ScalarGrid(torch.ones(4, 1), torch.zeros(4, 1), None, 8, 16)
    target = torch.zeros(4, 16)
    with pytest.raises((ValueError, TypeError)):
        kernels.sequential_round(target, torch.zeros(3, 16), torch.zeros(16, 16), grid, torch.arange(16))
    with pytest.raises((ValueError, TypeError)):
        kernels.sequential_round(target, target, torch.zeros(8, 8), grid, torch.arange(16))
    with pytest.raises((ValueError, TypeError)):
        kernels.sequential_round(target, target, torch.zeros(16, 16), grid, torch.arange(16) + 100)


def test_nearest_ties_and_clamps() -> None:
    grid = ScalarGrid(torch.ones(1, 1), torch.zeros(1, 1), None, 4, 4)
    codes, values = kernels.nearest(torch.tensor([[0.5, 1.5, -3.0, 9.0]]), grid, torch.arange(4))
    assert codes.tolist() == [[0, 2, 0, 3]]
    assert values.tolist() == [[0.0, 2.0, 0.0, 3.0]]


def test_torch_fallback_gives_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.codecs import parse
    from tersor.contracts import Gram, LeafCodec
    from tersor.solvers import CoordinateDescent

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    weight = torch.randn(12, 64, generator=generator)
    solver, codec = CoordinateDescent(), parse("int3:g32")
    assert isinstance(codec, LeafCodec)
    prepared = solver.prepare(Gram(x.T @ x / 400, 400))
    first = solver.solve(weight, codec, prepared)
    monkeypatch.setattr(kernels, "_cpu", None)
    second = solver.solve(weight, codec, prepared)
    assert (first.codes != second.codes).float().mean() < 0.02
