"""Decoding of entropy-coded streams, at every level of instructions, against the plain version."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs.ectcq_contexts import Tables
from tersor.kernels import coded, reference_rans

needs_compiled = pytest.mark.skipif(not coded.compiled, reason="the compiled kernels were not built")
LEVELS = ("avx512", "avx2", "portable")


@pytest.fixture(autouse=True)
def _all_levels_again() -> Iterator[None]:
    yield
    if coded.compiled:
        coded._coded.limit_isa("avx512")


def _layer(
    seed: int, rows: int, columns: int, contexts: int, lanes: int, states: int, low: int, spread: float
) -> tuple[Tensor, Tensor, coded.Contexts]:
    """Numbers on paths of the trellis, their stream, and what it is coded with."""
    g = np.random.default_rng(seed)
    bits = np.stack([g.integers(0, 3000, contexts), *g.integers(-3000, 3000, (2, contexts))], 1)
    raw = g.integers(0, low + 1, contexts)
    tables = Tables(*(torch.from_numpy(a) for a in (bits, raw, g.integers(1, 8, contexts))))
    kinds = coded.Contexts(
        torch.from_numpy(g.integers(-6, 4 * contexts, columns)),
        tables.frequencies(),
        tables.low,
        torch.from_numpy(g.integers(0, 9, rows)),
        2,
        lanes,
    )
    _, h0, h1 = coded.TRELLISES[states]
    index = np.clip(g.standard_normal((rows, columns)) * spread, -32768, 32767).astype(np.int64)
    path, codes = np.zeros(columns, np.int64), np.empty((rows, columns), np.int64)
    for row in range(rows):
        codes[row] = 2 * index[row] + (path & 1)
        if states > 1:
            path = path >> 1 ^ (path & 1) * (h0 >> 1) ^ (index[row] & 1) * (h1 >> 1)
    numbers = torch.from_numpy(codes)
    _, used = coded.encode_in(numbers, kinds, 0)
    return numbers, coded.encode_in(numbers, kinds, used)[0], kinds


def _plain(stream: Tensor, shape: tuple[int, int], kinds: coded.Contexts, states: int) -> np.ndarray:
    lanes, trellis = kinds.used_lanes(), coded.TRELLISES[states]
    return reference_rans.decode(stream.numpy(), shape, kinds.plain(shape[0]), lanes, trellis)


@needs_compiled
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 9),
    columns=st.integers(1, 100),
    contexts=st.sampled_from([1, 2, 5, 48, 64, 65, 200]),
    lanes=st.integers(1, 32),
    states=st.sampled_from(sorted(coded.TRELLISES)),
    low=st.sampled_from([0, 1, 12]),
    spread=st.sampled_from([0.5, 4.0, 40.0, 9000.0]),
    beyond=st.sampled_from([0, 1, 40, 2000]),
)
def test_all_levels_find_the_numbers(seed, rows, columns, contexts, lanes, states, low, spread, beyond):
    codes, stream, kinds = _layer(seed, rows, columns, contexts, lanes, states, low, spread)
    padded = torch.cat([stream, torch.full((beyond,), 255, dtype=torch.uint8)])
    assert np.array_equal(_plain(padded, codes.shape, kinds, states), codes.numpy())
    for level in LEVELS:
        coded._coded.limit_isa(level)
        assert torch.equal(coded.decode_in(padded, codes.shape, kinds, states).long(), codes), level


@needs_compiled
@pytest.mark.parametrize("lanes", range(1, 33))
def test_every_number_of_lanes_with_every_tail(lanes):
    for columns in range(lanes, 2 * lanes + 1):
        codes, stream, kinds = _layer(columns, 3, columns, 3, lanes, 8, 1, 5.0)
        padded = torch.cat([stream, torch.zeros(1000, dtype=torch.uint8)])
        for level in LEVELS:
            coded._coded.limit_isa(level)
            assert torch.equal(coded.decode_in(padded, codes.shape, kinds, 8).long(), codes), (level, columns)


@needs_compiled
def test_one_symbol_with_all_the_frequency():
    """Its numbers take no bits; the frequency 4096 is the only one that needs 13."""
    frequency = torch.zeros(2, 2, 32, dtype=torch.int64)
    frequency[0, :, 15] = 4096
    frequency[1, :, 14:18] = 1024
    level = torch.arange(40) % 2
    kinds = coded.Contexts(level, frequency, torch.zeros(2, dtype=torch.int64))
    index = torch.randint(-1, 3, (50, 40), generator=torch.Generator().manual_seed(0)) * level
    stream, used = coded.encode_in(2 * index, kinds, 4000)
    assert used < 4 * 32 + 50 * 20 * 2 / 8 + 70
    for level_name in LEVELS:
        coded._coded.limit_isa(level_name)
        assert torch.equal(coded.decode_in(stream, (50, 40), kinds, 1).long(), 2 * index)


@needs_compiled
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    columns=st.integers(1, 90),
    contexts=st.sampled_from([1, 5, 40, 64, 80]),
    states=st.sampled_from([1, 8, 256]),
    low=st.sampled_from([0, 2]),
    spread=st.sampled_from([0.5, 4.0, 40.0]),
)
def test_weights_and_names_are_those_of_plain_torch(seed, columns, contexts, states, low, spread):
    codes, stream, kinds = _layer(seed, 7, columns, contexts, 32, states, low, spread)
    g = torch.Generator().manual_seed(seed)
    shrink = torch.randint(0, 256, (contexts, 5), generator=g).float() / 256
    step = torch.rand(columns, generator=g) * 1e-3
    kind = (kinds.row[:, None] + kinds.level >> 2).clamp(0, contexts - 1)
    size = codes.abs().clamp(max=4)
    value = codes.float() - codes.sign() * torch.where(size > 0, shrink[kind, size], 0)
    padded = torch.cat([stream, torch.zeros(1000, dtype=torch.uint8)])
    for level in LEVELS:
        coded._coded.limit_isa(level)
        weight = coded.weights_in(padded, codes.shape, kinds, states, shrink, step)
        assert torch.equal(weight, step * value), level
        found = coded.names_in(padded, codes.shape, kinds, states, shrink)
        assert found is not None
        numbers, counts, names = found
        assert torch.equal(numbers[names.long()].float() / 256, value), level
        assert torch.equal(torch.bincount(names.long().flatten(), minlength=len(numbers)), counts)
        assert len(numbers.unique()) == len(numbers)


@needs_compiled
def test_far_numbers_have_no_names():
    codes, stream, kinds = _layer(1, 5, 64, 2, 32, 8, 0, 9000.0)
    assert int(codes.abs().max()) > 4096
    assert coded.names_in(stream, codes.shape, kinds, 8, torch.zeros(2, 5)) is None


@pytest.mark.parametrize("bits", range(1, 9))
def test_names_are_packed_row_by_row(bits, monkeypatch):
    g = torch.Generator().manual_seed(bits)
    code_of = torch.randint(0, 2**bits, (300,), generator=g)
    rare = torch.rand(300, generator=g) < 0.1
    names = torch.randint(0, 300, (5, 37), generator=g).to(torch.uint16)
    packed, places = coded.pack_names(names, code_of, rare, bits)
    wanted = code_of[names.long()]
    for row, of in zip(packed, wanted, strict=True):
        number = sum(int(code) << bits * i for i, code in enumerate(of))
        assert bytes(row.tolist()) == number.to_bytes(-(-37 * bits // 8), "little")
    assert torch.equal(places, rare[names.long()].flatten().nonzero()[:, 0])
    monkeypatch.setattr(coded, "_coded", None)
    plain, same = coded.pack_names(names, code_of, rare, bits)
    assert torch.equal(plain, packed)
    assert torch.equal(same, places)


@needs_compiled
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lanes=st.sampled_from([1, 5, 16, 32]),
    low=st.sampled_from([0, 3, 12]),
    kept=st.floats(0, 1),
    wrong=st.integers(0, 40),
)
def test_damaged_streams_are_refused_or_give_some_numbers_alike_at_all_levels(seed, lanes, low, kept, wrong):
    codes, stream, kinds = _layer(seed, 6, 75, 3, lanes, 8, low, 6.0)
    g = np.random.default_rng(seed)
    damaged = stream.clone()
    damaged[torch.from_numpy(g.integers(0, len(stream), wrong))] = 255
    damaged[torch.from_numpy(g.integers(0, len(stream), wrong))] = 0
    damaged = damaged[: int(kept * len(damaged))]
    found = []
    for level in LEVELS:
        coded._coded.limit_isa(level)
        try:
            found.append(coded.decode_in(damaged, codes.shape, kinds, 8).numpy().tobytes())
        except ValueError as error:
            assert "ends before" in str(error) or "shorter than" in str(error)  # noqa: PT017
            found.append(None)
    assert found[0] == found[1] == found[2]


@pytest.fixture(name="fence")
def _fence() -> Iterator[tuple[int, int]]:
    """Where memory that can be read begins and ends; on both sides of it lies some that cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, pages = mmap.PAGESIZE, 34
    memory = mmap.mmap(-1, pages * page)
    holder = ctypes.c_char.from_buffer(memory)
    begin = ctypes.addressof(holder)
    for at in (begin, begin + (pages - 1) * page):
        assert libc.mprotect(at, page, 0) == 0
    yield begin + page, begin + (pages - 1) * page
    for at in (begin, begin + (pages - 1) * page):
        libc.mprotect(at, page, mmap.PROT_READ | mmap.PROT_WRITE)
    del holder
    memory.close()


