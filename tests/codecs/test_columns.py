"""Columns in two sets, column factors, and n of m weights kept: sizes, choices, and what feedback is worth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leaf_checks import correlated_gram, gaussian
from tersor.artifact import decoder_numpy_columns as plain
from tersor.artifact.decoder_numpy import _inner_decode, _inner_parts
from tersor.codecs import ColumnScaled, ColumnSplit, SemiStructured, parse
from tersor.codecs.columns import _moving
from tersor.codecs.semi_structured import refit
from tersor.contracts import Gram, Solver
from tersor.errors import BadInput, ShapeMismatch
from tersor.solvers import CoordinateDescent, Encoder, ErrorFeedback, Nearest

ROWS, COLUMNS = 40, 96


def problem(seed: int = 0, columns: int = COLUMNS) -> tuple[Tensor, Gram]:
    return gaussian(ROWS, columns, seed) * 0.05, correlated_gram(columns, seed + 1)


def distortion(error: Tensor, gram: Gram) -> float:
    return float(((error @ gram.matrix) * error).double().sum())


def loss(text: str, weight: Tensor, gram: Gram, solver: Solver | None = None) -> float:
    return distortion(weight - Encoder(solver or ErrorFeedback())(weight, parse(text), gram)[1], gram)


def binary(rows: int, columns: int) -> int:
    return 8 * rows * math.ceil(columns / 8) + 16 * rows


@pytest.mark.parametrize(("amount", "count"), [("0.2", 19), ("0.001", 1), ("24", 24), ("95", 95)])
def test_columns_take_what_both_codecs_and_a_bit_each_take(amount: str, count: int) -> None:
    codec = parse(f"cols(int4:row,bin:row):{amount}")
    assert isinstance(codec, ColumnSplit)
    assert codec.count(COLUMNS) == count
    assert codec.bits((ROWS, COLUMNS)) == (
        COLUMNS + 8 * ROWS * math.ceil(count / 2) + 16 * ROWS + binary(ROWS, COLUMNS - count)
    )


def test_salient_columns_are_those_that_cost_most() -> None:
    weight, gram = problem()
    energy = gram.matrix.diagonal().double()
    for text, score in (
        ("cols(int8:row,bin:row):10", energy * weight.double().square().sum(0)),
        ("cols(int8:row,bin:row):10:inputs", energy),
    ):
        codec = parse(text)
        assert isinstance(codec, ColumnSplit)
        mask = codec.mask(weight, gram)
        assert int(mask.sum()) == 10
        assert score[mask].min() >= score[~mask].max()
    plain_mask = codec.mask(weight, None)
    assert torch.equal(
        plain_mask, weight.double().square().sum(0) >= weight.double().square().sum(0).sort().values[-10]
    )


def test_the_distortion_is_the_sum_of_both_sets_objectives() -> None:
    """The identity of the module's text, for any errors, without damping."""
    matrix = correlated_gram(COLUMNS).matrix.double()
    first, second = torch.arange(0, 70), torch.arange(70, COLUMNS)
    error = gaussian(ROWS, COLUMNS, seed=9).double()
    moves = torch.linalg.solve(matrix[second][:, second], matrix[second][:, first])
    schur = matrix[first][:, first] - matrix[first][:, second] @ moves
    left = error[:, second] + error[:, first] @ moves.T
    parts = [((e @ h) * e).sum() for e, h in ((error[:, first], schur), (left, matrix[second][:, second]))]
    assert float(sum(parts)) == pytest.approx(float(((error @ matrix) * error).sum()), rel=1e-9)
    damped = _moving(matrix.float(), second, first)
    assert float((damped - moves).norm() / moves.norm()) < 0.6


def test_feedback_between_the_sets_beats_two_codecs_side_by_side() -> None:
    weight, gram = problem(4)
    codec = parse("cols(int4:row,bin:row):24")
    assert isinstance(codec, ColumnSplit)
    mask = codec.mask(weight, gram)
    apart = torch.empty_like(weight)
    for own, inner in ((mask, codec.salient), (~mask, codec.rest)):
        apart[:, own] = Encoder(ErrorFeedback())(
            weight[:, own].contiguous(), inner, Gram(gram.matrix[own][:, own].contiguous(), 1)
        )[1]
    together = loss(str(codec), weight, gram)
    assert together < 0.9 * distortion(weight - apart, gram)
    assert together < loss(str(codec), weight, gram, Nearest())
    assert loss(f"{codec}:again3", weight, gram) <= together


