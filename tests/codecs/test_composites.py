"""Codecs made of others, and those that choose their own representation: one suite for all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs import parse
from tersor.contracts import Gram
from tersor.errors import BadInput, ShapeMismatch
from tersor.kernels.hadamard import rotate, unrotate
from tersor.solvers import CoordinateDescent, Encoder, ErrorFeedback, Nearest

TEXTS = [
    "rot(int3:g32)",
    "rot(lut3:row):seed5",
    "rot(fp4:e2m1:g32:s8)",
    "rot(sum(int2:g32,lowrank4))",
    "sum(int3:g32,lowrank6)",
    "sum(int2:g32,lowrank6:plain):again2",
    "sum(sparse1,int3:row,lowrank2)",
    "sum(int2:g32,int2:g32)",
    "sparse2.5",
    "sparse2.5:magnitude",
    "cols(int4:row,bin:row):0.2",
    "cols(int4:g16,bin:g40):16:inputs",
    "cols(int3:row,colscale(bin:row)):19:again1",
    "weights(int8:row,bin:row):0.05",
    "weights(int4:g4,bin2:g8:s8):0.25:magnitude",
    "weights(fp16,sum(bin:row,lowrank2)):0.1",
    "rot(weights(lut3:row,ternary:row):0.3)",
    "colscale(int2:g24:s8)",
    "colscale(bin:row):again2",
    "rot(cols(int4:row,sum(bin:row,lowrank2)):0.125)",
    "klt16(int3:g32)",
    "klt(int3:row):weights",
    "sparse2of4",
    "sparse4of8(int4:row)",
    "sparse3of16(lut2:row)",
    "lowrank12",
    "coded(int4:row):3.3",
    "coded(ternary:g32):1.9",
    "rot(coded(int5:row:asym:s8):3.2)",
    "lowrank5(int8:row)",
    "sum(int2:g32,lowrank6(int4:g4):plain):again1",
    "bitstack3:k2",
    "bitstack1:k5:plain",
    "sum(bitstack1:k1,int2:g32)",
]
ROWS, COLUMNS = 72, 96


def problem(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Gram]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[3, 5] = 2.0
    weight[7] = 0.0
    return weight, Gram(x.T @ x / len(x), len(x))


def distortion(error: Tensor, gram: Gram) -> float:
    return float(((error @ gram.matrix) * error).sum())


@pytest.mark.parametrize("text", TEXTS)
class TestEveryCodec:
    def test_parts_bits_and_round_trip(self, text: str) -> None:
        codec = parse(text)
        assert str(codec) == text
        assert parse(str(codec)) == codec
        weight, gram = problem()
        before = weight.clone()
        tensors, values = Encoder(ErrorFeedback())(weight, codec, gram)
        assert torch.equal(weight, before)
        declared = codec.parts((ROWS, COLUMNS))
        assert {part.name for part in declared} == set(tensors)
        for part in declared:
            assert (tensors[part.name].dtype, tuple(tensors[part.name].shape)) == (part.dtype, part.shape)
        assert codec.bits((ROWS, COLUMNS)) == 8 * sum(tensor.nbytes for tensor in tensors.values())
        assert torch.equal(codec.decode(tensors, (ROWS, COLUMNS)), values)
        assert torch.isfinite(values).all()

    def test_any_rows_decode_alone(self, text: str) -> None:
        codec = parse(text)
        weight, gram = problem(1)
        tensors, values = Encoder(Nearest())(weight, codec, gram)
        for rows in (slice(8, 21), slice(5, 5), slice(None), torch.tensor([71, 0, 0, 30]), torch.tensor([]).long()):
            assert torch.equal(codec.decode_rows(tensors, (ROWS, COLUMNS), rows), values[rows])

    def test_workers_do_not_change_the_bytes(self, text: str) -> None:
        weight, gram = problem(2, rows=1100)
        one, _ = Encoder(ErrorFeedback(), workers=1)(weight, parse(text), gram)
        two, _ = Encoder(ErrorFeedback(), workers=2)(weight, parse(text), gram)
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("inner", ["int2:g32", "int3:row", "lut2:row"])
def test_feedback_in_the_rotated_basis_beats_nearest(inner: str) -> None:
    weight, gram = problem(3)
    codec = parse(f"rot({inner})")
    losses = [
        distortion(weight - Encoder(solver)(weight, codec, gram)[1], gram)
        for solver in (CoordinateDescent(), ErrorFeedback(), Nearest())
    ]
    assert losses[0] <= losses[1] < 0.8 * losses[2]


def test_rotation_helps_where_outliers_hurt() -> None:
    weight, _ = problem(4)
    weight[:, ::16] *= 10.0
    plain, turned = (
        float((weight - Encoder(Nearest())(weight, parse(text), None)[1]).square().sum())
        for text in ("int3:row", "rot(int3:row)")
    )
    assert turned < 0.6 * plain


def test_the_correction_lowers_the_error_and_again_never_raises_it() -> None:
    weight, gram = problem(5)
    texts = ["int2:g32", "sum(int2:g32,lowrank6)", "sum(int2:g32,lowrank6):again3"]
    losses = [distortion(weight - Encoder(ErrorFeedback())(weight, parse(text), gram)[1], gram) for text in texts]
    assert losses[2] <= losses[1] < losses[0]


def test_low_rank_is_the_best_of_its_rank() -> None:
    weight, gram = problem(6)
    values = Encoder(Nearest())(weight, parse("lowrank12"), gram)[1]
    metric = torch.linalg.cholesky(gram.matrix.double())
    tail = torch.linalg.svdvals(weight.double() @ metric)[12:].square().sum()
    assert distortion((weight - values).double().float(), gram) == pytest.approx(float(tail), rel=0.02)
    full = parse(f"lowrank{COLUMNS}")
    wide, wide_gram = problem(6, rows=24)
    assert torch.allclose(Encoder(Nearest())(wide, full, wide_gram)[1], wide, atol=3e-3)


def test_sparse_keeps_what_costs_most() -> None:
    weight, gram = problem(7)
    values = Encoder(Nearest())(weight, parse("sparse1"), gram)[1]
    cost = weight.square() * gram.matrix.diagonal()
    kept = values != 0
    assert int(kept.sum()) == round(ROWS * COLUMNS / 100)
    assert cost[kept].min() >= cost[~kept].max()
    assert torch.allclose(values[kept], weight[kept], rtol=1e-3)


def test_sparse_keeps_the_largest_or_the_steepest() -> None:
    weight, gram = problem(7)
    steep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    for text, score in (("sparse1:magnitude", weight.abs()), ("sparse1:gradient", steep)):
        values = Encoder(Nearest())(weight, parse(text), replace(gram, gradients=steep))[1]
        kept = values != 0
        assert int(kept.sum()) == round(ROWS * COLUMNS / 100)
        assert score[kept].min() >= score[~kept].max()
    with pytest.raises(BadInput, match="write sparse1, which goes by the inputs"):
        parse("sparse1:gradient").encode(weight, gram)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_rotation_of_any_size_is_orthogonal(size: int, seed: int) -> None:
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    turned = rotate(rows, seed)
    assert torch.allclose(unrotate(turned, seed), rows, atol=1e-5)
    assert torch.allclose(turned @ turned.T, rows @ rows.T, atol=1e-3)
    assert torch.equal(rotate(rows[1:2], seed), turned[1:2])
    if size > 1:
        spread = rotate(torch.eye(size)[:1], seed)
        assert float(spread.abs().max()) < 1.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rot()", "Unknown codec"),
        ("rot(int3:g32,int4:g32)", "write rot"),
        ("rot(int3:g32):fast", "write rot"),
        ("sum(int3:g32)", "fewer than two"),
        ("sum(int3:g32,rows(4:bf16))", "around it"),
        ("sum(int3:g32,int2:g32):twice", "write sum"),
        ("sparse0", "more than 0"),
        ("sparse1:g32", "sparse<percent>"),
        ("lowrank0", "at least 1"),
        ("lowrank4:x", "lowrank<rank>"),
        ("lowrank4(int8:row,int8:row)", "lowrank<rank>"),
        ("lowrank4(bf16)", "no codes"),
        ("lowrank0(int8:row)", "at least 1"),
    ],
)
def test_unreadable_texts_say_why(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"8 inputs.*rank is 12"):
        parse("lowrank12").parts((64, 8))
    with pytest.raises(ShapeMismatch, match="576"):
        parse("rot(int3:g128)").parts((4, 576))
