"""Learned rounding: never worse than where it began, better than nearest, and codecs that it cannot take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tersor.codecs import parse
from tersor.contracts import Encoded, Gram, LeafCodec, ScalarGrid
from tersor.errors import BadInput
from tersor.solvers import Encoder, ErrorFeedback, LearnedPerturbation, LearnedRounding, Nearest
from tersor.solvers.learned_rounding import neighbours

SCALAR = ["int2:g64", "int3:g32:asym", "int2:g64:s8", "fp4:e2m1:g32", "lut2:row", "ternary:g64"]
SOLVERS = [LearnedRounding(iterations=60), LearnedPerturbation(iterations=60)]
IN = 192


def leaf(text: str) -> LeafCodec:
    codec = parse(text)
    assert isinstance(codec, LeafCodec)
    return codec


def layer(rows: int = 40, columns: int = IN, seed: int = 0) -> tuple[Tensor, Gram]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(2, 0.05, columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator) * 0.05, Gram(x.T @ x / len(x), len(x))


def losses(weight: Tensor, codec: LeafCodec, encoded: Encoded, gram: Gram) -> Tensor:
    shape = (weight.shape[0], weight.shape[1])
    decoded = codec.decode(codec.pack(encoded, shape), shape)
    assert torch.equal(decoded, codec.values(encoded, shape[1]))
    error = weight - decoded
    return ((error @ gram.matrix) * error).double().sum(1)


@pytest.mark.parametrize("solver", SOLVERS, ids=["rounding", "perturbation"])
@pytest.mark.parametrize("text", SCALAR)
def test_no_row_is_worse_than_its_start_and_most_are_better(text: str, solver: LearnedRounding) -> None:
    weight, gram = layer()
    codec = leaf(text)
    first = losses(weight, codec, Nearest().solve(weight, codec, gram), gram)
    found = losses(weight, codec, solver.solve(weight, codec, solver.prepare(gram)), gram)
    assert bool((found <= first * (1 + 1e-5)).all())
    assert float(found.sum()) < (0.8 if isinstance(solver, LearnedRounding) else 0.9) * float(first.sum())
    feedback = ErrorFeedback(refit=False)
    began = losses(weight, codec, feedback.solve(weight, codec, feedback.prepare(gram)), gram)
    other = replace(solver, start=feedback)
    assert bool((losses(weight, codec, other.solve(weight, codec, other.prepare(gram)), gram) <= began * 1.00001).all())


@pytest.mark.parametrize("dominant", [0.0, 300.0])
@pytest.mark.parametrize("solver", SOLVERS, ids=["rounding", "perturbation"])
def test_slopes_in_bfloat16_lead_as_far(solver: LearnedRounding, dominant: float) -> None:
    weight, gram = layer(seed=5)
    # As where a few inputs are a hundred times all others: what errors put out in that direction must all but cancel.
    direction = torch.nn.functional.normalize(torch.randn(IN, generator=torch.Generator().manual_seed(6)), dim=0)
    power = dominant**2 * float(gram.matrix.diagonal().mean())
    gram = Gram(gram.matrix + power * torch.outer(direction, direction), gram.tokens)
    codec, sums = leaf("int2:g64"), []
    for mixed in (False, True):
        one = replace(solver, mixed=mixed)
        sums.append(float(losses(weight, codec, one.solve(weight, codec, one.prepare(gram)), gram).sum()))
    assert sums[0] != sums[1]
    assert sums[1] == pytest.approx(sums[0], rel=0.05)


def test_more_steps_lower_the_error() -> None:
    weight, gram = layer(seed=4)
    codec, sums = leaf("int2:g64"), []
    for steps in (0, 20, 150):
        solver = LearnedRounding(iterations=steps)
        sums.append(float(losses(weight, codec, solver.solve(weight, codec, solver.prepare(gram)), gram).sum()))
    assert sums[0] > sums[1] > sums[2]


@pytest.mark.parametrize("text", ["int3:g32", "fp4:e2m1:g64"])
def test_rounding_goes_up_or_down_and_no_further(text: str) -> None:
    weight, gram = layer()
    codec, solver = leaf(text), LearnedRounding(iterations=40)
    prepared = solver.prepare(gram)
    first = solver.start.solve(weight, codec, prepared.start)
    grid = codec.grid(first.side, IN)
    assert grid is not None
    lower, low, step = neighbours(weight, grid)
    codes = solver.learn(weight, codec, first, grid, gram.matrix).codes
    assert bool(((codes == lower) | (codes == lower + 1)).all())
    between = (codes > 0) & (lower < grid.levels - 2) & (lower > 0)
    assert bool(((weight >= low - 1e-6) & (weight <= low + step + 1e-6))[between].all())


def test_neighbours_of_grids_with_offsets_and_negative_scales() -> None:
    weight = torch.tensor([[0.1, -0.3, 0.6, -2.0]])
    grid = ScalarGrid(torch.tensor([[-0.25]]), torch.tensor([[3.0]]), None, 8, 4, torch.tensor([[0.1]]))
    lower, low, step = neighbours(weight, grid)
    second = (lower + 1 - 3.0) * -0.25 - 0.1
    assert torch.allclose(low + step, second)
    inside = slice(0, 3)
    assert bool(((weight <= low + 1e-6) & (weight >= second - 1e-6))[0, inside].all())
    assert int(lower[0, 3]) == 6


@pytest.mark.parametrize("solver", SOLVERS, ids=["rounding", "perturbation"])
@pytest.mark.parametrize("text", ["vq6x4", "e8p:row", "trellis2:L8", "pvq2:n16"])
def test_what_has_no_list_of_values_is_left_to_error_feedback(text: str, solver: LearnedRounding) -> None:
    weight, gram = layer(rows=64, columns=48)
    ours, theirs = (Encoder(one)(weight, parse(text), gram)[1] for one in (solver, ErrorFeedback()))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("solver", SOLVERS, ids=["rounding", "perturbation"])
def test_zero_rows_dead_inputs_and_threads(solver: LearnedRounding) -> None:
    weight, gram = layer(rows=1030)
    weight[2] = 0
    dead = gram.matrix.clone()
    dead[7] = 0
    dead[:, 7] = 0
    short = replace(solver, iterations=8)
    results = [Encoder(short, workers=n)(weight, parse("int3:g64"), Gram(dead, gram.tokens)) for n in (1, 2)]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.isfinite(results[0][1]).all()
    assert results[0][1][2].abs().max() < 1e-4


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(BadInput, match="-1 steps"):
        LearnedRounding(iterations=-1)
    with pytest.raises(BadInput, match="rate of 0"):
        LearnedPerturbation(rate=0.0)
