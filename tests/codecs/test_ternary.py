"""Ternary weights: exact thresholds, five digits to a byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_checks import check_numpy_decoder, gaussian, leaf, squared_error
from tersor.artifact import decoder_numpy_ternary
from tersor.codecs import Ternary, parse
from tersor.contracts import Encoded
from tersor.errors import BadInput, ShapeMismatch


def test_gaussian_distortion() -> None:
    # .1902 is the least for three levels on a unit Gaussian, which a long row comes to.
    assert squared_error("ternary:row", gaussian(64, 4096)) == pytest.approx(0.1902, rel=0.01)
    assert squared_error("ternary:g64", gaussian(64, 4096)) < 0.186


def test_the_threshold_is_the_best_of_all() -> None:
    weight, importance = gaussian(20, 16, seed=4), gaussian(1, 16, seed=5).square()
    codec = leaf("ternary:row")
    scale = codec.prepare(weight, importance[0])["scale"]
    found = (importance * (weight - codec.round(weight, {"scale": scale}, torch.arange(16))[1]).square()).sum(1)
    for factor in torch.linspace(0.3, 2.5, 300):
        tried = codec.round(weight, {"scale": scale * factor}, torch.arange(16))[1]
        assert (found <= (importance * (weight - tried).square()).sum(1) * 1.002 + 1e-7).all()


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 7), columns=st.integers(1, 43), seed=st.integers(0, 2**31))
def test_digits_round_trip(rows: int, columns: int, seed: int) -> None:
    codec = Ternary(group=None)
    codes = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    tensors = codec.pack(Encoded(codes, {"scale": torch.ones(rows, 1)}), (rows, columns))
    assert tensors["codes"].shape == (rows, -(-columns // 5))
    assert torch.equal(codec.unpack(tensors, (rows, columns)).codes, codes)
    assert int(tensors["codes"][0, 0]) == sum(c * 3**i for i, c in enumerate(codes[0, :5].tolist()))


@pytest.mark.parametrize("text", ["ternary:g24", "ternary:row:bf16", "ternary:g48:s8"])
def test_numpy_decoder(text: str) -> None:
    check_numpy_decoder(decoder_numpy_ternary, text, 13, 96)


def test_bad_texts_and_shapes() -> None:
    with pytest.raises(BadInput, match="group once"):
        parse("ternary")
    with pytest.raises(BadInput, match="asym"):
        parse("ternary:g64:asym")
    with pytest.raises(ShapeMismatch, match="64 does not divide 100"):
        leaf("ternary:g64").parts((3, 100))
    with pytest.raises(ValueError, match="does not divide"):
        decoder_numpy_ternary.parts("ternary:g64", 3, 100)
