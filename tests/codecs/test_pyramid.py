"""Pyramid vector quantization: counting, numbering, the search for pulses, and distortion."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_checks import check_numpy_decoder, gaussian, leaf, squared_error
from tersor.artifact import decoder_numpy_pyramid
from tersor.codecs import Pyramid, parse
from tersor.codecs.pyramid import count, numbers, search, shapes
from tersor.errors import BadInput, ShapeMismatch
from tersor.solvers import Nearest


def all_shapes(dim: int, pulses: int) -> torch.Tensor:
    found = [v for v in product(range(-pulses, pulses + 1), repeat=dim) if sum(map(abs, v)) == pulses]
    return torch.tensor(found)


@pytest.mark.parametrize(("dim", "pulses"), [(2, 1), (2, 7), (3, 4), (4, 5), (5, 3)])
def test_numbers_are_one_to_one(dim: int, pulses: int) -> None:
    everything = all_shapes(dim, pulses)
    assert len(everything) == count(dim, pulses)
    assert sorted(numbers(everything, pulses).tolist()) == list(range(len(everything)))
    assert torch.equal(shapes(numbers(everything, pulses), dim, pulses), everything)


@settings(max_examples=60, deadline=None)
@given(rate=st.integers(1, 6), dim=st.integers(2, 48), seed=st.integers(0, 2**31))
def test_text_and_large_numbers(rate: int, dim: int, seed: int) -> None:
    if rate * dim > 56 or 2 * dim > 2 ** max(rate * dim - 8, 0):
        with pytest.raises(BadInput, match=f"{rate * dim} bits"):
            Pyramid(rate, dim)
        return
    codec = Pyramid(rate, dim)
    assert parse(str(codec)) == codec
    assert codec.code_bits == 8 + math.ceil(math.log2(count(dim, codec.pulses)))
    assert codec.code_bits <= rate * dim
    assert count(dim, codec.pulses + 1) > 2 ** (rate * dim - 8)
    top = count(dim, codec.pulses)
    number = torch.randint(0, top, (50,), generator=torch.Generator().manual_seed(seed))
    number[:2] = torch.tensor([0, top - 1])
    shape = shapes(number, dim, codec.pulses)
    assert (shape.abs().sum(1) == codec.pulses).all()
    assert torch.equal(numbers(shape, codec.pulses), number)


@pytest.mark.parametrize(("dim", "pulses"), [(3, 6), (4, 5), (5, 3)])
def test_the_search_is_nearly_exact(dim: int, pulses: int) -> None:
    target = gaussian(500, dim)
    every = all_shapes(dim, pulses).float()
    best = (target @ (every / every.norm(dim=1, keepdim=True)).T).max(1).values
    found = search(target, pulses)
    assert (found.abs().sum(1) == pulses).all()
    reached = (target * found).sum(1) / found.norm(dim=1)
    assert (reached >= best * 0.97).all()
    assert ((best - reached) > 1e-5).float().mean() < 0.03


@pytest.mark.parametrize(
    ("text", "gap"),
    # Bits above the rate–distortion function of a unit Gaussian, the gain's eight included: for 16 columns .57 to .73,
    # for 8 columns 1.1, and less the longer the vector is.
    [("pvq2:n8", 1.14), ("pvq2:n16", 0.727), ("pvq3:n16", 0.70), ("pvq2:n28", 0.568), ("pvq1:n48", 0.383)],
)
def test_gaussian_distortion(text: str, gap: float) -> None:
    weight = gaussian(48, 1344)
    rate = leaf(text).bits((48, 1344)) / weight.numel()
    assert rate + 0.5 * math.log2(squared_error(text, weight)) == pytest.approx(gap, abs=0.025)


def test_zeros_and_long_vectors() -> None:
    codec = leaf("pvq2:n16")
    weight = gaussian(4, 64)
    weight[1] = 0
    weight[2, :16] = 0
    values = codec.values(Nearest().solve(weight, codec, None), 64)
    assert values[1].abs().max() < 1e-5
    assert values[2, :16].abs().max() == 0
    longer = codec.round(1.15 * weight, codec.prepare(weight), torch.arange(64))[1]
    assert (longer - 1.15 * weight).norm() < 0.5 * weight.norm()


@pytest.mark.parametrize("text", ["pvq2:n8", "pvq2:n16", "pvq2:n24", "pvq1:n48", "pvq3:n12"])
def test_numpy_decoder(text: str) -> None:
    check_numpy_decoder(decoder_numpy_pyramid, text, 13, 96)


@pytest.mark.parametrize(
    ("text", "says"),
    [("pvq2", "such as"), ("pvq2:g16", "such as"), ("pvq7:n8", "1 to 6"), ("pvq2:n64", "2 to 48"), ("pvq2:n32", "56")],
)
def test_bad_texts(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_bad_shapes() -> None:
    with pytest.raises(ShapeMismatch, match="16 columns do not divide 100"):
        leaf("pvq2:n16").parts((3, 100))
    with pytest.raises(ValueError, match="do not divide"):
        decoder_numpy_pyramid.parts("pvq2:n16", 3, 100)
