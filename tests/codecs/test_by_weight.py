"""Weights split in two sets: sizes, which are salient, solving on whole rows, and what is refused."""

from __future__ import annotations

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
from tersor.codecs import WeightSplit, parse
from tersor.codecs.interleaved import Interleaved
from tersor.contracts import Encoded, Gram, LeafCodec, Solver
from tersor.errors import BadInput, ShapeMismatch
from tersor.solvers import Alternating, CoordinateDescent, Encoder, ErrorFeedback, LearnedRounding, Nearest

ROWS, COLUMNS = 40, 96
PAIRS = ["int8:row,bin:row", "int4:row:asym:s8,bin2:row", "lut3:row,ternary:row", "sint5:row,fp4:e2m1:row:bf16"]
SOLVERS: list[Solver] = [
    Nearest(),
    ErrorFeedback(),
    ErrorFeedback(order="natural", refit=False),
    CoordinateDescent(),
    Alternating(rounds=2),
    LearnedRounding(iterations=10),
]


def split(text: str) -> WeightSplit:
    codec = parse(text)
    assert isinstance(codec, WeightSplit)
    return codec


def problem(seed: int = 0, columns: int = COLUMNS) -> tuple[Tensor, Gram]:
    """Weights with heavy tails, and inputs that go together."""
    weight = gaussian(ROWS, columns, seed) * 0.05
    return weight * (1 + gaussian(ROWS, columns, seed + 100).square()), correlated_gram(columns, seed + 1)


def distortion(error: Tensor, gram: Gram) -> float:
    return float(((error @ gram.matrix) * error).double().sum())


def loss(text: str, weight: Tensor, gram: Gram, solver: Solver) -> float:
    return distortion(weight - Encoder(solver)(weight, parse(text), gram)[1], gram)


def interleaved(text: str, weight: Tensor, gram: Gram) -> Interleaved:
    codec = split(text)
    assert isinstance(codec.salient, LeafCodec)
    assert isinstance(codec.rest, LeafCodec)
    return Interleaved(codec.salient, codec.rest, codec.count(weight.shape[1]), codec.mask(weight, gram))


@pytest.mark.parametrize(("share", "count"), [("0.05", 5), ("0.2", 19), ("0.001", 1), ("0.989", 95)])
def test_a_row_takes_a_mask_and_what_both_codecs_take(share: str, count: int) -> None:
    codec = split(f"weights(int8:row,bin:row):{share}")
    assert codec.count(COLUMNS) == count
    assert codec.bits((ROWS, COLUMNS)) == ROWS * (COLUMNS + 8 * count + 16 + 8 * math.ceil((COLUMNS - count) / 8) + 16)


def test_salient_weights_are_those_of_each_row_that_cost_most() -> None:
    weight, gram = problem()
    cost = weight.square() * gram.matrix.diagonal()
    for text, given_gram, score in (
        ("weights(int8:row,bin:row):0.1", gram, cost),
        ("weights(int8:row,bin:row):0.1:magnitude", gram, weight.abs()),
        ("weights(int8:row,bin:row):0.1", None, weight.abs()),
    ):
        mask = split(text).mask(weight, given_gram)
        assert (mask.sum(1) == 10).all()
        assert (torch.where(mask, score, torch.inf).amin(1) >= torch.where(mask, 0.0, score).amax(1)).all()
        tensors, _ = Encoder(ErrorFeedback())(weight, parse(text), given_gram)
        stored = np.unpackbits(tensors["mask"].numpy(), axis=1, bitorder="little")[:, :COLUMNS]
        assert np.array_equal(stored.astype(bool), mask.numpy())


def test_of_equally_costly_weights_the_first_are_salient() -> None:
    mask = split("weights(int8:row,bin:row):0.25").mask(torch.ones(3, 8), None)
    assert mask.tolist() == [[True] * 2 + [False] * 6] * 3


