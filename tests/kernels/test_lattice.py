"""The nearest words of E8P: compiled and plain to the bit, and both against every word there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.codecs import E8P
from tersor.codecs.lattice import codewords
from tersor.kernels import lattice, reference_lattice

needs_compiled = pytest.mark.skipif(not lattice.compiled, reason="the compiled kernels were not built")


@pytest.fixture
def draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def check(target: Tensor) -> None:
    """The same words from every version, at every width of registers."""
    plain = reference_lattice.nearest_words(target)
    assert torch.equal(lattice.nearest_words(target), plain)
    assert plain.dtype == torch.int32
    for lanes in (1, 4, 8, 16):
        words = torch.empty_like(plain)
        assert lattice._cpu is not None
        lattice._cpu.nearest_words(target.contiguous().numpy(), words.numpy(), most=lanes)
        assert torch.equal(words, plain)


@needs_compiled
@pytest.mark.parametrize("spread", [1e-30, 0.1, 0.6, 1.0, 1.4, 3.0, 1e4, 1e17, 1e30])
def test_gaussians(spread: float, draw: torch.Generator) -> None:
    check(spread * torch.randn(20_000, 8, generator=draw))


@needs_compiled
@pytest.mark.parametrize("step", [0.125, 0.25, 0.5, 1.0])
def test_ties(step: float, draw: torch.Generator) -> None:
    check(step * torch.randint(-int(4 / step), int(4 / step) + 1, (20_000, 8), generator=draw))
    check(step * torch.randint(-1, 2, (20_000, 8), generator=draw))
    check(torch.cat([torch.zeros(1, 8), torch.full((1, 8), step), torch.full((1, 8), -step), -torch.zeros(1, 8)]))


@needs_compiled
@pytest.mark.parametrize("count", [0, 1, 2, 7, 15, 16, 17, 33])
def test_few_vectors(count: int, draw: torch.Generator) -> None:
    check(torch.randn(count, 8, generator=draw))
    check(torch.randn(count, 16, generator=draw)[:, 8:])  # not contiguous


@needs_compiled
def test_what_is_no_number(draw: torch.Generator) -> None:
    target = torch.randn(20_000, 8, generator=draw)
    odd = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-45, -0.0])
    chosen = torch.randint(16, target.shape, generator=draw)
    check(torch.where(chosen < 8, odd[chosen.clamp(max=7)], target))
    check(torch.full((3, 8), torch.nan))


@needs_compiled
def test_bad_shapes() -> None:
    with pytest.raises(TypeError):
        lattice.nearest_words(torch.zeros(3, 7))
    assert lattice._cpu is not None
    with pytest.raises(ValueError, match="one entry a row"):
        lattice._cpu.nearest_words(torch.zeros(3, 8).numpy(), torch.zeros(2, dtype=torch.int32).numpy())


@pytest.mark.parametrize("search", [lattice.nearest_words, reference_lattice.nearest_words])
@pytest.mark.parametrize("spread", [0.4, 1.0, 1.8])
def test_no_word_is_nearer(search: object, spread: float, draw: torch.Generator) -> None:
    assert callable(search)
    target = spread * torch.randn(400, 8, generator=draw)
    target[::3] = (4 * target[::3]).round() / 4  # ties
    words = codewords().double()
    best = torch.cdist(target.double(), words, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    found = (target.double() - words[search(target).long()]).norm(dim=1)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-5)


def test_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch, draw: torch.Generator) -> None:
    target = torch.randn(50, 8, generator=draw)
    before = E8P().closest(target)
    monkeypatch.setattr(lattice, "_cpu", None)
    assert torch.equal(E8P().closest(target), before)
