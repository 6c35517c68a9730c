"""NVFP4: scales are the best 8-bit floats, far out ones included."""

from __future__ import annotations

import pytest
import torch

from leaf_checks import check_numpy_decoder, gaussian, leaf, squared_error
from tersor.artifact import decoder_numpy_nv_float
from tersor.codecs import NvFloat, parse
from tersor.errors import BadInput, ShapeMismatch
from tersor.solvers import Encoder, Nearest


@pytest.mark.parametrize("text", ["nvfp4:s9", "nvfp4:s0", "nvfp4:s24"])
def test_numpy_decoder(text: str) -> None:
    assert str(parse(text)) == text
    check_numpy_decoder(decoder_numpy_nv_float, text, 13, 96)


def test_scales_are_the_best_there_are() -> None:
    codec, weight = leaf("nvfp4:s9"), gaussian(60, 16) * torch.logspace(-4, -1, 60)[:, None]
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * 2.0**-9
    columns = torch.arange(16)
    losses = torch.stack(
        [(weight - codec.round(weight, {"scale": scale.expand(60, 1)}, columns)[1]).square().sum(1) for scale in every]
    )
    found = (weight - Encoder(Nearest())(weight, codec, None)[1]).square().sum(1)
    assert (found <= losses.amin(0) * (1 + 1e-4)).float().mean() > 0.95
    assert (found <= losses.amin(0) * 1.05).all()


def test_gaussian_distortion() -> None:
    weight = gaussian(64, 4096) * 0.02
    found = squared_error("nvfp4:s9", weight) / 0.02**2
    assert found < 0.85 * squared_error("mxfp4:e2m1:g32", weight) / 0.02**2
    assert found == pytest.approx(0.00662, rel=0.02)


def test_out_of_reach_and_zero() -> None:
    weight = gaussian(4, 32)
    weight[1] = 0
    weight[2] *= 1e-9
    weight[3] *= 1e3
    values = Encoder(Nearest())(weight, leaf("nvfp4:s9"), None)[1]
    assert (values[1] == 0).all()
    assert torch.isfinite(values).all()
    assert float(values[3].abs().max()) == 6 * 448 / 512


def test_bad_texts_and_shapes() -> None:
    for text, says in (("nvfp4", "such as nvfp4:s9"), ("nvfp4:s25", "s0 to s24"), ("nvfp4:g16", "such as nvfp4:s9")):
        with pytest.raises(BadInput, match=says):
            parse(text)
    for text in ("coded(nvfp4:s9):3", "coded(sint4:g32):3"):
        with pytest.raises(BadInput, match="only int, fp and ternary codes can be coded"):
            parse(text)
    with pytest.raises(BadInput, match="groups of 16"):
        NvFloat(group=32)
    with pytest.raises(ShapeMismatch, match="16 does not divide 40"):
        leaf("nvfp4:s9").parts((3, 40))
    with pytest.raises(ValueError, match="does not divide"):
        decoder_numpy_nv_float.parts("nvfp4:s9", 3, 40)