@settings(max_examples=60, deadline=None)
@given(
    share=st.integers(1, 999_999),
    by=st.sampled_from(["cost", "magnitude"]),
    rows=st.integers(1, 5),
    columns=st.integers(2, 40),
    seed=st.integers(0, 2**31),
)
def test_any_share_of_any_rows(share: int, by: str, rows: int, columns: int, seed: int) -> None:
    codec = WeightSplit(parse("int5:row"), parse("bin:row"), share / 1e6, by)  # type: ignore[arg-type]
    assert parse(str(codec)) == codec
    count = max(round(columns * share / 1e6), 1)
    if count >= columns:
        assert not codec.accepts((rows, columns))
        return
    weight = gaussian(rows, columns, seed)
    tensors, values = Encoder(Nearest())(weight, codec, None)
    assert codec.bits((rows, columns)) == 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert torch.equal(codec.decode(tensors, (rows, columns)), values)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert np.array_equal(plain.decode(str(codec), arrays, rows, columns, _inner_decode), values.numpy())


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_solver_works_on_whole_rows(pair: str, solver: Solver) -> None:
    weight, gram = problem(1)
    weight[2] = 0
    matrix = gram.matrix.clone()
    matrix[7], matrix[:, 7] = 0, 0
    gram = Gram(matrix, gram.tokens)
    codec = parse(f"weights({pair}):0.1")
    before, matrix_before = weight.clone(), matrix.clone()
    tensors, values = Encoder(solver)(weight, codec, gram)
    assert torch.equal(weight, before)
    assert torch.equal(matrix, matrix_before)
    assert torch.equal(codec.decode(tensors, (ROWS, COLUMNS)), values)
    assert torch.isfinite(values).all()
    assert values[2].abs().max() < 1e-4
    if not isinstance(solver, Nearest):
        assert distortion(weight - values, gram) < 0.97 * loss(str(codec), weight, gram, Nearest())


@pytest.mark.parametrize("pair", PAIRS)
def test_values_are_fixed_points_and_survive_packing(pair: str) -> None:
    weight, gram = problem(2)
    codec = interleaved(f"weights({pair}):0.1", weight, gram)
    solver = ErrorFeedback()
    encoded = solver.solve(weight, codec, solver.prepare(gram))
    values = codec.values(encoded, COLUMNS)
    codes, rounded = codec.round(values, encoded.side, torch.arange(COLUMNS))
    assert torch.allclose(rounded, values, rtol=1e-6, atol=0)
    assert (codes != encoded.codes).float().mean() < 0.01  # equal entries of a table may swap
    # One column at a time gives what all at once gives.
    for column in (0, 41, 95):
        one = torch.tensor([column])
        assert torch.equal(codec.round(weight[:, one], encoded.side, one)[0][:, 0],
                           codec.round(weight, encoded.side, torch.arange(COLUMNS))[0][:, column])  # fmt: skip
    tensors = codec.pack(encoded, (ROWS, COLUMNS))
    assert {part.name: part.shape for part in codec.parts((ROWS, COLUMNS))} == {n: t.shape for n, t in tensors.items()}
    again = codec.unpack(tensors, (ROWS, COLUMNS))
    assert torch.equal(again.codes, encoded.codes)
    assert torch.equal(codec.decode(tensors, (ROWS, COLUMNS)), values)


@pytest.mark.parametrize("pair", PAIRS)
def test_feedback_over_both_sets_beats_nearest_and_each_set_by_itself(pair: str) -> None:
    weight, gram = problem(3)
    text = f"weights({pair}):0.1"
    near, fed, swept = (loss(text, weight, gram, s) for s in (Nearest(), ErrorFeedback(), CoordinateDescent()))
    assert swept < fed < 0.85 * near
    codec = split(text)
    mask = codec.mask(weight, gram)
    apart = torch.empty_like(weight)
    for own, inner in ((mask, codec.salient), (~mask, codec.rest)):
        apart[own] = Encoder(ErrorFeedback())(weight[own].reshape(ROWS, -1), inner, None)[1].flatten()
    assert fed < 0.8 * distortion(weight - apart, gram)


def test_refitted_scales_are_least_squares_of_both_codecs_together() -> None:
    weight, gram = problem(4)
    codec = interleaved("weights(int4:row,bin:row):0.2", weight, gram)
    solver = ErrorFeedback(refit=False)
    encoded = solver.solve(weight, codec, solver.prepare(gram))
    side = codec.refit(weight, encoded, gram.matrix)
    values = codec.values(Encoded(encoded.codes, side), COLUMNS)
    before = weight - codec.values(encoded, COLUMNS)
    error = weight - values
    rows_before, rows_after = (((e @ gram.matrix) * e).sum(1) for e in (before, error))
    assert (rows_after <= rows_before * (1 + 1e-5)).all()
    assert rows_after.sum() < 0.99 * rows_before.sum()
    # The normal equations: what is left is orthogonal to both codecs' values, but for float16.
    for own in (codec.mask, ~codec.mask):
        part = torch.where(own, values, 0.0)
        size = ((part @ gram.matrix) * part).sum(1)
        assert (((part @ gram.matrix) * error).sum(1).abs() < 2e-3 * size).all()


def test_codecs_that_are_not_single_scalars_of_one_group_are_encoded_side_by_side() -> None:
    weight, gram = problem(5, 320)
    for pair, share in (
        ("int8:g16,bin:g16", 0.2),
        ("q4_k,bin:row", 0.8),
        ("e8p:row,bin:row", 0.2),
        ("fp16,bin:row", 0.1),
    ):
        codec = split(f"weights({pair}):{share}")
        assert codec._whole(codec.mask(weight, gram)) is None
        tensors, values = Encoder(ErrorFeedback())(weight, codec, gram)
        assert torch.equal(codec.decode(tensors, (ROWS, 320)), values)
        assert distortion(weight - values, gram) < loss("bin:row", weight, gram, Nearest())
    kept = Encoder(ErrorFeedback())(weight, codec, gram)[1]
    mask = codec.mask(weight, gram)
    assert torch.equal(kept[mask], weight[mask].half().float())


