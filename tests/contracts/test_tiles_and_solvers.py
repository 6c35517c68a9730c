"""The same suite for leaf codecs that code several rows together: any whole tiles, with every solver."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.codecs import parse
from tersor.contracts import Gram, LeafCodec, Solver
from tersor.solvers import CoordinateDescent, Encoder, ErrorFeedback, Nearest

LEAVES = [
    "trellis1:L8",
    "trellis2:L8",
    "trellis2:L10",
    "trellis3:L8",
    "trellis4:L8",
    "block4:8x16",
    "block3:7x24:shift:fp16",
]
SOLVERS: list[Solver] = [Nearest(), ErrorFeedback(), ErrorFeedback(order="natural"), CoordinateDescent(sweeps=1)]
ROWS, IN = 300, 48


def leaf(text: str) -> LeafCodec:
    codec = parse(text)
    assert isinstance(codec, LeafCodec)
    return codec


def correlated(rows: int, seed: int = 0) -> tuple[Tensor, Gram]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=generator) * torch.linspace(2, 0.05, IN)
    x = torch.randn(4 * IN, IN, generator=generator) @ mix
    return torch.randn(rows, IN, generator=generator) * 0.05, Gram(x.T @ x / len(x), len(x))


def distortion(error: Tensor, gram: Gram) -> float:
    return float(((error @ gram.matrix) * error).sum())


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("text", LEAVES)
class TestEveryPair:
    def test_bits_round_trip_and_purity(self, text: str, solver: Solver) -> None:
        weight, gram = correlated(ROWS)
        before = weight.clone()
        codec = leaf(text)
        tensors, values = Encoder(solver)(weight, codec, gram)
        assert torch.equal(weight, before)
        declared = codec.parts((ROWS, IN))
        tiles = -(-ROWS // codec.tile(ROWS))
        assert tiles > 1
        assert {part.name for part in declared} == set(tensors)
        for part in declared:
            assert (tensors[part.name].dtype, tuple(tensors[part.name].shape)) == (part.dtype, part.shape)
            assert part.shape[0] in (ROWS, tiles)
        assert codec.bits((ROWS, IN)) == 8 * sum(tensor.nbytes for tensor in tensors.values())
        assert torch.equal(codec.decode(tensors, (ROWS, IN)), values)
        for rows in (slice(140, 171), slice(7, 7), torch.tensor([299, 0, 151, 152])):
            assert torch.equal(codec.decode_rows(tensors, (ROWS, IN), rows), values[rows])

    def test_whole_tiles_are_independent(self, text: str, solver: Solver) -> None:
        weight, gram = correlated(ROWS)
        codec = leaf(text).learn(weight, gram)
        encoder, tile = Encoder(solver), codec.tile(ROWS)
        _, whole = Encoder(solver)(weight, leaf(text), gram)
        for start in range(0, ROWS, tile):
            part = encoder.rows(weight[start : start + tile], codec, gram)[1]
            assert (whole[start : start + tile] != part).float().mean() < 0.02

    def test_never_worse_than_nearest(self, text: str, solver: Solver) -> None:
        weight, gram = correlated(ROWS, seed=3)
        _, values = Encoder(solver)(weight, leaf(text), gram)
        _, plain = Encoder(Nearest())(weight, leaf(text), gram)
        limit = 1.0 if isinstance(solver, Nearest) else 0.97
        assert distortion(weight - values, gram) <= limit * distortion(weight - plain, gram)

    def test_zero_rows_and_dead_inputs(self, text: str, solver: Solver) -> None:
        weight, gram = correlated(64)
        weight[2] = 0
        dead = gram.matrix.clone()
        dead[7] = 0
        dead[:, 7] = 0
        _, values = Encoder(solver)(weight, leaf(text), Gram(dead, gram.tokens))
        assert torch.isfinite(values).all()
        assert values[2].abs().max() < 1e-4

    def test_values_are_fixed_points(self, text: str, solver: Solver) -> None:
        weight, gram = correlated(64)
        codec = leaf(text).learn(weight, gram)
        encoded = solver.solve(weight, codec, solver.prepare(gram, codec.span))
        values = codec.values(encoded, IN)
        _, rounded = codec.round(values, encoded.side, torch.arange(IN))
        assert torch.allclose(rounded, values, rtol=1e-5, atol=0)
