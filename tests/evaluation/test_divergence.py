"""Divergence, perplexity and agreement against a dense float64 calculation."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.errors import BadInput, NotFinite
from tersor.evaluation.divergence import (
    DivergenceAccumulator,
    TokenComparison,
    compare_logits,
    compare_sequence,
    join,
    mean_and_error,
    noise_floor,
)


def logits(seed: int, n: int, vocabulary: int, scale: float) -> Tensor:
    return torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def dense_kl(reference: Tensor, compressed: Tensor) -> Tensor:
    """In float64, by the definition."""
    log_p, log_q = (torch.log_softmax(x.double(), -1) for x in (reference, compressed))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def comparison(*kl: float, loss: float = 1.0, reference_loss: float = 1.0) -> TokenComparison:
    n = len(kl)
    return TokenComparison(
        torch.tensor(kl), torch.full((n,), reference_loss), torch.full((n,), loss), torch.ones(n, dtype=torch.bool)
    )


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 70),
    vocabulary=st.integers(2, 300),
    scale=st.floats(0.0, 30.0),
    noise=st.floats(0.0, 10.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_against_dense_float64(
    seed: int, n: int, vocabulary: int, scale: float, noise: float, dtype: torch.dtype
) -> None:
    reference = logits(seed, n, vocabulary, scale).to(dtype)
    compressed = (reference.float() + logits(seed + 1, n, vocabulary, noise)).to(dtype)
    targets = torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(seed))
    before = reference.clone(), compressed.clone()
    found = compare_logits(reference, compressed, targets)
    expected = dense_kl(reference, compressed)
    torch.testing.assert_close(found.kl.double(), expected, atol=3e-7, rtol=2e-5)
    for values, source in ((found.reference_loss, reference), (found.loss, compressed)):
        loss = torch.nn.functional.cross_entropy(source.double(), targets, reduction="none")
        torch.testing.assert_close(values.double(), loss, atol=2e-5, rtol=1e-5)
    assert torch.equal(found.agrees, reference.argmax(-1) == compressed.argmax(-1))
    assert bool((found.kl >= 0).all())
    assert torch.equal(reference, before[0])
    assert torch.equal(compressed, before[1])


@pytest.mark.parametrize(("scale", "kl", "allowed"), [(1e-3, 5e-7, 3e-3), (1e-2, 5e-5, 1e-4), (1e-1, 5e-3, 1e-5)])
def test_small_divergences_are_not_lost_in_rounding(scale: float, kl: float, allowed: float) -> None:
    """On a vocabulary of real size. Summing ``p·(log p − log q)`` alone is off by 5 % at 5e-7 nats."""
    reference = logits(0, 64, 50_000, 3.0)
    compressed = reference + logits(1, 64, 50_000, scale)
    found = float(compare_logits(reference, compressed, torch.zeros(64, dtype=torch.int64)).kl.double().mean())
    expected = float(dense_kl(reference, compressed).mean())
    assert expected == pytest.approx(kl, rel=0.1)
    assert found == pytest.approx(expected, rel=allowed)


@given(seed=st.integers(0, 1000), scale=st.floats(0, 200), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_identical_logits_diverge_by_exactly_zero(seed: int, scale: float, dtype: torch.dtype) -> None:
    same = logits(seed, 9, 200, scale).to(dtype)
    same[:, 3] = float("-inf")
    found = compare_logits(same, same.clone(), torch.zeros(9, dtype=torch.int64))
    assert torch.equal(found.kl, torch.zeros(9))
    assert torch.equal(found.loss, found.reference_loss)
    assert bool(found.agrees.all())


def test_rows_do_not_depend_on_which_others_are_there() -> None:
    reference, compressed = logits(0, 100, 1000, 3.0), logits(1, 100, 1000, 3.0)
    targets = torch.arange(100)
    whole = compare_logits(reference, compressed, targets)
    cuts = [slice(0, 1), slice(1, 40), slice(40, 97), slice(97, 100)]
    pieces = compare_sequence((reference[c], compressed[c], targets[c]) for c in cuts)
    added = sum(
        (compare_logits(reference[c], compressed[c], targets[c]) for c in cuts[1:]),
        start=compare_logits(reference[cuts[0]], compressed[cuts[0]], targets[cuts[0]]),
    )
    for other in (pieces, added):
        for name in ("kl", "loss", "reference_loss", "agrees"):
            assert torch.equal(getattr(whole, name), getattr(other, name))


def test_far_logits_neither_overflow_nor_underflow() -> None:
    reference = torch.tensor([[0.0, 200.0, -200.0], [0.0, 0.0, 0.0]])
    compressed = torch.tensor([[200.0, 0.0, -200.0], [300.0, 0.0, -300.0]])
    found = compare_logits(reference, compressed, torch.tensor([1, 2]))
    torch.testing.assert_close(found.kl.double(), dense_kl(reference, compressed))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_not_finite_are_refused(bad: float, which: int) -> None:
    pair = [torch.zeros(4, 5), torch.zeros(4, 5)]
    pair[which][2, 1] = bad
    with pytest.raises(NotFinite, match=("reference", "compressed")[which]):
        compare_logits(pair[0], pair[1], torch.zeros(4, dtype=torch.int64))


def test_a_possible_token_with_probability_zero_is_refused() -> None:
    compressed = torch.zeros(1, 5)
    compressed[0, 1] = float("-inf")
    with pytest.raises(NotFinite, match="divergence or loss is infinite"):
        compare_logits(torch.zeros(1, 5), compressed, torch.tensor([0]))
    with pytest.raises(NotFinite, match="divergence or loss is infinite"):
        compare_logits(compressed, compressed, torch.tensor([1]))


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5), (3,)), ((3, 4), (3, 4), (2,)), ((1, 3, 4), (1, 3, 4), (1,))])
def test_shapes_that_do_not_fit_are_refused(shapes: Any) -> None:
    reference, compressed = (torch.zeros(shape) for shape in shapes[:2])
    with pytest.raises(BadInput, match="cannot be compared"):
        compare_logits(reference, compressed, torch.zeros(shapes[2], dtype=torch.int64))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=8),
    seed=st.integers(0, 1000),
)
def test_mean_and_error_against_the_textbook(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.rand(n, generator=generator, dtype=torch.float64) for n in lengths]
    mean, error = mean_and_error(sequences)
    assert mean == pytest.approx(float(torch.cat(sequences).mean()))
    if len(set(lengths)) == 1:
        means = torch.stack([s.mean() for s in sequences])
        assert error == pytest.approx(float(means.std(correction=1)) / math.sqrt(len(lengths)))
    again = mean_and_error([torch.cat([s, s]) for s in sequences])
    assert again == (pytest.approx(mean), pytest.approx(error))


def test_the_error_covers_what_new_text_would_give() -> None:
    """Over many texts, the standard deviation of the mean is what each text's standard error says."""
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        level = torch.rand(12, 1, generator=generator, dtype=torch.float64)
        mean, error = mean_and_error(list(level + 0.3 * torch.rand(12, 20, generator=generator, dtype=torch.float64)))
        means.append(mean)
        errors.append(error)
    spread = float(torch.tensor(means).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.12)


