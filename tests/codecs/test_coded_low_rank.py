"""Low-rank factors in a codec of their own: exact bits, nearly as good as float16, refused where they make no sense."""

from __future__ import annotations

import pytest
import torch

from leaf_checks import correlated_gram, gaussian
from tersor.codecs import parse
from tersor.contracts import Gram
from tersor.errors import ShapeMismatch
from tersor.solvers import Encoder, ErrorFeedback, Nearest


def loss(text: str, gram: Gram | None, judge: Gram | None, solver: Nearest | ErrorFeedback | None = None) -> float:
    weight = gaussian(72, 96)
    error = weight - Encoder(solver or Nearest())(weight, parse(text), gram)[1]
    return float(((error if judge is None else error @ judge.matrix) * error).sum())


def test_bits_are_those_of_both_factors() -> None:
    codec = parse("lowrank6(int4:g24:s8)")
    inner = parse("int4:g24:s8")
    assert codec.bits((72, 96)) == inner.bits((6, 72)) + inner.bits((6, 96))
    # Half of the float16 factors, and a scale for each component of either.
    assert parse("lowrank8(int8:row)").bits((64, 96)) == parse("lowrank8").bits((64, 96)) // 2 + 2 * 8 * 16


@pytest.mark.parametrize("suffix", ["", ":plain"])
def test_eight_bits_lose_next_to_nothing(suffix: str) -> None:
    gram = correlated_gram(96)
    judge = None if suffix else gram
    exact, coded = loss(f"lowrank24{suffix}", gram, judge), loss(f"lowrank24(int8:row){suffix}", gram, judge)
    assert coded < 1.01 * exact
    assert coded > 0.99 * exact
    assert coded < 0.95 * loss(f"lowrank24(int3:row){suffix}", gram, judge)


def test_twice_the_rank_at_equal_bytes_pays() -> None:
    gram = correlated_gram(96)
    halves, whole = parse("lowrank23(int8:row)"), parse("lowrank12")
    assert halves.bits((72, 96)) <= whole.bits((72, 96))
    assert loss(str(halves), gram, gram) < 0.8 * loss(str(whole), gram, gram)


def test_feedback_on_the_right_factor_is_no_worse_than_nearest() -> None:
    gram = correlated_gram(96)
    losses = [loss("lowrank24(int3:row)", gram, gram, solver) for solver in (ErrorFeedback(), Nearest())]
    assert losses[0] <= losses[1]


def test_the_right_factor_makes_up_for_the_left_one() -> None:
    weight = gaussian(72, 96)
    codec = parse("lowrank10(int3:row):plain")
    tensors, values = Encoder(Nearest())(weight, codec, None)
    inner = parse("int3:row")
    across = inner.decode({n.removeprefix("left_"): t for n, t in tensors.items() if n.startswith("left_")}, (10, 72))
    down = inner.decode({n.removeprefix("right_"): t for n, t in tensors.items() if n.startswith("right_")}, (10, 96))
    assert torch.allclose(across.T @ down, values, atol=1e-5)
    best = torch.linalg.lstsq(across.T, weight).solution
    rounded = Encoder(Nearest())(best, inner, None)[1]
    assert torch.allclose(rounded, down, atol=1e-3 * float(down.abs().max()))


def test_zero_weights_and_few_rows() -> None:
    for weight in (torch.zeros(12, 40), gaussian(3, 40)):
        codec = parse("lowrank5(int8:row)")
        tensors, values = Encoder(Nearest())(weight, codec, correlated_gram(40))
        assert torch.equal(codec.decode(tensors, (len(weight), 40)), values)
        assert torch.allclose(values, weight, atol=0.1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"8 inputs.*rank is 12"):
        parse("lowrank12(int8:row)").parts((64, 8))
    with pytest.raises(ShapeMismatch, match="32 does not divide 100"):
        parse("lowrank4(int8:g32)").parts((64, 100))
