"""Sums of binary planes: distortion, exact scales, and both kinds of plane."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_checks import check_numpy_decoder, correlated_gram, gaussian, leaf, squared_error
from tersor.artifact import decoder_numpy_binary
from tersor.codecs import BinaryPlanes, parse
from tersor.contracts import Encoded
from tersor.errors import BadInput, ShapeMismatch
from tersor.solvers import ErrorFeedback


@pytest.mark.parametrize(
    ("text", "expected"),
    # Unit Gaussian, long rows: 1 − 2/π; the best four levels and the best even sixteen (Max, 1960: .1175, .01154).
    # Three planes have three scales for four magnitudes: between the best eight levels (.0345) and even ones (.0374).
    [("bin:row", 0.3634), ("bin2:row", 0.1175), ("bin3:row", 0.0372), ("bin4:row", 0.0115), ("fdb:row", 0.137)],
)
def test_gaussian_distortion(text: str, expected: float) -> None:
    assert squared_error(text, gaussian(64, 4096)) == pytest.approx(expected, rel=0.02)


def test_groups_fit_better_than_rows() -> None:
    weight = gaussian(32, 2048)
    for head in ("bin", "bin2", "bin3", "bin4", "fdb"):
        assert squared_error(f"{head}:g64", weight) < squared_error(f"{head}:row", weight)
    errors = [squared_error(f"{head}:g64", weight) for head in ("bin", "fdb", "bin2", "bin3", "bin4")]
    assert errors == sorted(errors, reverse=True)


def test_dual_planes_follow_a_skew() -> None:
    weight = torch.where(gaussian(16, 1024, seed=3) > 0.8, 3.0, 0.0) + 0.05 * gaussian(16, 1024)
    assert squared_error("fdb:row", weight) < 0.004
    assert squared_error("fdb:row", -weight) < 0.004


def test_one_plane_has_its_scale_in_closed_form() -> None:
    weight, importance = gaussian(6, 64), gaussian(1, 64, seed=9).square()[0]
    scale = leaf("bin:row").prepare(weight, importance)["scale"]
    expected = (importance * weight.abs()).sum(1, keepdim=True) / importance.sum()
    assert torch.allclose(scale, expected, rtol=2e-3)


@pytest.mark.parametrize("text", ["bin:g16", "bin3:g32", "fdb:g32"])
def test_refit_is_exact_least_squares(text: str) -> None:
    codec, weight, gram = leaf(text), gaussian(9, 96) * 0.1, correlated_gram(96)
    solver = ErrorFeedback(refit=False)
    encoded = solver.solve(weight, codec, solver.prepare(gram))
    side = codec.refit(weight, encoded, gram.matrix)

    def loss(scale: torch.Tensor) -> torch.Tensor:
        error = weight - codec.values(Encoded(encoded.codes, {"scale": scale}), 96)
        return ((error @ gram.matrix) * error).sum(1)

    best = loss(side["scale"])
    assert (best <= loss(encoded.side["scale"])).all()
    moved = 0
    for number in range(side["scale"].shape[1]):
        for factor in (0.98, 1.02):
            other = side["scale"].clone()
            other[:, number] *= factor
            moved += int((loss(other) < best * 0.9999).sum())
    # A row whose exact solution has a scale below zero keeps that one as it was, and is not at its minimum.
    assert moved <= 0.1 * 2 * side["scale"].numel()


@settings(max_examples=100, deadline=None)
@given(
    planes=st.integers(1, 4),
    group=st.none() | st.sampled_from([8, 24, 64]),
    scales=st.sampled_from(["fp16", "bf16", "s8"]),
    dual=st.booleans(),
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
)
def test_text_and_bits(planes: int, group: int | None, scales: str, dual: bool, rows: int, groups: int) -> None:
    planes = 2 if dual else planes
    codec = BinaryPlanes(planes, group, scales, dual)  # type: ignore[arg-type]
    assert parse(str(codec)) == codec
    columns = (group or 57) * groups
    count = planes * (1 if group is None else groups)
    expected = rows * (-(-columns * planes // 8) + count * (1 if scales == "s8" else 2) + (2 if scales == "s8" else 0))
    assert codec.bits((rows, columns)) == 8 * expected


@pytest.mark.parametrize("text", ["bin:g24", "bin2:row:bf16", "bin3:g48:s8", "bin4:g96", "fdb:g32", "fdb:row:s8"])
def test_numpy_decoder(text: str) -> None:
    check_numpy_decoder(decoder_numpy_binary, text, 13, 96)


@pytest.mark.parametrize(
    ("text", "says"), [("bin", "group once"), ("bin5:g64", "1 to 4"), ("fdb:g64:asym", "asym"), ("bin0:g64", "Unknown")]
)
def test_bad_texts(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_bad_shapes() -> None:
    with pytest.raises(ShapeMismatch, match="64 does not divide 100"):
        leaf("bin2:g64").parts((3, 100))
    with pytest.raises(BadInput, match="2 planes"):
        BinaryPlanes(3, 64, dual=True)
    with pytest.raises(ValueError, match="does not divide"):
        decoder_numpy_binary.parts("bin2:g64", 3, 100)
