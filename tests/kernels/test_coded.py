"""Entropy coding and the trellis search: compiled against plain, and back again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.codecs.ectcq_contexts import Tables, count, fit, gaussian
from tersor.kernels import coded, reference_ectcq, reference_rans

needs_compiled = pytest.mark.skipif(not coded.compiled, reason="the compiled kernels were not built")


def random_tables(contexts: int, generator: np.random.Generator) -> Tables:
    """Tables with escapes, since any number may come."""
    bits = np.stack([generator.integers(0, 3000, contexts), *generator.integers(-3000, 3000, (2, contexts))], 1)
    escape = generator.integers(1, 8, contexts)
    return Tables(*(torch.from_numpy(a) for a in (bits, generator.integers(0, 11, contexts), escape)))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 12),
    columns=st.integers(1, 70),
    contexts=st.integers(1, 3),
    lanes=st.sampled_from([1, 4, 32]),
    states=st.sampled_from(sorted(coded.TRELLISES)),
    spread=st.sampled_from([0.5, 5.0, 500.0, 20000.0]),
    seed=st.integers(0, 2**31),
)
def test_path_and_stream_round_trip(
    rows: int, columns: int, contexts: int, lanes: int, states: int, spread: float, seed: int
) -> None:
    g = np.random.default_rng(seed)
    trellis = coded.TRELLISES[states]
    target = np.clip(g.standard_normal((columns, rows)) * spread, -65000, 65000).astype(np.float32)
    tables = random_tables(contexts, g)
    row, level, low = g.integers(0, 9, rows), g.integers(-6, 9, columns), tables.low.numpy()
    price = (g.random((contexts, 2, 32)) * 8).astype(np.float32)
    shrink = (g.random((contexts, 5)) * 0.4).astype(np.float32)
    shrink[:, 0] = 0
    weight = g.random(columns).astype(np.float32)
    ones = np.linspace(0.5, 1, rows, dtype=np.float32)
    plain = reference_ectcq.path(target, ones, weight, row, level, 2, price, shrink, low, trellis)
    tensors = [torch.from_numpy(array) for array in (target, ones, weight, level, price, shrink, low, row)]
    found = coded.path(*tensors[:7], states, tensors[7], 2)
    assert np.array_equal(plain, found.numpy())
    assert (abs(plain - target.astype(np.float64)) <= 4.01).all()

    codes = np.ascontiguousarray(plain.T).astype(np.int64)
    kinds = coded.Contexts(tensors[3], tables.frequencies(), tables.low, tensors[7], 2, lanes)
    stream = reference_rans.encode(codes, kinds.plain(rows), lanes)
    tensor, used = coded.encode_in(torch.from_numpy(codes), kinds, len(stream) + 3)
    assert used == len(stream)
    assert tensor.numpy().tobytes() == stream + bytes(3)
    back = coded.decode_in(tensor, codes.shape, kinds, states)
    assert np.array_equal(back.numpy(), codes)
    again = reference_rans.decode(tensor.numpy(), codes.shape, kinds.plain(rows), lanes, trellis)
    assert np.array_equal(again, codes)


@pytest.mark.parametrize("states", [4, 8, 16, 32, 64])
def test_path_is_the_cheapest_of_all(states: int) -> None:
    """Every path of five steps, by brute force."""
    g = np.random.default_rng(states)
    _, h0, h1 = coded.TRELLISES[states]
    target = (g.standard_normal((1, 5)) * 3).astype(np.float32)
    zeros, none = torch.zeros(1, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    prices = torch.zeros(1, 2, 32), torch.zeros(1, 5)
    found = coded.path(torch.from_numpy(target), none, torch.zeros(1), zeros, *prices, zeros, states).numpy()[0]
    best = np.inf
    for bits in range(32):
        state, loss = 0, 0.0
        for step in range(5):
            bit = bits >> step & 1
            subset = (state & 1) + 2 * bit
            x = float(target[0, step])
            loss += (x - (4 * round((x - subset) / 4) + subset)) ** 2
            state = state >> 1 ^ (state & 1) * (h0 >> 1) ^ bit * (h1 >> 1)
        best = min(best, loss)
    assert ((found - target[0]) ** 2).sum() == pytest.approx(best, rel=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(0, 10**9) | st.just(0), min_size=64, max_size=64),
    low=st.integers(0, 10),
)
def test_frequencies_add_up_and_every_symbol_has_a_code(counts: list[int], low: int) -> None:
    counted = torch.tensor(counts).reshape(1, 2, 32)
    found = fit(counted, torch.tensor([low]))
    share = found.frequencies()
    assert (share.sum(2) == 4096).all()
    assert (share >= 0).all()
    missing = counted[:, :, :31][share[:, :, :31] == 0].sum() + counted[:, :, 31].sum()
    assert bool((share[:, :, 31] > 0).all()) == bool(missing > 0) or missing == 0
    assert torch.isfinite(found.costs(counted)).all()
    assert torch.isfinite(found.prices()).all()


@pytest.mark.parametrize("spread", [0.4, 1.0, 3.0, 8.0, 60.0])
def test_tables_of_gaussians_lose_little_to_their_entropy(spread: float) -> None:
    number = torch.round(torch.randn(400, 1000, generator=torch.Generator().manual_seed(0)) * spread).long()
    low = gaussian(torch.tensor([spread])).low
    counts = count(number, torch.zeros_like(number), low)
    share = counts / counts.sum(2, keepdim=True)
    entropy = -float((counts * torch.log2(share.clamp(min=1e-12))).sum()) + int(low) * number.numel()
    loss = float(fit(counts, low).costs(counts).sum()) - entropy
    assert -1 < loss / number.numel() < 0.003


def test_a_cut_stream_is_refused() -> None:
    codes = torch.randint(-8, 8, (40, 40), generator=torch.Generator().manual_seed(0)) * 2
    tables = random_tables(1, np.random.default_rng(0))
    kinds = coded.Contexts(torch.zeros(40).long(), tables.frequencies(), tables.low, lanes=8)
    stream, used = coded.encode_in(codes, kinds, 8000)
    with pytest.raises(ValueError, match="ends before"):
        coded.decode_in(stream[: used - 20], (40, 40), kinds, 1)
    with pytest.raises(ValueError, match="ends before"):
        reference_rans.decode(stream[: used - 20].numpy(), (40, 40), kinds.plain(40), 8, (1, 0, 0))


@needs_compiled
def test_wrong_arguments_of_the_compiled_coder_are_refused() -> None:
    tables, none = random_tables(1, np.random.default_rng(0)), torch.zeros(0)
    with pytest.raises(ValueError, match="one entry a row"):
        coded.encode(torch.zeros(2, 3), none, tables.frequencies(), tables.low, 100)
    with pytest.raises(ValueError, match="4096"):
        coded.encode(torch.zeros(2, 3), torch.zeros(3), tables.frequencies() + 1, tables.low, 100)
