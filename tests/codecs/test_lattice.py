"""E8P: the codebook itself, exact encoding, and its distortion."""

from __future__ import annotations

import pytest
import torch

from leaf_checks import check_numpy_decoder, gaussian, leaf, squared_error
from tersor.artifact import decoder_numpy_lattice
from tersor.codecs import E8P, parse
from tersor.codecs.lattice import codewords, patterns
from tersor.errors import BadInput, ShapeMismatch


def test_the_codebook_is_a_piece_of_the_lattice() -> None:
    words = codewords()
    assert len({tuple(word) for word in words.tolist()}) == 65536
    # Moved back by a quarter, the union of D̂ and D̂ + ½ is E8 moved by a half: all sums even, least distance √2.
    assert (words.sum(1) % 2 == 0).all()
    some = words[torch.randperm(65536, generator=torch.Generator().manual_seed(0))[:500]]
    distances = torch.cdist(some.double(), words.double())
    assert float(distances[distances > 1e-6].min()) == pytest.approx(2**0.5)
    assert (patterns()[:227] + 0.5).square().sum(1).max() == 10
    assert (patterns()[227:] + 0.5).square().sum(1).unique().tolist() == [12]


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
def test_encoding_is_exact(spread: float) -> None:
    target = spread * gaussian(400, 8)
    words = codewords().double()
    best = torch.cdist(target.double(), words).min(1).values.square()
    found = words[E8P().closest(target).long()]
    assert torch.allclose((target - found).square().sum(1), best, rtol=1e-5)


def test_every_word_is_its_own_nearest() -> None:
    assert torch.equal(E8P().closest(codewords()), torch.arange(65536, dtype=torch.int32))


def test_gaussian_distortion() -> None:
    # Exact encoding gives .0915 at the best scale, a fifth below the best scalar quantizer at two bits (.1175).
    assert squared_error("e8p:row", gaussian(64, 8192)) == pytest.approx(0.0915, rel=0.01)


def test_the_scale_is_found_for_other_distributions() -> None:
    codec = E8P()
    weight = gaussian(16, 1024) ** 3
    scale = codec.prepare(weight)["scale"]
    found = (weight - codec.round(weight, {"scale": scale}, torch.arange(1024))[1]).square().mean()
    root = weight.square().mean(1, keepdim=True).sqrt()
    plain = (weight - codec.round(weight, {"scale": root * 0.97}, torch.arange(1024))[1]).square().mean()
    assert found < plain


@pytest.mark.parametrize("columns", [8, 24, 96])
def test_numpy_decoder(columns: int) -> None:
    check_numpy_decoder(decoder_numpy_lattice, "e8p:row", 13, columns)


def test_bad_texts_and_shapes() -> None:
    for text in ("e8p", "e8p:g64", "e8p:row:bf16"):
        with pytest.raises(BadInput, match="one scale per row"):
            parse(text)
    with pytest.raises(ShapeMismatch, match=r"8 columns do not divide 100"):
        leaf("e8p:row").parts((3, 100))
    with pytest.raises(ValueError, match="do not divide"):
        decoder_numpy_lattice.parts("e8p:row", 3, 100)