@needs_compiled
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory")
@pytest.mark.parametrize("seed", range(20))
def test_nothing_outside_a_stream_is_read(seed, fence):
    """Address sanitizers see no vectors that are loaded across an end; memory that may not be read stops them."""
    g = np.random.default_rng(seed)
    lanes, columns, low = int(g.integers(1, 33)), int(g.integers(1, 130)), int(g.choice([0, 1, 12]))
    codes, stream, kinds = _layer(seed, 8, columns, 3, lanes, 8, low, float(g.choice([0.5, 4.0, 40.0])))
    damaged = stream.clone()
    damaged[torch.from_numpy(g.integers(0, len(stream), 20))] = 255
    cut = damaged[: max(4 * lanes, int(g.random() * len(stream)))]
    for data in (stream, damaged, cut):
        for at in (fence[0], fence[1] - len(data)):
            here = np.frombuffer((ctypes.c_uint8 * len(data)).from_address(at), np.uint8)
            here[:] = data.numpy()
            for level in LEVELS:
                coded._coded.limit_isa(level)
                try:
                    found = coded.decode_in(torch.from_numpy(here), codes.shape, kinds, 8)
                except ValueError:
                    assert data is not stream
                    continue
                assert data is not stream or torch.equal(found.long(), codes)


@needs_compiled
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lanes": 33}, "1 to 32 lanes"),
        ({"lanes": 0}, "1 to 32 lanes"),
        ({"shift": 16}, "one entry a row"),
        ({"level": torch.full((75,), 70000)}, "out of range"),
        ({"low": torch.tensor([0, 13, 0])}, "0 to 12"),
        ({"frequency": torch.zeros(3, 2, 32)}, "4096"),
        ({"frequency": torch.zeros(3, 2, 31)}, "classes, 2, 32"),
        ({"row": torch.zeros(5)}, "one entry a row"),
    ],
)
def test_what_is_no_stream_is_refused(change, sentence):
    codes, stream, kinds = _layer(0, 6, 75, 3, 8, 8, 1, 6.0)
    with pytest.raises(ValueError, match=sentence):
        coded.decode_in(stream, codes.shape, coded.Contexts(**{**vars(kinds), **change}), 8)
    with pytest.raises(ValueError, match="a step for every column"):
        coded.weights_in(stream, codes.shape, kinds, 8, torch.zeros(3, 5), torch.zeros(74))
    with pytest.raises(ValueError, match=r"\(classes, 4\)"):
        coded.names_in(stream, codes.shape, kinds, 8, torch.zeros(2, 5))
