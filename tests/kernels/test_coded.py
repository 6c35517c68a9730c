"""Entropy coding and the trellis search: compiled against plain, and back again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.codecs.ectcq_tables import frequencies, frequency_codes
from tersor.kernels import coded, reference_ectcq, reference_rans

needs_compiled = pytest.mark.skipif(not coded.compiled, reason="the compiled kernels were not built")


def random_tables(classes: int, generator: np.random.Generator) -> torch.Tensor:
    return frequencies(torch.from_numpy(generator.integers(1, 255, (classes, 2, 32)).astype(np.uint8)))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 12),
    columns=st.integers(1, 70),
    classes=st.integers(1, 3),
    states=st.sampled_from(sorted(coded.TRELLISES)),
    spread=st.sampled_from([0.5, 5.0, 500.0, 20000.0]),
    seed=st.integers(0, 2**31),
)
def test_path_and_stream_round_trip(
    rows: int, columns: int, classes: int, states: int, spread: float, seed: int
) -> None:
    g = np.random.default_rng(seed)
    trellis = coded.TRELLISES[states]
    target = np.clip(g.standard_normal((columns, rows)) * spread, -65000, 65000).astype(np.float32)
    kind = g.integers(0, classes, columns)
    low = g.integers(0, 11, classes)
    price = (g.random((classes, 2, 32)) * 8).astype(np.float32)
    shrink = (g.random((classes, 5)) * 0.4).astype(np.float32)
    shrink[:, 0] = 0
    rates = g.random(rows).astype(np.float32), g.random(columns).astype(np.float32)
    plain = reference_ectcq.path(target, *rates, kind, price, shrink, low, trellis)
    tensors = [torch.from_numpy(array) for array in (target, *rates, kind, price, shrink, low)]
    found = coded.path(*tensors, states)
    assert np.array_equal(plain, found.numpy())
    assert (abs(plain - target.astype(np.float64)) <= 4.01).all()

    codes = np.ascontiguousarray(plain.T).astype(np.int64)
    tables = random_tables(classes, g)
    stream = reference_rans.encode(codes, kind, tables.numpy(), low)
    tensor, used = coded.encode(torch.from_numpy(codes), tensors[3], tables, tensors[6], len(stream) + 3)
    assert used == len(stream)
    assert tensor.numpy().tobytes() == stream + bytes(3)
    back = coded.decode(tensor, codes.shape, tensors[3], tables, tensors[6], states)
    assert np.array_equal(back.numpy(), codes)
    again = reference_rans.decode(tensor.numpy(), codes.shape, kind, tables.numpy(), low, trellis)
    assert np.array_equal(again, codes)


@pytest.mark.parametrize("states", [4, 8, 16, 32, 64])
def test_path_is_the_cheapest_of_all(states: int) -> None:
    """Every path of five steps, by brute force."""
    g = np.random.default_rng(states)
    _, h0, h1 = coded.TRELLISES[states]
    target = (g.standard_normal((1, 5)) * 3).astype(np.float32)
    zeros = torch.zeros(1, dtype=torch.int64)
    found = coded.path(
        torch.from_numpy(target), torch.zeros(5), torch.zeros(1), zeros, torch.zeros(1, 2, 32), torch.zeros(1, 5),
        zeros, states,
    ).numpy()[0]  # fmt: skip
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
@given(counts=st.lists(st.integers(0, 10**9) | st.just(0), min_size=32, max_size=32))
def test_frequencies_add_up_and_follow_counts(counts: list[int]) -> None:
    counted = torch.tensor(counts)
    found = frequencies(frequency_codes(counted))
    assert int(found.sum()) == 4096
    if counted.sum() == 0:
        assert int(found[15]) == 4096
    else:
        assert torch.equal(found > 0, counted > 0)
        true = counted.double() / counted.sum() * 4096
        assert (abs(found - true) <= 0.045 * true + 34).all()


def test_a_cut_stream_is_refused() -> None:
    codes = torch.randint(-8, 8, (40, 40), generator=torch.Generator().manual_seed(0)) * 2
    tables, kind, low = random_tables(1, np.random.default_rng(0)), torch.zeros(40).long(), torch.zeros(1).long()
    stream, used = coded.encode(codes, kind, tables, low, 4000)
    with pytest.raises(ValueError, match="ends before"):
        coded.decode(stream[: used - 20], (40, 40), kind, tables, low, 1)
    with pytest.raises(ValueError, match="ends before"):
        reference_rans.decode(
            stream[: used - 20].numpy(), (40, 40), kind.numpy(), tables.numpy(), low.numpy(), (1, 0, 0)
        )


@needs_compiled
def test_wrong_arguments_of_the_compiled_coder_are_refused() -> None:
    tables, low = random_tables(1, np.random.default_rng(0)), torch.zeros(1).long()
    with pytest.raises(ValueError, match="class number"):
        coded.encode(torch.zeros(2, 3), torch.ones(3), tables, low, 100)
    with pytest.raises(ValueError, match="4096"):
        coded.encode(torch.zeros(2, 3), torch.zeros(3), tables + 1, low, 100)
