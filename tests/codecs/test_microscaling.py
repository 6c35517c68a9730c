"""Microscaling floats: scales are powers of two, and the best ones."""

from __future__ import annotations

import pytest
import torch

from leaf_checks import check_numpy_decoder, gaussian, leaf, squared_error
from tersor.artifact import decoder_numpy_microscaling
from tersor.codecs import MicroFloat, parse
from tersor.errors import BadInput, ShapeMismatch


def test_scales_are_the_best_powers_of_two() -> None:
    codec, weight = leaf("mxfp4:e2m1:g32"), gaussian(40, 96) * torch.logspace(-3, 3, 40)[:, None]
    scale = codec.prepare(weight)["scale"]
    assert (torch.frexp(scale)[0] == 0.5).all()

    def loss(scale: torch.Tensor) -> torch.Tensor:
        error = weight - codec.round(weight, {"scale": scale}, torch.arange(96))[1]
        return error.reshape(40, 3, 32).square().sum(2)

    best = loss(scale)
    for power in range(-5, 6):
        assert (best <= loss(scale * 2.0**power) * (1 + 1e-5)).all()


def test_gaussian_distortion() -> None:
    weight = gaussian(64, 4096)
    searched = squared_error("mxfp4:e2m1:g32", weight)
    # The standard's rule: the exponent of the greatest magnitude, less that of the greatest float (2 for e2m1).
    codec = leaf("mxfp4:e2m1:g32")
    top = weight.reshape(64, -1, 32).abs().amax(2)
    scale = torch.ldexp(torch.ones_like(top), torch.frexp(top)[1] - 1 - 2)
    by_rule = float((weight - codec.round(weight, {"scale": scale}, torch.arange(4096))[1]).square().mean())
    assert searched < 0.97 * by_rule
    assert searched == pytest.approx(0.0125, rel=0.015)
    assert squared_error("fp4:e2m1:g32", weight) < searched


def test_great_and_small_weights_are_held() -> None:
    for size in (1e-16, 1e-6, 1e15):
        weight = size * gaussian(4, 64)
        assert squared_error("mxfp8:e4m3:g32", weight) < 0.001 * float(weight.square().mean())


@pytest.mark.parametrize(
    "text", ["mxfp4:e2m1:g32", "mxfp6:e3m2:g24", "mxfp8:e4m3:row", "mxfp8:e5m2:g48", "mxfp4:e1m2:g8"]
)
def test_numpy_decoder(text: str) -> None:
    assert str(parse(text)) == text
    check_numpy_decoder(decoder_numpy_microscaling, text, 13, 96)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mxfp4:g32", "exponent"),
        ("mxfp4:e3m3:g32", "not 4"),
        ("mxfp5:e2m2:g32", "4, 6 or 8"),
        ("mxfp4:e2m1:g32:s8", "no scale"),
    ],
)
def test_bad_texts(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_bad_shapes() -> None:
    with pytest.raises(ShapeMismatch, match="32 does not divide 100"):
        leaf("mxfp4:e2m1:g32").parts((3, 100))
    with pytest.raises(BadInput, match="powers of two"):
        MicroFloat(4, 32, "s8")
    with pytest.raises(ValueError, match="does not divide"):
        decoder_numpy_microscaling.parts("mxfp4:e2m1:g32", 3, 100)