def test_one_sequence_takes_its_tokens_as_independent() -> None:
    values = torch.rand(50, dtype=torch.float64)
    assert mean_and_error([values]) == (pytest.approx(values.mean()), pytest.approx(values.std() / math.sqrt(50)))
    assert mean_and_error([values[:1]]) == (float(values[0]), 0.0)


def test_quality_and_detail() -> None:
    accumulator = DivergenceAccumulator()
    accumulator.add(comparison(0.0, 0.5, loss=2.0, reference_loss=1.5))
    accumulator.add(comparison(2.0, 20.0, loss=3.0, reference_loss=1.5))
    quality, detail = accumulator.quality("some text"), accumulator.detail()
    assert quality.kl == pytest.approx(22.5 / 4)
    assert quality.kl_error == pytest.approx((11.0 - 0.25) / 2)
    assert quality.perplexity == pytest.approx(math.exp(2.5))
    assert quality.reference_perplexity == pytest.approx(math.exp(1.5))
    assert (quality.top1, quality.tokens, quality.text) == (1.0, 4, "some text")
    assert detail.median == pytest.approx(1.25)
    assert detail.p99 == pytest.approx(2.0 + 18.0 * 0.97)
    assert detail.largest == 20.0
    assert detail.loss_difference == pytest.approx(1.0)
    assert detail.loss_difference_error == pytest.approx(0.5)
    assert detail.sequences == (pytest.approx(0.25), pytest.approx(11.0))
    assert [bucket.tokens for bucket in detail.buckets] == [1, 0, 0, 0, 0, 1, 1, 1]
    assert sum(bucket.share_of_kl for bucket in detail.buckets) == pytest.approx(1.0)
    assert sum(bucket.share_of_tokens for bucket in detail.buckets) == pytest.approx(1.0)
    json.dumps(dataclasses.asdict(detail), allow_nan=False)


def test_order_and_merging_change_nothing() -> None:
    parts = {n: comparison(*(0.1 * n / 3 + k / 7 for k in range(5))) for n in range(6)}
    one = DivergenceAccumulator()
    for part in parts.values():
        one.add(part)
    two, three = DivergenceAccumulator(), DivergenceAccumulator()
    for n in (5, 0, 3):
        two.add(parts[n], n)
    for n in (4, 1, 2):
        three.add(parts[n], n)
    two.merge(three)
    assert two.quality("t") == one.quality("t")
    assert two.detail() == one.detail()


def test_the_accumulator_refuses_doubles_and_nothing() -> None:
    accumulator = DivergenceAccumulator()
    with pytest.raises(BadInput, match="No sequence was compared"):
        accumulator.quality("t")
    with pytest.raises(BadInput, match="No sequence was compared"):
        accumulator.detail()
    accumulator.add(comparison(1.0), 3)
    with pytest.raises(BadInput, match="Sequence 3 was compared twice"):
        accumulator.add(comparison(1.0), 3)
    with pytest.raises(BadInput, match="Sequence 4 has no tokens"):
        accumulator.add(comparison())
    with pytest.raises(BadInput, match="at least one chunk"):
        compare_sequence([])


def test_a_model_that_is_noise_has_a_finite_perplexity() -> None:
    accumulator = DivergenceAccumulator()
    accumulator.add(comparison(1.0, loss=5000.0))
    assert math.isfinite(accumulator.quality("t").perplexity)


def test_noise_floor_is_the_divergence_of_two_arithmetics() -> None:
    sequences = [logits(n, 8, 200, 4.0) for n in range(5)]
    kl, error = noise_floor([(one, one.bfloat16())] for one in sequences)
    expected = torch.stack([dense_kl(one, one.bfloat16()).mean() for one in sequences])
    assert kl == pytest.approx(float(expected.mean()), rel=1e-3)
    assert 0 < error < kl
    assert noise_floor([(one, one)] for one in sequences) == (0.0, 0.0)


def test_join_of_nothing_but_empty_stretches() -> None:
    empty = compare_logits(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert join([empty, empty]).tokens == 0
