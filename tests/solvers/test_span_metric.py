"""Vector codes chosen in the metric of what error feedback leaves of their span, and the codebooks they come from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leaf_checks import correlated_gram, gaussian, leaf
from tersor.codecs import Codebook
from tersor.contracts import Encoded, Gram, LeafCodec
from tersor.solvers import Encoder, ErrorFeedback

SPAN, PLAIN = ErrorFeedback(refit=False), ErrorFeedback(refit=False, metric="plain")
CODEBOOKS = ["vq6x4", "vq8x6", "vq5x4:r2", "vq4x6:r3", "vq10x3"]


def uneven_gram(columns: int, seed: int) -> Gram:
    """Neighbours correlated, and energies from 1 to a thousand times the least, in no order."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.5 * torch.diag(torch.ones(columns - 1), 1)
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    x *= torch.logspace(-1.5, 0, columns)[torch.randperm(columns, generator=generator)]
    return Gram(x.T @ x / len(x), len(x))


def learned(text: str, weight: Tensor, gram: Gram | None) -> LeafCodec:
    codec = leaf(text).learn(weight, gram)
    assert isinstance(codec, LeafCodec)
    return codec


def solved(solver: ErrorFeedback, codec: LeafCodec, weight: Tensor, gram: Gram) -> Encoded:
    return solver.solve(weight, codec, solver.prepare(gram, codec.span))


def distortion(codec: LeafCodec, encoded: Encoded, weight: Tensor, gram: Gram) -> float:
    error = (weight - codec.values(encoded, weight.shape[1])).double()
    return float(((error @ gram.matrix.double()) * error).sum())


@pytest.mark.parametrize("text", CODEBOOKS)
@pytest.mark.parametrize("make", [correlated_gram, uneven_gram])
def test_never_worse_than_plain_distance_on_average(text: str, make) -> None:  # type: ignore[no-untyped-def]
    gains = []
    for seed in range(6):
        weight, gram = gaussian(48, 96, seed), make(96, seed + 10)
        codec = learned(text, weight, gram)
        plain, span = (distortion(codec, solved(one, codec, weight, gram), weight, gram) for one in (PLAIN, SPAN))
        gains.append(math.log(span / plain))
    assert sum(gains) / len(gains) < (-0.1 if make is uneven_gram else 0.0)


@pytest.mark.parametrize("text", CODEBOOKS)
def test_codewords_stay(text: str) -> None:
    gram, numbers = uneven_gram(96, 1), torch.arange(96)
    codec, side = learned(text, gaussian(64, 96), gram), {"scale": torch.linspace(0.1, 3, 64)[:, None].half().float()}
    _, weight = codec.round(gaussian(64, 96, seed=3) * side["scale"], side, numbers)
    stays = (codec.round(weight, side, numbers)[1] == weight).reshape(64, -1, codec.span).all(2)
    assert float(stays.float().mean()) > 0.95  # a search through sums need not find again what it has found
    roots = SPAN.prepare(gram, codec.span).roots
    assert roots is not None
    for index, root in enumerate(roots):
        here = slice(index * codec.span, (index + 1) * codec.span)
        _, values = codec.round_span(weight[:, here], side, numbers[here], root)
        assert torch.equal(values[stays[:, index]], weight[:, here][stays[:, index]])


@pytest.mark.parametrize("text", [*CODEBOOKS, "e8p:row", "pvq2:n16"])
@pytest.mark.parametrize("power", [1e-4, 1.0, 300.0])
def test_the_same_where_all_columns_count_alike(text: str, power: float) -> None:
    weight, gram = gaussian(24, 96), Gram(power * torch.eye(96), 10)
    codec = learned(text, weight, gram)
    same = solved(SPAN, codec, weight, gram).codes == solved(PLAIN, codec, weight, gram).codes
    assert float(same.float().mean()) > 0.999


@pytest.mark.parametrize("text", ["e8p:row", "pvq2:n16", "iq3_s"])
def test_codecs_without_it_go_by_their_own_metric(text: str) -> None:
    weight, gram = gaussian(8, 256), correlated_gram(256)
    codec = learned(text, weight, gram)
    assert torch.equal(solved(SPAN, codec, weight, gram).codes, solved(PLAIN, codec, weight, gram).codes)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), dim=st.integers(2, 6), power=st.floats(0.0, 2.0))
def test_one_stage_is_exact(seed: int, dim: int, power: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    entries, target = torch.randn(64, dim, generator=generator), torch.randn(30, dim, generator=generator)
    root = torch.triu(torch.randn(dim, dim, generator=generator)) + torch.eye(dim)
    root *= 10.0 ** (power * torch.rand(dim, generator=generator))
    codec = Codebook(6, dim, book=entries[None])
    chosen = codec.closest_under(target, root).long()
    loss = ((target[:, None] - entries).double() @ root.double()).square().sum(2)
    assert torch.allclose(loss.gather(1, chosen[:, None])[:, 0], loss.amin(1), rtol=1e-3, atol=1e-5)


def test_losses_of_spans_are_the_distortion() -> None:
    weight, gram = gaussian(16, 96), uneven_gram(96, 3)
    codec, factor = learned("vq6x4", weight, gram), ErrorFeedback(damping=0.0).prepare(gram, 4)
    encoded = ErrorFeedback(damping=0.0, refit=False).solve(weight, codec, factor)
    error = (weight - codec.values(encoded, 96))[:, factor.order].double()
    # What stands where a span is rounded: its own error, and those before it by the mixing matrix.
    pulled = error - error @ factor.mixing.double()
    assert factor.roots is not None
    rooted = torch.einsum("rjc,jcd->rjd", pulled.reshape(16, 24, 4), factor.roots.double())
    weights = factor.pivots.double().reshape(24, 4).mean(1)
    total = (rooted.square().sum(2) * weights).sum()
    assert float(total) == pytest.approx(distortion(codec, encoded, weight, gram), rel=1e-4)


def test_few_great_weights_at_great_inputs_get_entries() -> None:
    weight = gaussian(1024, 384)
    rows = torch.randperm(1024, generator=torch.Generator().manual_seed(4))[:12]
    columns = 32 * torch.arange(12)
    weight[rows, columns] = torch.linspace(12, 36, 12) * (1 - 2 * (torch.arange(12) // 3 % 2))
    diagonal = torch.ones(384)
    diagonal[columns] = 100.0
    _, values = Encoder(ErrorFeedback())(weight, leaf("vq10x3"), Gram(torch.diag(diagonal), 10))
    assert float((values[rows, columns] / weight[rows, columns] - 1).abs().max()) < 0.1


def test_surveys_know_results_by_what_a_solver_prints() -> None:
    assert repr(ErrorFeedback()) == "ErrorFeedback(damping=0.01, order='activation', block=128, refit=True)"
    assert repr(PLAIN).endswith("refit=False, metric='plain')")
