"""Signed integers: bits, signs of scales, what they lose next to grids without them."""

from __future__ import annotations

import pytest
import torch

from leaf_checks import check_numpy_decoder, correlated_gram, gaussian, leaf, squared_error
from tersor.artifact import decoder_numpy_signed
from tersor.codecs import SignedInteger, parse
from tersor.contracts import Gram
from tersor.errors import BadInput, ShapeMismatch
from tersor.solvers import CoordinateDescent, Encoder, ErrorFeedback, Nearest


@pytest.mark.parametrize(
    "text", ["sint4:g128:bf16", "sint4:g64", "sint3:g24:bf16", "sint8:row:bf16:a8", "sint8:row:bf16:a8s", "sint2:g8"]
)
def test_numpy_decoder(text: str) -> None:
    assert str(parse(text)) == text
    check_numpy_decoder(decoder_numpy_signed, text, 13, 384)


def test_bits_are_those_of_the_stored_tensors() -> None:
    assert leaf("sint4:g128:bf16").bits((10, 256)) == 10 * (256 * 4 + 2 * 16)
    assert leaf("sint8:row:bf16").bits((10, 250)) == 10 * (250 * 8 + 16)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_either_sign_of_a_scale_is_found(bits: int) -> None:
    codec = leaf(f"sint{bits}:g16")
    half = 2 ** (bits - 1)
    codes = torch.arange(16) % (2 * half) - half
    weight = torch.stack([0.5 * codes, -0.5 * codes]).float()
    scale = codec.prepare(weight)["scale"]
    assert (scale[0] > 0).all()
    assert (scale[1] < 0).all()
    assert torch.equal(Encoder(Nearest())(weight, codec, None)[1], weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_negative_scales_pay(bits: int) -> None:
    weight = gaussian(64, 2048)
    with_signs = squared_error(f"sint{bits}:g128", weight)
    codec = leaf(f"sint{bits}:g128")
    side = {"scale": codec.prepare(weight)["scale"].abs()}
    without = float((weight - codec.round(weight, side, torch.arange(2048))[1]).square().mean())
    assert with_signs < 0.97 * without
    assert with_signs == pytest.approx({3: 0.0347, 4: 0.00937}[bits], rel=0.02)


def test_refitted_scales_keep_their_signs_and_never_lose() -> None:
    codec, gram = leaf("sint4:g32:bf16"), correlated_gram(128)
    weight = gaussian(24, 128) * torch.linspace(-2, 3, 128)
    encoder = Encoder(ErrorFeedback())
    tensors, values = encoder(weight, codec, gram)
    encoded = codec.unpack(tensors, (24, 128))
    fresh = codec.refit(weight, encoded, gram.matrix)
    old, new = (
        ((weight - codec.values(type(encoded)(encoded.codes, side), 128)) @ gram.matrix)
        .mul(weight - codec.values(type(encoded)(encoded.codes, side), 128))
        .sum(1)
        for side in (encoded.side, fresh)
    )
    assert (new <= old * (1 + 1e-5)).all()
    assert (encoded.side["scale"] < 0).any()
    error = weight - values
    plain = weight - Encoder(Nearest())(weight, codec, None)[1]
    assert ((error @ gram.matrix) * error).sum() < ((plain @ gram.matrix) * plain).sum()
    better = weight - Encoder(CoordinateDescent())(weight, codec, gram)[1]
    assert ((better @ gram.matrix) * better).sum() <= ((error @ gram.matrix) * error).sum() * 1.0001


def test_rows_of_zeros_and_odd_sizes() -> None:
    weight = gaussian(3, 30)
    weight[1] = 0
    tensors, values = Encoder(Nearest())(weight, leaf("sint3:g10:bf16"), None)
    assert tensors["codes"].shape == (3, 12)
    assert (values[1] == 0).all()
    assert torch.isfinite(values).all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sint1:g32", "2 to 8 bits"),
        ("sint9:g32", "2 to 8 bits"),
        ("sint4:g32:s8", "scales have signs"),
        ("sint4:g32:asym", "unknown option 'asym'"),
        ("sint4:row:a8", "sint8:row alone"),
        ("sint8:g64:a8", "sint8:row alone"),
        ("sint8:g64:a8s", "sint8:row alone"),
        ("sint8:row:a8:a8s", "unknown option 'a8'"),
        ("sint4", "say the group once"),
    ],
)
def test_bad_texts(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_bad_shapes_and_parameters() -> None:
    with pytest.raises(ShapeMismatch, match="128 does not divide 576"):
        leaf("sint4:g128").parts((3, 576))
    with pytest.raises(BadInput, match="8 or 16 bits, not 4"):
        SignedInteger(8, None, "bf16", 4)
    with pytest.raises(BadInput, match="only inputs of 8 bits have a scale"):
        SignedInteger(8, None, "bf16", static=True)
    with pytest.raises(ValueError, match="does not divide"):
        decoder_numpy_signed.parts("sint4:g128", 3, 576)
    with pytest.raises(ValueError, match="not of the form"):
        decoder_numpy_signed.parts("sint4:g32:a8", 3, 64)


@pytest.mark.parametrize("reach", [1e-20, 0.3, 127.0, 130.1, 4e4])
def test_the_scale_of_inputs_is_the_least_that_clips_none(reach: float) -> None:
    gram = Gram(torch.eye(16), 5, reach=reach)
    tensors, values = Encoder(Nearest())(gaussian(6, 16), leaf("sint8:row:bf16:a8s"), gram)
    scale = tensors["input_scale"]
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (1,))
    assert 1 - 2**-7 < reach / 127 / float(scale) <= 1
    assert sum(tensor.nbytes for tensor in tensors.values()) * 8 == leaf("sint8:row:bf16:a8s").bits((6, 16))
    assert torch.equal(values, Encoder(Nearest())(gaussian(6, 16), leaf("sint8:row:bf16:a8"), gram)[1])


def test_the_scale_of_inputs_outlives_packing_again() -> None:
    codec, gram = leaf("sint8:row:bf16:a8s"), Gram(correlated_gram(16).matrix, 5, reach=2.5)
    weight = gaussian(6, 16)
    tensors, _ = Encoder(Nearest())(weight, codec, gram)
    encoded = codec.unpack(tensors, (6, 16))
    again = codec.pack(type(encoded)(encoded.codes, codec.refit(weight, encoded, gram.matrix)), (6, 16))
    assert torch.equal(again["input_scale"], tensors["input_scale"])
    assert float(Encoder(Nearest())(weight, codec, None)[0]["input_scale"]) == 0
