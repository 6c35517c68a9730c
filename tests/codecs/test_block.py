"""Integers in blocks: the best power of two, shifts, ragged rows, one block for a layer."""

from __future__ import annotations

import pytest
import torch

from leaf_checks import check_numpy_decoder, correlated_gram, gaussian, leaf, squared_error
from tersor.artifact import decoder_numpy_block
from tersor.codecs import Block, parse
from tersor.errors import BadInput, ShapeMismatch
from tersor.solvers import Encoder, ErrorFeedback, Nearest


@pytest.mark.parametrize(
    "text", ["block4:8x16", "block3:5x24:shift", "block8:layer:fp16", "block2:64x8:shift:fp16", "block5:layer:shift"]
)
def test_numpy_decoder(text: str) -> None:
    check_numpy_decoder(decoder_numpy_block, text, 43, 96)
    assert str(parse(text)) == text
    assert hash(parse(text)) == hash(parse(text))


@pytest.mark.parametrize("shift", [False, True])
def test_no_power_of_two_is_better(shift: bool) -> None:
    weight = gaussian(24, 32, 4).pow(3)
    weight[:, :16] += 2.0 * shift
    codec = Block(3, (8, 16), shift)
    side = codec.prepare(weight)
    found = (weight - codec.round(weight, side, torch.arange(32))[1]).square().reshape(3, 8, 2, 16).sum((1, 3))
    for octave in range(-6, 7):
        scale = side["scale"] * 2.0**octave
        moved = (4 - side["zero"]) / 2.0**octave  # the same place for the shift
        tried = {"scale": scale, "zero": 4 - torch.round(moved).clamp(-128, 127)}
        error = (weight - codec.round(weight, tried, torch.arange(32))[1]).square().reshape(3, 8, 2, 16).sum((1, 3))
        assert (found <= error * 1.0001).all()


def test_shifts_help_where_values_lie_to_one_side() -> None:
    weight = gaussian(64, 64) * 0.1 + 1.0
    assert squared_error("block4:8x8:shift", weight) < 0.2 * squared_error("block4:8x8", weight)


def test_small_blocks_beat_one_for_all_and_take_a_seventh_of_float32() -> None:
    weight = gaussian(256, 256) * torch.logspace(-2, 0, 256)[:, None]
    assert squared_error("block4:8x8", weight) < 0.5 * squared_error("block4:layer:fp16", weight)
    assert 32 * weight.numel() / parse("block4:8x8").bits((256, 256)) > 7


def test_zero_rows_and_feedback() -> None:
    weight, gram = gaussian(40, 96) * 0.1, correlated_gram(96)
    weight[8:17] = 0
    codec = leaf("block3:8x16")
    losses = []
    for solver in (ErrorFeedback(), Nearest()):
        values = Encoder(solver)(weight, codec, gram)[1]
        error = weight - values
        losses.append(float(((error @ gram.matrix) * error).sum()))
        assert not values[8:17].any()
    assert losses[0] < 0.9 * losses[1]


def test_chunks_of_rows_are_whole_blocks() -> None:
    weight = gaussian(1300, 32)
    for text in ("block4:48x16", "block4:layer"):
        tensors, values = Encoder(Nearest())(weight, parse(text), None)
        assert torch.equal(parse(text).decode(tensors, (1300, 32)), values)
        rows = torch.tensor([1299, 527, 528, 0])
        assert torch.equal(parse(text).decode_rows(tensors, (1300, 32), rows), values[rows])
    assert not parse("block4:layer").sampled


@pytest.mark.parametrize(
    ("text", "says"),
    [("block4", "write block"), ("block4:8", "write block"), ("block4:g64", "write block"),
     ("block4:8x8:asym", "write block"), ("block4:8x8:shift:shift", "write block"), ("block1:8x8", "2 to 8"),
     ("block9:layer", "2 to 8"), ("block4:0x8", "at least one row")],
)  # fmt: skip
def test_unreadable_texts_say_why(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_bad_shapes() -> None:
    with pytest.raises(ShapeMismatch, match=r"100 inputs.*blocks of 64 columns"):
        leaf("block4:8x64").parts((3, 100))
    with pytest.raises(ValueError, match="do not divide"):
        decoder_numpy_block.parts("block4:8x64", 3, 100)
    with pytest.raises(ValueError, match="not of the form"):
        decoder_numpy_block.parts("block4:0x64", 3, 128)
