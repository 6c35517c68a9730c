"""The stored basis of `klt`: orthonormal by construction, exact in size, and worth what transform coding says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.artifact.decoder_numpy import DecodeError, decode_weight, parse_codec, parts_of
from tersor.artifact.header import DTYPE_NAMES
from tersor.codecs import PrincipalBasis, parse
from tersor.contracts import Gram, Solver
from tersor.errors import BadInput, ShapeMismatch
from tersor.kernels.givens import count, factored, stages, turn, unturn
from tersor.solvers import CoordinateDescent, Encoder, ErrorFeedback, Nearest

TEXTS = [
    "klt4(int3:g32)",
    "klt16(int4:row)",
    "klt32(lut3:row):weights",
    "klt(int4:row)",
    "klt8(trellis2:L8)",
    "klt16(ectcq3)",
    "klt8(sum(int2:g32,lowrank4))",
    "klt16(cols(int6:row,int2:row):0.25)",
    "klt4(coded(int5:row):3.2):weights",
    "klt16(rot(int3:row))",
    "rot(klt16(fp4:e2m1:g32:s8))",
]
ROWS, COLUMNS = 72, 96


def problem(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Gram]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[7] = 0.0
    return weight, Gram(x.T @ x / len(x), len(x))


def neighbours(columns: int, size: int, correlation: float) -> Gram:
    """Inputs correlated within blocks, and not between them."""
    place = torch.arange(size)
    block = correlation ** (place[:, None] - place).abs().double()
    return Gram(torch.block_diag(*[block] * (columns // size)).float(), 1000)


def lost(text: str, solver: Solver, weight: Tensor, gram: Gram) -> float:
    """Mean distortion of a weight."""
    codec = parse(text)
    error = weight - Encoder(solver)(weight, codec, gram)[1]
    return float(((error @ gram.matrix) * error).double().mean())


@pytest.mark.parametrize("text", TEXTS)
class TestEveryCodec:
    def test_parts_bits_and_round_trip(self, text: str) -> None:
        codec = parse(text)
        assert str(codec) == text
        assert parse(str(codec)) == codec
        assert hash(parse(text)) == hash(codec)
        weight, gram = problem()
        before, gram_before = weight.clone(), gram.matrix.clone()
        tensors, values = Encoder(ErrorFeedback())(weight, codec, gram)
        assert torch.equal(weight, before)
        assert torch.equal(gram.matrix, gram_before)
        declared = codec.parts((ROWS, COLUMNS))
        assert {part.name for part in declared} == set(tensors)
        for part in declared:
            assert (tensors[part.name].dtype, tuple(tensors[part.name].shape)) == (part.dtype, part.shape)
        assert codec.bits((ROWS, COLUMNS)) == 8 * sum(tensor.nbytes for tensor in tensors.values())
        assert torch.equal(codec.decode(tensors, (ROWS, COLUMNS)), values)
        assert torch.isfinite(values).all()
        assert values[7].abs().max() < 1e-4
        for rows in (slice(8, 21), slice(5, 5), torch.tensor([71, 0, 0, 30])):
            assert torch.equal(codec.decode_rows(tensors, (ROWS, COLUMNS), rows), values[rows])

    def test_workers_do_not_change_the_bytes(self, text: str) -> None:
        weight, gram = problem(2, rows=600)
        one, _ = Encoder(ErrorFeedback(), workers=1)(weight, parse(text), gram)
        two, _ = Encoder(ErrorFeedback(), workers=2)(weight, parse(text), gram)
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_without_a_gram_matrix(self, text: str) -> None:
        weight, _ = problem(4)
        tensors, values = Encoder(Nearest())(weight, parse(text), None)
        assert torch.equal(parse(text).decode(tensors, (ROWS, COLUMNS)), values)
        assert float((weight - values).square().sum()) < 0.5 * float(weight.square().sum())

    def test_numpy_decodes_alike(self, text: str) -> None:
        weight, gram = problem(3, rows=40)
        tensors, values = Encoder(Nearest())(weight, parse(text), gram)
        arrays = {name: (DTYPE_NAMES[tensor.dtype], tensor.numpy()) for name, tensor in tensors.items()}
        mine = parse_codec(text)
        assert {name: (dtype, raw.shape) for name, (dtype, raw) in arrays.items()} == parts_of(mine, 40, COLUMNS)
        found = decode_weight(mine, 40, COLUMNS, lambda name, a, b: (arrays[name][0], arrays[name][1][a:b]))
        assert found.dtype == np.float32
        assert np.array_equal(found, values.numpy())


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 33), blocks=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_any_angles_are_an_orthonormal_basis(size: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    angles = torch.randint(-128, 128, (blocks, count(size)), generator=generator, dtype=torch.int8)
    width = size * blocks
    basis = turn(torch.eye(width, dtype=torch.float64), angles)
    assert torch.allclose(basis @ basis.T, torch.eye(width, dtype=torch.float64), atol=1e-5)
    inside = torch.block_diag(*[torch.ones(size, size)] * blocks).bool()
    assert not basis[~inside].any()
    rows = torch.randn(3, width, generator=generator)
    turned = turn(rows, angles)
    assert torch.allclose(turned, rows @ basis.float(), atol=1e-5)
    assert torch.allclose(unturn(turned, angles), rows, atol=1e-5)
    assert torch.equal(unturn(turned[1:2], angles), unturn(turned, angles)[1:2])


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 33), seed=st.integers(0, 2**32))
def test_angles_find_a_basis_again(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(2, size, size, generator=generator, dtype=torch.float64)).Q
    found = turn(torch.eye(2 * size, dtype=torch.float64), factored(basis))
    for block, wanted in enumerate(basis):
        here = slice(block * size, (block + 1) * size)
        # An angle is rounded by 0.23 degrees in the mean square at most; a vector takes part in few of them at a time.
        assert float((found[here, here] * wanted).sum(0).abs().min()) > 1 - 2e-4 * size


def test_each_pair_of_vector_and_coordinate_has_one_rotation() -> None:
    for size in range(2, 20):
        seen = set()
        for first, last, low, row in stages(size):
            places = [low + 2 * index for index in range(last - first)]
            assert places[0] >= 0
            assert places[-1] + 1 < size
            seen |= {(row + index, place + 1) for index, place in enumerate(places)}
        assert seen == {(row, place) for row in range(size) for place in range(row + 1, size)}


def test_white_inputs_stay_as_they_are() -> None:
    weight, _ = problem()
    codec = parse("klt16(int4:row)")
    assert isinstance(codec, PrincipalBasis)
    assert not codec.angles(weight, Gram(torch.eye(COLUMNS), 10)).any()
    plain = Encoder(Nearest())(weight, parse("int4:row"), Gram(torch.eye(COLUMNS), 10))[1]
    assert torch.equal(Encoder(Nearest())(weight, codec, Gram(torch.eye(COLUMNS), 10))[1], plain)


@pytest.mark.parametrize("size", [4, 16])
def test_energy_is_compacted_as_theory_says(size: int) -> None:
    """Inputs ``ρ^|i−j|``: ``det H = (1 − ρ²)^(N−1)``, which says what transform coding gains, the basis not counted."""
    correlation, columns = 0.9, 192
    weight = torch.randn(512, columns, generator=torch.Generator().manual_seed(0))
    gram = neighbours(columns, size, correlation)
    gain = -0.5 * (size - 1) / size * math.log2(1 - correlation**2)
    plain, turned, even = (
        lost(text, Nearest(), weight, gram) for text in ("ectcq4:t4", f"klt{size}(ectcq4:t4)", f"klt{size}(int8:row)")
    )
    assert 0.5 * math.log2(plain / turned) == pytest.approx(gain, abs=0.09)
    # Even steps gain nothing but what a search for clips finds, which goes by the columns that matter: the trace of H
    # is the same in every basis.
    assert 0.5 * math.log2(lost("int8:row", Nearest(), weight, gram) / even) == pytest.approx(0, abs=0.1)
    # Neither does feedback, which has the gain of any basis.
    plain, turned = (lost(text, ErrorFeedback(), weight, gram) for text in ("ectcq4:t4", f"klt{size}(ectcq4:t4)"))
    assert 0.5 * math.log2(plain / turned) == pytest.approx(0, abs=0.06)


def test_finer_steps_for_larger_directions_gain() -> None:
    """Six bits for a quarter of the directions, three for the rest, rounded to nearest."""
    weight = torch.randn(256, 192, generator=torch.Generator().manual_seed(1))
    gram = neighbours(192, 16, 0.95)
    text = "cols(int6:row,int3:row):0.25:inputs"
    plain, turned = (lost(t, Nearest(), weight, gram) for t in (text, f"klt16({text})"))
    # Nine tenths of the energy are in the first quarter of the directions.
    assert turned < 0.4 * plain


def test_even_steps_under_feedback_lose_in_the_whole_basis() -> None:
    """With no correlation left, feedback has nothing to do: pivots are eigenvalues, and their mean is largest."""
    weight, gram = problem(5, rows=256)
    solver = ErrorFeedback()
    factor = solver.prepare(gram)
    plain, turned = (lost(text, solver, weight, gram) for text in ("int8:row", "klt(int8:row)"))
    expected = float(gram.matrix.diagonal().mean() / factor.pivots.mean())
    assert expected > 1.5
    assert turned / plain == pytest.approx(expected, rel=0.1)


def test_weights_of_few_directions_are_cheaper_in_their_own_basis() -> None:
    generator = torch.Generator().manual_seed(6)
    mix = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q * torch.logspace(0, -2, 16)
    weight = (torch.randn(512, 12, 16, generator=generator) @ mix.T).reshape(512, 192)
    gram = Gram(torch.eye(192), 100)
    plain, turned = (lost(t, ErrorFeedback(), weight, gram) for t in ("ectcq4:t4", "klt16(ectcq4:t4):weights"))
    # The directions' deviations have a geometric mean of a tenth; what a row loses of that is the angles' rounding.
    assert turned < 0.2 * plain


@pytest.mark.parametrize("inner", ["int2:g32", "int3:row", "lut2:row"])
def test_feedback_is_never_worse_than_nearest(inner: str) -> None:
    weight, gram = problem(3)
    losses = [
        lost(f"klt16({inner})", solver, weight, gram) for solver in (CoordinateDescent(), ErrorFeedback(), Nearest())
    ]
    assert losses[0] <= losses[1] < losses[2]


def test_zero_weights_and_dead_inputs() -> None:
    weight, gram = problem(8)
    dead = gram.matrix.clone()
    dead[5] = 0
    dead[:, 5] = 0
    for text in ("klt16(int3:row)", "klt(ectcq3)"):
        values = Encoder(ErrorFeedback())(weight, parse(text), Gram(dead, 10))[1]
        assert torch.isfinite(values).all()
        nothing = Encoder(ErrorFeedback())(torch.zeros_like(weight), parse(text), gram)[1]
        assert nothing.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("klt()", "Unknown codec"),
        ("klt16", "write klt"),
        ("klt16(int3:g32,int4:g32)", "write klt"),
        ("klt16(int3:g32):fast", "write klt"),
        ("klt5(int3:g32)", "4, 8, 16, 32, 64"),
        ("klt128(int3:g32)", "4, 8, 16, 32, 64"),
        ("klt8(rows(4:bf16))", "around it"),
    ],
)
def test_unreadable_texts_say_why(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"12 inputs.*64 columns do not.*use klt4, klt"):
        parse("klt64(int3:row)").parts((4, 12))
    with pytest.raises(ShapeMismatch, match=r"1 inputs.*codec inside"):
        parse("klt(int3:row)").parts((4, 1))
    with pytest.raises(ShapeMismatch, match="576"):
        parse("klt16(int3:g128)").parts((4, 576))
    for text in ("klt5(int3:row)", "klt16(int3:row):fast", "klt64(int3:row)"):
        with pytest.raises((DecodeError, ValueError), match=r"not known|cannot be read"):
            parts_of(parse_codec(text), 4, 100)


def test_scales_inside_can_be_tuned_through_the_basis() -> None:
    weight, gram = problem(9)
    codec = parse("klt16(int3:row)")
    tensors, values = Encoder(ErrorFeedback())(weight, codec, gram)
    scale = tensors["k_scale"].float().requires_grad_(True)
    codec.decode({**tensors, "k_scale": scale}, (ROWS, COLUMNS)).square().sum().backward()
    assert scale.grad is not None
    # Twice the energy of a row over its scale, as turning leaves energies as they are.
    expected = 2 * values.square().sum(1, keepdim=True) / scale.detach()
    assert torch.allclose(scale.grad, expected, rtol=1e-3, atol=1e-6)