def test_the_set_with_fewer_bits_goes_first_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(5)
    best = loss("cols(int4:row,bin:row):24", weight, gram)
    monkeypatch.setattr("tersor.codecs.columns._order", lambda *_: (0, 1))
    assert best < 0.95 * loss("cols(int4:row,bin:row):24", weight, gram)


def test_a_gram_matrix_that_cannot_be_factored_leaves_the_sets_apart() -> None:
    weight, _ = problem(6)
    for matrix in (torch.zeros(COLUMNS, COLUMNS), torch.eye(COLUMNS) - torch.ones(COLUMNS, COLUMNS)):
        values = Encoder(ErrorFeedback())(weight, parse("cols(int4:row,bin:row):0.25"), Gram(matrix, 1))[1]
        assert torch.isfinite(values).all()


@pytest.mark.parametrize(
    "text", ["cols(int4:row,bin:row):0.25", "colscale(bin:row)", "sparse2of4", "sparse2of4(int4:row)"]
)
@pytest.mark.parametrize("calibrated", [True, False])
def test_zero_rows_and_dead_inputs(text: str, calibrated: bool) -> None:
    weight, gram = problem(7)
    weight[2] = 0
    weight[:, 11] = 0
    matrix = gram.matrix.clone()
    matrix[7], matrix[:, 7] = 0, 0
    tensors, values = Encoder(ErrorFeedback())(weight, parse(text), Gram(matrix, 9) if calibrated else None)
    assert torch.isfinite(values).all()
    assert values[2].abs().max() < 1e-4
    assert torch.equal(parse(text).decode(tensors, (ROWS, COLUMNS)), values)


def test_column_factors_help_where_columns_differ() -> None:
    weight, gram = problem(8)
    uneven = weight * torch.logspace(-1, 0.5, COLUMNS)
    assert loss("colscale(bin:row)", uneven, gram) < 0.5 * loss("bin:row", uneven, gram)
    assert loss("colscale(bin:row)", weight, gram) < loss("bin:row", weight, gram)
    assert loss("colscale(bin:row):again3", uneven, gram) <= loss("colscale(bin:row)", uneven, gram)


def test_a_row_factor_times_a_column_factor_is_found_exactly() -> None:
    generator = torch.Generator().manual_seed(10)
    signs = torch.randint(0, 2, (ROWS, COLUMNS), generator=generator) * 2.0 - 1
    row, column = torch.rand(ROWS, 1, generator=generator) + 0.1, torch.rand(COLUMNS, generator=generator) + 0.1
    weight = signs * row * column
    for gram in (None, correlated_gram(COLUMNS)):
        values = Encoder(Nearest())(weight, parse("colscale(bin:row)"), gram)[1]
        assert float((weight - values).norm() / weight.norm()) < 1e-3


def test_column_factors_are_least_squares_for_the_values_found() -> None:
    weight, gram = problem(11)
    tensors, values = Encoder(ErrorFeedback())(weight, parse("colscale(bin:row)"), gram)
    least = distortion(weight - values, gram)
    inner = values / tensors["column"].float()
    for seed in range(20):
        moved = tensors["column"].float() * (1 + 0.02 * gaussian(1, COLUMNS, seed)[0])
        assert least <= distortion(weight - inner * moved, gram) * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_any_n_of_m(sizes: tuple[int, int], rows: int, groups: int, seed: int) -> None:
    kept, group = sizes
    codec, shape = SemiStructured(kept, group), (rows, groups * group)
    assert parse(str(codec)) == codec
    weight = gaussian(*shape, seed=seed)
    tensors, values = Encoder(Nearest())(weight, codec, None)
    width = math.ceil(math.log2(math.comb(group, kept)))
    assert codec.bits(shape) == 8 * rows * math.ceil(groups * width / 8) + 16 * rows * groups * kept
    assert codec.bits(shape) == 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert torch.equal(codec.decode(tensors, shape), values)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert np.array_equal(plain.decode(str(codec), arrays, *shape, _inner_decode), values.numpy())
    nonzero = (values != 0).reshape(rows, groups, group)
    assert (nonzero.sum(2) == kept).all()
    # Nothing that was dropped is larger than what was kept beside it.
    size = weight.abs().reshape(rows, groups, group)
    least = torch.where(nonzero, size, torch.inf).amin(2)
    assert (least >= torch.where(nonzero, 0.0, size).amax(2)).all()


