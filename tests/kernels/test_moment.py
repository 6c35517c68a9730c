"""Second moments of inputs, and scales of signed integers: compiled loops against their plain torch specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor import kernels
from tersor.codecs import parse
from tersor.codecs.signed import _REACHES, SignedInteger
from tersor.kernels import reference

needs_compiled = pytest.mark.skipif(not kernels.compiled, reason="the compiled kernels were not built")


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 600),
    columns=st.sampled_from([1, 7, 8, 15, 16, 17, 47, 48, 49, 96, 100, 131]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_moments_are_those_of_float64(tokens: int, columns: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, columns, generator=generator) * torch.logspace(-3, 3, columns)).to(dtype)
    before = x.clone()
    found = kernels.moment(x)
    wanted = x.double().T @ x.double()
    assert torch.equal(x, before)
    assert found.dtype == torch.float32
    size = wanted.diagonal().sqrt()
    assert ((found - wanted).abs() <= 1e-5 * size[:, None] * size[None] + 1e-30).all()


def test_moments_of_columns_that_lie_apart() -> None:
    x = torch.randn(40, 120, generator=torch.Generator().manual_seed(1)).bfloat16()[:, 3:99:2]
    assert torch.equal(kernels.moment(x), kernels.moment(x.contiguous()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_moments_carry_what_is_not_finite(bad: float) -> None:
    x = torch.ones(9, 50).bfloat16()
    x[8, 49] = bad
    found = kernels.moment(x)
    assert not torch.isfinite(found[49, 49])
    assert torch.isfinite(found[:49, :49]).all()


@needs_compiled
def test_mis_sized_moments_are_refused() -> None:
    assert kernels._cpu is not None
    if not kernels._cpu.multiplies_bfloat16():
        pytest.skip("this processor has no products of bfloat16 numbers")
    bits = torch.zeros(4, 6, dtype=torch.int16).view(torch.uint16).numpy()
    for shape in ((6, 5), (5, 6), (4, 4)):
        with pytest.raises((ValueError, TypeError)):
            kernels._cpu.bfloat16_moment(bits, torch.zeros(shape))


@needs_compiled
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 30),
    group=st.integers(1, 70),
    bits=st.integers(2, 8),
    shared=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_fit_signed_is_as_good_as_its_specification(rows: int, group: int, bits: int, shared: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, group, generator=generator)
    if rows > 2:
        weight[1] = 0
    importance = torch.rand(1 if shared else rows, group, generator=generator) + 0.01
    codec, half = SignedInteger(bits, group, "bf16"), 2.0 ** (bits - 1)
    losses = []
    for module in (kernels, reference):
        scale = module.fit_signed(weight, importance, bits=bits, reaches=torch.tensor(_REACHES[codec.bits_per_code]))
        assert (scale.abs() >= 2.0**-24).all()
        code = torch.round(weight / scale[:, None]).clamp(-half, half - 1)
        losses.append((importance * (weight - code * scale[:, None]).square()).sum(1))
    # Sums run in another order, so that near-ties may be decided differently: other codes, of the same gain.
    energy = (importance * weight.square()).sum(1)
    assert ((losses[0] - losses[1]).abs() <= 2e-4 * energy).all()
    assert losses[0].sum() <= losses[1].sum() * 1.01 + 1e-9


@needs_compiled
def test_mis_sized_scales_are_refused() -> None:
    assert kernels._cpu is not None
    weight, reaches = torch.zeros(4, 16), torch.ones(3)
    for importance, bits, scales in (
        (torch.ones(3, 16), 4, torch.zeros(4)),
        (torch.ones(4, 15), 4, torch.zeros(4)),
        (torch.ones(1, 16), 9, torch.zeros(4)),
        (torch.ones(1, 16), 4, torch.zeros(5)),
    ):
        with pytest.raises((ValueError, TypeError)):
            kernels._cpu.fit_signed(weight, importance, bits, reaches, scales)


@needs_compiled
def test_signed_integers_are_as_good_without_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
    codec = parse("sint4:g64:bf16")
    assert isinstance(codec, SignedInteger)

    def loss() -> float:
        return float((weight - codec.round(weight, codec.prepare(weight), torch.arange(256))[1]).square().mean())

    compiled = loss()
    monkeypatch.setattr(kernels, "_cpu", None)
    assert loss() == pytest.approx(compiled, rel=1e-3)
