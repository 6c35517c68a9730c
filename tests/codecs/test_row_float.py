"""Small floats under a row's number times powers of two: the best powers, the best number, nothing out of reach."""

from __future__ import annotations

import pytest
import torch

from leaf_checks import check_numpy_decoder, correlated_gram, gaussian, leaf, squared_error
from tersor.artifact import decoder_numpy_row_float
from tersor.codecs import RowFloat, parse
from tersor.contracts import Encoded
from tersor.errors import BadInput, ShapeMismatch
from tersor.kernels import products
from tersor.runtime.products import product_of
from tersor.solvers import Encoder, ErrorFeedback, Nearest


def loss(codec: RowFloat, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What each group loses."""
    error = weight - codec.round(weight, {"scale": scale}, torch.arange(weight.shape[1]))[1]
    return error.reshape(*scale.shape, -1).square().sum(2)


def row_float(text: str) -> RowFloat:
    codec = parse(text)
    assert isinstance(codec, RowFloat)
    return codec


def test_powers_are_the_best_there_are() -> None:
    codec, weight = row_float("m2fp4:e2m1:g32"), gaussian(40, 96) * torch.logspace(-2, 1, 40)[:, None]
    weight[:, 32:64] *= 0.01
    side = codec.prepare(weight)
    assert torch.equal(side["super"], side["super"].half().float())
    power = side["scale"] / side["super"]
    assert (torch.frexp(power)[0] == 0.5).all()
    assert power.max() <= 1
    assert power.min() >= 2.0**-15
    best = loss(codec, weight, side["scale"])
    for shift in range(16):
        scale = (side["super"] * 2.0**-shift).expand_as(best).contiguous()
        assert (best <= loss(codec, weight, scale) * (1 + 1e-5)).all()


def test_the_number_of_a_row_is_no_worse_than_its_greatest_scale() -> None:
    codec, weight = row_float("m2fp4:e2m1:g32"), gaussian(64, 512)
    free = row_float("m2fp4:e2m1:g32").fit(weight.reshape(-1, 32), torch.ones(1, 32))["scale"].reshape(64, 16)
    greatest = codec.storable(free)["super"]
    best = torch.full((64, 16), torch.inf)
    for shift in range(16):
        scale = (greatest * 2.0**-shift).expand_as(best).contiguous()
        best = torch.minimum(best, loss(codec, weight, scale))
    found = loss(codec, weight, codec.prepare(weight)["scale"])
    assert (found.sum(1) <= best.sum(1) * (1 + 1e-5)).all()
    assert float(found.sum()) < 0.97 * float(best.sum())


def test_gaussian_distortion() -> None:
    weight = gaussian(64, 4096)
    found = squared_error("m2fp4:e2m1:g32", weight)
    assert found == pytest.approx(0.01207, rel=0.015)
    assert squared_error("fp4:e2m1:g32", weight) < found < 0.985 * squared_error("mxfp4:e2m1:g32", weight)


def test_error_feedback_keeps_the_number_and_chooses_powers_anew() -> None:
    codec, weight = row_float("m2fp4:e2m1:g32"), gaussian(16, 96)
    side = codec.prepare(weight)
    moved = codec.prepare_segment(side, weight[:, 32:64] * 0.25, 32)
    assert torch.equal(moved["super"], side["super"])
    assert torch.equal(moved["scale"][:, [0, 2]], side["scale"][:, [0, 2]])
    assert (moved["scale"][:, 1] < side["scale"][:, 1]).all()
    out_of_reach = codec.prepare_segment(side, weight[:, 32:64] * 100, 32)["scale"][:, 1:2]
    assert torch.equal(out_of_reach, side["super"])


def test_refit_is_least_squares_for_the_number_of_a_row() -> None:
    codec, weight, gram = row_float("m2fp4:e2m1:g32"), gaussian(24, 96) * 0.02, correlated_gram(96)
    solver = ErrorFeedback(refit=False)
    encoded = solver.solve(weight, codec, solver.prepare(gram, codec.span))
    side = codec.refit(weight, encoded, gram.matrix)

    def distortion(number: torch.Tensor) -> torch.Tensor:
        scale = encoded.side["scale"] / encoded.side["super"] * number
        error = weight - codec.values(Encoded(encoded.codes, {"scale": scale}), 96)
        return ((error @ gram.matrix) * error).sum(1)

    assert torch.equal(side["scale"] / side["super"], encoded.side["scale"] / encoded.side["super"])
    assert torch.equal(side["super"], side["super"].half().float())
    best = distortion(side["super"])
    assert float(best.sum()) < float(distortion(encoded.side["super"]).sum())
    for factor in (0.99, 0.998, 1.002, 1.01):
        assert (best <= distortion(side["super"] * factor) * (1 + 1e-4)).all()


def test_out_of_reach_and_zero() -> None:
    weight = gaussian(5, 64)
    weight[1] = 0
    weight[2, :32] *= 1e-7
    weight[3] *= 1e6
    weight[4] *= 1e-6
    values = Encoder(Nearest())(weight, leaf("m2fp4:e2m1:g32"), None)[1]
    assert (values[1] == 0).all()
    assert torch.isfinite(values).all()
    assert (values[2, :32] == 0).all()
    assert float(values[3].abs().max()) == 6 * 65504
    assert values[4].abs().max() <= weight[4].abs().max() * 1.1


@pytest.mark.parametrize(
    "text", ["m2fp4:e2m1:g32", "m2fp6:e3m2:g24", "m2fp8:e4m3:row", "m2fp8:e5m2:g48", "m2fp4:e1m2:g8"]
)
def test_numpy_decoder(text: str) -> None:
    assert str(parse(text)) == text
    check_numpy_decoder(decoder_numpy_row_float, text, 13, 96)


@pytest.mark.skipif(not products.available, reason="nothing was compiled")
@pytest.mark.parametrize("least", [1.0, 2.0**-11])
def test_products_with_scales_that_float16_holds_and_others(least: float) -> None:
    weight = gaussian(24, 96) * 0.02
    weight[:, 32:64] *= least
    codec = leaf("m2fp4:e2m1:g32")
    tensors, values = Encoder(Nearest())(weight, codec, None)
    scale = codec.unpack(tensors, (24, 96)).side["scale"]
    assert torch.equal(scale.half().float(), scale) == (least == 1)
    product = product_of(codec, tensors, (24, 96))
    assert product is not None
    assert torch.equal(products.read_rows(product, torch.arange(24)), values)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("m2fp4:g32", "exponent"),
        ("m2fp4:e3m3:g32", "not 4"),
        ("m2fp5:e2m2:g32", "4, 6 or 8"),
        ("m2fp4:e2m1:g32:s8", "no scale"),
        ("m2pf4:e2m1:g32", "Did you mean m2fp4"),
    ],
)
def test_bad_texts(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_bad_shapes() -> None:
    with pytest.raises(ShapeMismatch, match="32 does not divide 100"):
        leaf("m2fp4:e2m1:g32").parts((3, 100))
    with pytest.raises(BadInput, match="one float16 a row"):
        RowFloat(4, 32, "s8")
    with pytest.raises(ValueError, match="does not divide"):
        decoder_numpy_row_float.parts("m2fp4:e2m1:g32", 3, 100)