def test_subsets_are_numbered_in_lexicographic_order() -> None:
    codec = SemiStructured(2, 4)
    for number, members in enumerate(itertools.combinations(range(4), 2)):
        weight = torch.zeros(1, 4)
        weight[0, list(members)] = 1.0
        assert codec.choose(weight, None)[0].tolist() == [[number]]
    assert codec.columns(torch.tensor([[0, 5]])).tolist() == [[0, 1, 6, 7]]


@pytest.mark.parametrize(("kept", "group"), [(3, 4), (2, 4), (4, 8), (8, 16)])
def test_weights_that_go_one_by_one_are_better_chosen_than_all_at_once(kept: int, group: int) -> None:
    weight, gram = problem(14)
    score = (weight.abs() * gram.matrix.diagonal().sqrt()).reshape(ROWS, -1, group)
    largest = torch.zeros_like(score).scatter_(2, score.topk(kept, 2).indices, 1.0).flatten(1)
    codec = SemiStructured(kept, group)
    chosen = torch.zeros_like(weight).scatter_(1, codec.columns(codec.choose(weight, gram)[0]), 1.0)
    assert torch.equal(chosen.reshape(ROWS, -1, group).sum(2), torch.full((ROWS, COLUMNS // group), float(kept)))
    at_once, in_turn = (distortion(weight - refit(weight, s, gram.matrix, weight, 32), gram) for s in (largest, chosen))
    # The first weight of a group to go is the same either way.
    assert torch.equal(chosen, largest) if kept == group - 1 else in_turn < 0.97 * at_once


def test_kept_weights_are_refitted() -> None:
    weight, gram = problem(12)
    codec = SemiStructured(2, 4)
    at = codec.columns(codec.choose(weight, gram)[0])
    support = torch.zeros_like(weight).scatter_(1, at, 1.0)
    before = distortion(weight * (1 - support), gram)
    after = distortion(weight - refit(weight, support, gram.matrix, weight, 32), gram)
    # What solving each row's equations exactly, with the same damping, would give.
    matrix = gram.matrix.double()
    matrix = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(COLUMNS)
    exact = torch.zeros(ROWS, COLUMNS)
    for row in range(ROWS):
        own = at[row]
        right = (weight[row].double() @ matrix)[own]
        exact[row, own] = torch.linalg.solve(matrix[own][:, own], right).float()
    assert after < 0.8 * before
    assert after == pytest.approx(distortion(weight - exact, gram), rel=0.02)
    assert loss("sparse2of4", weight, gram) == pytest.approx(after, rel=1e-3)


@pytest.mark.parametrize("inner", ["int3:row", "lut2:row", "fp4:e2m1:g16"])
def test_feedback_on_a_fixed_support_beats_nearest(inner: str) -> None:
    weight, gram = problem(15)
    text = f"sparse2of4({inner})"
    near, fed, swept = (loss(text, weight, gram, s) for s in (Nearest(), ErrorFeedback(), CoordinateDescent()))
    # What rounding adds to what dropping half of the weights costs anyway.
    dropped = loss("sparse2of4", weight, gram)
    assert dropped < swept <= fed
    assert fed - dropped < 0.9 * (near - dropped)


def test_rows_keep_their_own_support_when_encoded_apart() -> None:
    weight, gram = problem(16)
    codec = parse("sparse2of4(int4:row)")
    whole = Encoder(ErrorFeedback())(weight, codec, gram)[1]
    part = Encoder(ErrorFeedback())(weight[11:29], codec, gram)[1]
    # A matrix product may round differently for other numbers of rows; a code on a tie may then differ.
    assert (whole[11:29] != part).float().mean() < 0.02


def test_refitting_never_makes_a_row_worse() -> None:
    weight, _ = problem(13)
    rank_one = torch.ones(COLUMNS, COLUMNS) + 1e-4 * torch.eye(COLUMNS)
    support = torch.zeros(ROWS, COLUMNS)
    support[:, ::3] = 1.0
    found = refit(weight, support, rank_one, weight, 32)
    before, after = (((e @ rank_one) * e).sum(1) for e in (weight * (1 - support), weight - found))
    assert (after <= before * (1 + 1e-5)).all()
    assert (found[support == 0] == 0).all()


@pytest.mark.parametrize("text", ["cols(int4:g8,bin:row):16", "colscale(bin:row)", "sparse3of8(int3:row)"])
def test_numpy_declares_the_same_parts_and_refuses_damage(text: str) -> None:
    weight, gram = problem(14)
    tensors, values = Encoder(CoordinateDescent())(weight, parse(text), gram)
    arrays = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
    declared = plain.parts(text, ROWS, COLUMNS, _inner_parts)
    assert {name: shape for name, (_, shape) in declared.items()} == {name: a.shape for name, a in arrays.items()}
    assert np.array_equal(plain.decode(text, arrays, ROWS, COLUMNS, _inner_decode), values.numpy())
    for name in ("mask", "patterns"):
        if name in arrays:
            arrays[name][:] = 255
            with pytest.raises(ValueError, match="found"):
                plain.decode(text, arrays, ROWS, COLUMNS, _inner_decode)
            # torch reads something, and nothing out of bounds.
            damaged = parse(text).decode({n: torch.from_numpy(a) for n, a in arrays.items()}, (ROWS, COLUMNS))
            assert damaged.shape == (ROWS, COLUMNS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cols(int4:row,bin:row)", "write cols"),
        ("cols(int4:row):0.2", "write cols"),
        ("cols(int4:row,bin:row):1.5", "write cols"),
        ("cols(int4:row,bin:row):0.2:inputs:inputs", "write cols"),
        ("cols(int4:row,bin:row):0.0", "share"),
        ("cols(int4:row,rows(4:bf16)):0.2", "around it"),
        ("colscale(int4:row,bin:row)", "write colscale"),
        ("colscale(int4:row):again0", "write colscale"),
        ("colscale(rows(4:bf16))", "around it"),
        ("sparse4of4", "fewer than all"),
        ("sparse2of17", "at most 16"),
        ("sparse2of4:fast", "write sparse"),
        ("sparse2of4(rows(4:bf16))", "around it"),
    ],
)
def test_unreadable_texts_say_why(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_parameters_out_of_range_are_refused() -> None:
    inner = parse("int4:row")
    with pytest.raises(BadInput, match=r"2\.5"):
        ColumnSplit(inner, inner, 2.5)
    with pytest.raises(BadInput, match="100 times"):
        ColumnSplit(inner, inner, 3, rounds=100)
    with pytest.raises(BadInput, match="-1 times"):
        ColumnScaled(inner, -1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"20 inputs.*sets 20"):
        parse("cols(int4:row,bin:row):20").parts((4, 20))
    with pytest.raises(ShapeMismatch, match="1 inputs"):
        parse("cols(int4:row,bin:row):0.2").parts((4, 1))
    with pytest.raises(ShapeMismatch, match="64 does not divide 19"):
        parse("cols(int4:g64,bin:row):0.2").parts((4, 96))
    with pytest.raises(ShapeMismatch, match="group of 4 does not divide 30"):
        parse("sparse2of4").parts((4, 30))
    with pytest.raises(ValueError, match="does not divide 30"):
        plain.parts("sparse2of4", 4, 30, _inner_parts)
    with pytest.raises(ValueError, match="20 of 20"):
        plain.parts("cols(int4:row,bin:row):20", 4, 20, _inner_parts)