@pytest.mark.parametrize("text", ["weights(int8:row,bin:row):0.1", "weights(fp16,int3:g4):0.25"])
def test_chunks_of_rows_are_encoded_as_in_the_whole(text: str) -> None:
    weight, gram = problem(6)
    codec, encoder = split(text), Encoder(ErrorFeedback())
    assert codec.by_rows
    whole = encoder(weight, codec, gram)[1]
    part = encoder.rows(weight[11:29], codec, gram)[1]
    # A matrix product may round differently for other numbers of rows; a code on a tie may then differ.
    assert (whole[11:29] != part).float().mean() < 0.02
    assert not split("weights(trellis2:L8,bin:row):0.5").by_rows


@pytest.mark.parametrize("text", ["weights(int8:row,bin:row):0.1", "weights(int4:g4,trellis2:L8):0.25:magnitude"])
def test_rows_decode_alone(text: str) -> None:
    weight, gram = problem(7)
    tensors, values = Encoder(ErrorFeedback())(weight, parse(text), gram)
    for rows in (slice(3, 17), slice(5, 5), slice(None), torch.tensor([39, 0, 0]), torch.tensor([]).long()):
        assert torch.equal(parse(text).decode_rows(tensors, (ROWS, COLUMNS), rows), values[rows])


def test_numpy_declares_the_same_parts_and_refuses_damage() -> None:
    text = "weights(int8:row,bin:row):0.1"
    weight, gram = problem(8)
    tensors, values = Encoder(CoordinateDescent())(weight, parse(text), gram)
    arrays = {name: tensor.numpy().copy() for name, tensor in tensors.items()}
    declared = plain.parts(text, ROWS, COLUMNS, _inner_parts)
    assert {name: shape for name, (_, shape) in declared.items()} == {name: a.shape for name, a in arrays.items()}
    assert np.array_equal(plain.decode(text, arrays, ROWS, COLUMNS, _inner_decode), values.numpy())
    for byte in (0, 255):
        arrays["mask"][5] = byte
        with pytest.raises(ValueError, match=f"expected 10 weights.*found {COLUMNS if byte else 0}"):
            plain.decode(text, arrays, ROWS, COLUMNS, _inner_decode)
        # torch reads something, and nothing out of bounds; other rows are as they were.
        damaged = parse(text).decode({name: torch.from_numpy(array) for name, array in arrays.items()}, (ROWS, COLUMNS))
        assert torch.equal(damaged[6:], values[6:])
    for wrong in ("weights(int8:row,bin:row)", "weights(int8:row):0.1", "weights(int8:row,bin:row):0.0"):
        with pytest.raises(ValueError, match="not of the form"):
            plain.parts(wrong, ROWS, COLUMNS, _inner_parts)
    with pytest.raises(ValueError, match="sets 1 of 1"):
        plain.parts(text, 4, 1, _inner_parts)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("weights(int8:row,bin:row)", "write weights"),
        ("weights(int8:row):0.2", "write weights"),
        ("weights(int8:row,bin:row):2", "write weights"),
        ("weights(int8:row,bin:row):0.1234567", "write weights"),
        ("weights(int8:row,bin:row):0.2:0.3", "write weights"),
        ("weights(int8:row,bin:row):0.2:magnitude:magnitude", "write weights"),
        ("weights(int8:row,bin:row):0.2:inputs", "write weights"),
        ("weights(int8:row,bin:row):0.0", "cannot choose 0.0 of the weights.*between 0 and 1"),
        ("weights(int8:row,rows(4:bf16)):0.2", "around it"),
        ("weight(int8:row,bin:row):0.2", "Did you mean weights"),
    ],
)
def test_unreadable_texts_say_why(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, 0.1234567, math.nan])
def test_shares_out_of_range_are_refused(share: float) -> None:
    inner = parse("int4:row")
    with pytest.raises(BadInput, match=f"cannot choose {share} of the weights"):
        WeightSplit(inner, inner, share)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"1 inputs: it sets 1 weights"):
        parse("weights(int8:row,bin:row):0.2").parts((4, 1))
    with pytest.raises(ShapeMismatch, match=r"10 inputs: it sets 10 weights"):
        parse("weights(int8:row,bin:row):0.96").parts((4, 10))
    with pytest.raises(ShapeMismatch, match="64 does not divide 19"):
        parse("weights(int4:g64,bin:row):0.2").parts((4, 96))
