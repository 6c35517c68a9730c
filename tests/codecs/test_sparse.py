"""A few kept weights: where they are in the fewest bits, and found again in any rows."""

from __future__ import annotations

from math import log2

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.artifact import decoder_numpy_composed as plain
from tersor.codecs.sparse import Sparse
from tersor.codecs.wide import codes_at, pack_wide, unpack_wide
from tersor.runtime.products import product_of

WIDE = (2, 70_000)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    percent=st.sampled_from([0.000001, 0.3, 1.0, 2.5, 12.5, 33.333333, 50.0]),
    seed=st.integers(0, 2**32),
)
def test_what_is_kept_is_found_again_in_any_rows(rows: int, columns: int, percent: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    # All in one row, in the first, in the last, or anywhere.
    weight[seed % rows] *= 10.0 ** (seed % 3)
    codec, shape = Sparse(percent), (rows, columns)
    tensors = codec.encode(weight)
    count = codec.count(shape)
    place = weight.flatten().abs().topk(count).indices.sort().values
    wanted = torch.zeros(rows * columns)
    wanted[place] = weight.flatten()[place].half().float()
    wanted = wanted.reshape(shape)
    assert torch.equal(tensors["values"], weight.flatten()[place].half())
    assert torch.equal(codec.decode(tensors, shape), wanted)
    for some in (
        slice(rows // 3, rows // 2),
        slice(-1, None),
        slice(rows, rows),
        slice(0, rows, 3),
        torch.randint(-rows, rows, (9,), generator=generator),
    ):
        assert torch.equal(codec.decode_rows(tensors, shape, some), wanted[some])
    found, starts = codec.rows_of(tensors, shape)
    assert torch.equal(found, place % columns)
    assert torch.equal(starts.diff(), torch.bincount(place // columns, minlength=rows))
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert np.array_equal(plain.decode(str(codec), arrays, *shape, lambda *_: np.zeros(0)), wanted.numpy())


@pytest.mark.parametrize("shape", [(576, 576), (1536, 576), (64, 100), WIDE])
def test_places_take_two_bits_above_the_logarithm(shape: tuple[int, int]) -> None:
    last = 0
    for thousandths in range(1, 50_001, 7):
        codec = Sparse(thousandths / 1000)
        count, bits = codec.count(shape), codec.bits(shape)
        # Two parts fill their last bytes.
        assert bits <= count * (18 + log2(shape[0] * shape[1] / count)) + 16
        assert bits >= last  # recipes look for the largest share that fits
        last = bits


def test_layers_of_any_width() -> None:
    weight = torch.randn(WIDE, generator=torch.Generator().manual_seed(1))
    codec = Sparse(0.1)
    tensors = codec.encode(weight)
    values = codec.decode(tensors, WIDE)
    assert int((values != 0).sum()) == 140
    assert torch.equal(values[values != 0], weight[values != 0].half().float())
    assert product_of(codec, tensors, WIDE) is None


def test_damaged_places_are_refused() -> None:
    codec, shape = Sparse(10.0), (12, 20)
    tensors = codec.encode(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
    high = tensors["high"].clone()
    high[0] = 0 if high[0] else 255
    for damaged in ({**tensors, "high": high}, {**tensors, "high": torch.zeros_like(high)}):
        with pytest.raises(ValueError, match=r"sparse10 has the places of \d+ weights, and 24 are kept"):
            codec.decode(damaged, shape)
        with pytest.raises(ValueError, match="expected the places of 24 kept weights"):
            plain.decode("sparse10", {n: t.numpy() for n, t in damaged.items()}, *shape, lambda *_: np.zeros(0))
    # As many ones as there must be, but beyond the last weight: nothing is written there.
    late = np.zeros(8 * len(high), np.uint8)
    late[-24:] = 1
    beyond = {**tensors, "high": torch.from_numpy(np.packbits(late, bitorder="little"))}
    assert codec.decode(beyond, shape).shape == shape
    same = {**tensors, "low": torch.zeros_like(tensors["low"])}
    assert codec.decode(same, shape).shape == shape
    with pytest.raises(ValueError, match="ascend and lie below 240"):
        plain.decode("sparse10", {n: t.numpy() for n, t in same.items()}, *shape, lambda *_: np.zeros(0))


@pytest.mark.parametrize("bits", [1, 3, 7, 12, 41, 56])
def test_single_codes_of_a_stream(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 29), generator=torch.Generator().manual_seed(bits))
    stream = pack_wide(codes, bits)
    places = torch.tensor([28, 0, 0, 17, 5])
    assert torch.equal(codes_at(stream, bits, places), codes[:, places])
    assert torch.equal(unpack_wide(stream, bits, 29), codes)
