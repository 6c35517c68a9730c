"""Stacks of signs and low-rank magnitudes: best of their rank, cut anywhere, scaled by the inputs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leaf_checks import NAMES, correlated_gram, gaussian
from tersor.artifact import decoder_numpy_sign_magnitude as by_numpy
from tersor.codecs import BitStack, parse
from tersor.codecs.sign_magnitude import SignedMagnitudes, leading_factors
from tersor.contracts import Encoded, Gram, Solver
from tersor.errors import BadInput, ShapeMismatch
from tersor.solvers import CoordinateDescent, Encoder, ErrorFeedback, Nearest


def loss(
    weight: Tensor, text: str, gram: Gram | None, judge: Gram | None = None, solver: Solver | None = None
) -> float:
    """Error of the output under ``judge``, of the weight itself where there is none."""
    error = weight - Encoder(solver or Nearest())(weight, parse(text), gram)[1]
    return float(((error if judge is None else error @ judge.matrix) * error).sum())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 21),
    columns=st.integers(1, 37),
    stages=st.integers(1, 8),
    rank=st.integers(1, 6),
    plain=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_in_the_bits_declared(
    rows: int, columns: int, stages: int, rank: int, plain: bool, seed: int
) -> None:
    codec = BitStack(stages, rank, plain)
    assert parse(str(codec)) == codec
    if rank > columns:
        with pytest.raises(ShapeMismatch, match=f"{columns} inputs.*rank is {rank}"):
            codec.parts((rows, columns))
        return
    weight = gaussian(rows, columns, seed)
    before = weight.clone()
    tensors, values = Encoder(ErrorFeedback())(weight, codec, correlated_gram(columns, seed))
    assert torch.equal(weight, before)
    declared = {part.name: (part.dtype, part.shape) for part in codec.parts((rows, columns))}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == declared
    stage = rows * -(-columns // 8) + 2 * rank * (rows + columns)
    assert codec.bits((rows, columns)) == 8 * (stages * stage + (0 if plain else 2 * columns))
    assert torch.equal(codec.decode(tensors, (rows, columns)), values)
    assert torch.isfinite(values).all()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert {name: (NAMES[dtype], shape) for name, (dtype, shape) in declared.items()} == by_numpy.parts(
        str(codec), rows, columns
    )
    assert np.array_equal(by_numpy.decode(str(codec), arrays, rows, columns), values.numpy())
    picks = torch.tensor([rows - 1, 0])
    assert torch.equal(codec.decode_rows(tensors, (rows, columns), picks), values[picks])


@pytest.mark.parametrize("suffix", ["", ":plain"])
@pytest.mark.parametrize("solver", [Nearest(), ErrorFeedback(), CoordinateDescent(sweeps=1)], ids=str)
def test_a_stack_can_be_cut_after_any_stage(suffix: str, solver: Solver) -> None:
    weight, gram = gaussian(40, 56), correlated_gram(56)
    whole = Encoder(solver)(weight, parse(f"bitstack5:k2{suffix}"), gram)[0]
    for stages in range(1, 6):
        codec = parse(f"bitstack{stages}:k2{suffix}")
        own = Encoder(solver)(weight, codec, gram)[0]
        names = {part.name for part in codec.parts((40, 56))}
        assert all(torch.equal(own[name], whole[name]) for name in names)
        kept = {name: tensor for name, tensor in whole.items() if name in names}
        assert torch.equal(codec.decode(kept, (40, 56)), codec.decode(own, (40, 56)))


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
@pytest.mark.parametrize("rank", [1, 3, 16])
def test_the_magnitudes_are_the_best_of_their_rank(shape: tuple[int, int], rank: int) -> None:
    size = gaussian(*shape).abs().double()
    left, right = leading_factors(size, rank)
    tail = float(torch.linalg.svdvals(size)[rank:].square().sum())
    assert float((size - left @ right).square().sum()) == pytest.approx(tail, rel=2e-3)
    assert torch.allclose(left.norm(dim=0), right.norm(dim=1))
    assert (right.gather(1, right.abs().argmax(1, keepdim=True)) > 0).all()


def test_each_stage_and_each_rank_lowers_the_error() -> None:
    weight = gaussian(128, 256)
    stages = [loss(weight, f"bitstack{stages}:k1", None) for stages in range(1, 9)]
    # |w| of a unit Gaussian has the variance 1 − 2/π, and the best two planes of one scale for all leave .1334.
    assert stages[0] / weight.numel() == pytest.approx(1 - 2 / torch.pi, rel=0.03)
    assert stages[1] / weight.numel() == pytest.approx(0.1334, rel=0.04)
    assert all(after < 0.9 * before for before, after in pairwise(stages))
    ranks = [loss(weight, f"bitstack2:k{rank}", None) for rank in (1, 4, 16, 64)]
    assert ranks == sorted(ranks, reverse=True)
    assert loss(weight, "bitstack1:k128", None) < 1e-4 * weight.numel()


def test_scales_of_the_inputs_lower_what_the_output_loses() -> None:
    weight, gram = gaussian(64, 96), correlated_gram(96)
    assert loss(weight, "bitstack2:k4", gram, gram) < 0.95 * loss(weight, "bitstack2:k4:plain", gram, gram)
    assert loss(weight, "bitstack2:k4", None) == loss(weight, "bitstack2:k4:plain", gram)


@pytest.mark.parametrize("text", ["bitstack1:k2", "bitstack2:k1", "bitstack3:k4:plain"])
def test_feedback_and_sweeps_beat_the_nearest_signs(text: str) -> None:
    weight, gram = gaussian(64, 96), correlated_gram(96)
    solvers: list[Solver] = [CoordinateDescent(), ErrorFeedback(), Nearest()]
    losses = [loss(weight, text, gram, gram, solver) for solver in solvers]
    assert losses == sorted(losses)
    assert losses[0] < 0.8 * losses[2]


def test_a_left_factor_fitted_again_is_never_worse() -> None:
    weight, gram = gaussian(40, 56, 3), correlated_gram(56)
    stage = SignedMagnitudes(3).learn(weight, gram)
    encoded = Nearest().solve(weight, stage, gram)
    refitted = Encoded(encoded.codes, stage.refit(weight, encoded, gram.matrix))
    before, after = (
        ((error @ gram.matrix) * error).double().sum(1)
        for found in (encoded, refitted)
        for error in (weight - stage.values(found, 56),)
    )
    assert (after <= before).all()
    assert float(after.sum()) < 0.98 * float(before.sum())
    with pytest.raises(ValueError, match="learn"):
        SignedMagnitudes(3).prepare(weight)


def test_zero_rows_dead_inputs_and_extremes() -> None:
    weight, gram = gaussian(12, 40), correlated_gram(40)
    weight[3] = 0
    dead = gram.matrix.clone()
    dead[5] = 0
    dead[:, 5] = 0
    dead[6] *= 1e12
    dead[:, 6] *= 1e12
    codec = BitStack(3, 2)
    for solver in (Nearest(), ErrorFeedback()):
        values = Encoder(solver)(weight, codec, Gram(dead, 100))[1]
        assert torch.isfinite(values).all()
        assert not values[3].any()
    for scale in (0.0, 1e-4, 1e3):
        values = Encoder(Nearest())(weight * scale, codec, None)[1]
        assert float((values - weight * scale).square().sum()) <= 0.2 * scale**2 * float(weight.square().sum())
    silent = Gram(torch.zeros(40, 40), 100)
    assert torch.equal(Encoder(Nearest())(weight, codec, silent)[0]["scale"], torch.ones(40, dtype=torch.float16))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bitstack0:k2", "1 to 8 stages"),
        ("bitstack9:k2", "1 to 8 stages"),
        ("bitstack2:k0", "at least 1"),
        ("bitstack2", "write bitstack"),
        ("bitstack2:k1:k2", "write bitstack"),
        ("bitstack2:k1:fast", "write bitstack"),
        ("bitstack2(int8:row):k1", "write bitstack"),
    ],
)
def test_unreadable_texts_say_why(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_the_numpy_decoder_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="not of the form"):
        by_numpy.parts("bitstack2:k1:fast", 3, 8)
    with pytest.raises(ValueError, match="rank of 9 is more than 8"):
        by_numpy.parts("bitstack2:k9", 3, 8)


@pytest.mark.parametrize("plain", [False, True])
def test_a_growing_stack_is_what_shorter_stacks_are(plain: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gram = torch.randn(24, 32, generator=generator), Gram(torch.diag(torch.arange(1.0, 33.0)), 64)
    encoder = Encoder(ErrorFeedback())
    for stages, (tensors, values) in enumerate(BitStack(4, 2, plain).growing(weight, gram, encoder), 1):
        expected, decoded = encoder(weight, BitStack(stages, 2, plain), gram)
        assert torch.equal(values, decoded)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
