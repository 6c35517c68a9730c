"""Vector codebooks: what is learned, what it gains over scalars, and wide codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_checks import check_numpy_decoder, correlated_gram, gaussian, leaf, squared_error
from tersor.artifact import decoder_numpy_codebook
from tersor.codecs import Codebook, parse
from tersor.codecs.codebook import kmeans
from tersor.codecs.packing import packed_width
from tersor.codecs.wide import pack_wide, unpack_wide
from tersor.contracts import Gram
from tersor.errors import BadInput, ShapeMismatch
from tersor.solvers import Encoder, ErrorFeedback, Nearest


@pytest.mark.parametrize(
    ("text", "low", "high"),
    # Unit Gaussian. Floors: the rate–distortion function; ceilings: a scalar Lloyd-Max quantizer of the same rate
    # (.3634 at one bit, .1175 at two, .0095 at four), less what the vectors must gain.
    [("vq8x4", 0.0625, 0.1000), ("vq6x6", 0.25, 0.340), ("vq8x8", 0.25, 0.325), ("vq5x5:r2", 0.0625, 0.1160)],
)
def test_gaussian_distortion(text: str, low: float, high: float) -> None:
    assert low < squared_error(text, gaussian(96, 1920)) < high


def test_a_second_stage_quarters_the_error_again_and_again() -> None:
    weight = gaussian(64, 960)
    errors = [squared_error(text, weight) for text in ("vq6x3", "vq6x3:r2", "vq6x3:r3")]
    assert errors[1] < 0.15 * errors[0]
    assert errors[2] < 0.15 * errors[1]


def test_clusters_are_found() -> None:
    centres = 4 * gaussian(32, 4, seed=3)
    weight = (centres[torch.arange(6400) % 32] + 0.01 * gaussian(6400, 4)).reshape(1, -1)
    assert squared_error("vq5x4", weight) < 0.2 * float(weight.square().mean())
    assert squared_error("vq6x4", weight) < 0.002 * float(weight.square().mean())


def test_important_columns_weigh_more() -> None:
    weight = gaussian(64, 384)
    weight[:, 192:] = weight[:, 192:].abs()
    diagonal = torch.ones(384)
    diagonal[192:] = 100.0
    codec = leaf("vq6x4")
    _, plain = Encoder(Nearest())(weight, codec, None)
    tilted = codec.learn(weight, Gram(torch.diag(diagonal), 10))
    assert isinstance(tilted, Codebook)
    assert tilted.book is not None
    again = codec.learn(weight, Gram(torch.diag(diagonal), 10))
    assert isinstance(again, Codebook)
    assert again.book is not None
    assert torch.equal(tilted.book, again.book)
    assert tilted == codec
    assert hash(tilted) == hash(codec)
    unweighted = float((diagonal * (weight - plain).square()).mean())
    _, values = Encoder(Nearest())(weight, codec, Gram(torch.diag(diagonal), 10))
    assert float((diagonal * (weight - values).square()).mean()) < 0.95 * unweighted


def test_rows_of_any_size_share_a_codebook() -> None:
    weight = gaussian(40, 192) * torch.logspace(-3, 2, 40)[:, None]
    _, values = Encoder(Nearest())(weight, leaf("vq8x4"), None)
    relative = (weight - values).square().sum(1) / weight.square().sum(1)
    assert float(relative.max()) < 0.2


def test_bytes_do_not_depend_on_workers() -> None:
    weight, gram = gaussian(1100, 48), correlated_gram(48)
    one, _ = Encoder(ErrorFeedback(), workers=1)(weight, leaf("vq6x4:r2"), gram)
    two, _ = Encoder(ErrorFeedback(), workers=2)(weight, leaf("vq6x4:r2"), gram)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_fewer_vectors_than_entries_and_zeros() -> None:
    weight = gaussian(2, 16)
    _, values = Encoder(Nearest())(weight, leaf("vq8x4"), None)
    assert torch.allclose(values, weight, rtol=2e-3, atol=2e-3)
    _, values = Encoder(Nearest())(torch.zeros(5, 64), leaf("vq4x4:r2"), None)
    assert values.abs().max() < 1e-6


def test_kmeans_uses_all_entries() -> None:
    vectors = torch.cat([torch.zeros(900, 2), gaussian(100, 2)])
    entries = kmeans(vectors, torch.ones(1000, 2), 16, torch.Generator().manual_seed(0))
    assert len({tuple(entry) for entry in entries.tolist()}) >= 14


@settings(max_examples=80, deadline=None)
@given(bits=st.integers(1, 56), rows=st.integers(1, 5), count=st.integers(0, 21), seed=st.integers(0, 2**31))
def test_wide_packing_round_trip(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, count), generator=generator, dtype=torch.int64)
    stream = pack_wide(codes, bits)
    assert stream.shape == (rows, packed_width(count, bits))
    assert torch.equal(unpack_wide(stream, bits, count), codes)
    number = int.from_bytes(bytes(stream[0].tolist()), "little")
    assert [(number >> (j * bits)) & (2**bits - 1) for j in range(count)] == codes[0].tolist()


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 14), dim=st.integers(2, 16), stages=st.integers(1, 4), rows=st.integers(1, 9))
def test_text_and_bits(bits: int, dim: int, stages: int, rows: int) -> None:
    if bits * stages > 30:
        with pytest.raises(BadInput, match="at most 30"):
            Codebook(bits, dim, stages)
        return
    codec = Codebook(bits, dim, stages)
    assert parse(str(codec)) == codec
    expected = rows * (-(-7 * bits * stages // 8) + 2) + stages * 2**bits * dim * 2
    assert codec.bits((rows, 7 * dim)) == 8 * expected


@pytest.mark.parametrize("text", ["vq4x4", "vq7x6", "vq5x3:r2", "vq4x8:r4"])
def test_numpy_decoder(text: str) -> None:
    check_numpy_decoder(decoder_numpy_codebook, text, 13, 96)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vq15x4", "1 to 14"),
        ("vq8x1", "2 to 16"),
        ("vq8x4:r9", "1 to 4"),
        ("vq8x4:g64", "write vq"),
        ("vq12x4:r3", "36"),
    ],
)
def test_bad_texts(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_bad_shapes_and_missing_codebooks() -> None:
    with pytest.raises(ShapeMismatch, match="6 columns do not divide 100"):
        leaf("vq8x6").parts((3, 100))
    with pytest.raises(ValueError, match="call learn"):
        leaf("vq8x6").round(gaussian(2, 12), {"scale": torch.ones(2, 1)}, torch.arange(12))
    with pytest.raises(ValueError, match="do not divide"):
        decoder_numpy_codebook.parts("vq8x6", 3, 100)
