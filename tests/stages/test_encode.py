"""What encoding measures and stores, against the plain formulas."""

from __future__ import annotations

import pytest
import torch

from leaf_checks import correlated_gram, gaussian
from tersor.codecs.packing import pack, unpack
from tersor.stages.encode import _errors


@pytest.mark.parametrize("columns", [1, 255, 256, 300, 600])
def test_errors_are_those_of_the_whole_matrix(columns: int) -> None:
    gram, weight = correlated_gram(columns), gaussian(9, columns)
    values = weight + 0.1 * gaussian(9, columns, seed=4)
    error, exact = (weight - values).double(), gram.matrix.double()
    wanted = [m.square().sum() for m in (error, weight.double())]
    wanted += [((m @ exact) * m).sum() for m in (error, weight.double())]
    assert _errors(weight, values, gram) == pytest.approx([float(value) for value in wanted], rel=1e-5)
    assert _errors(weight, values, None)[2:] == [0.0, 0.0]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 4, 7, 8, 64, 130])
def test_codes_are_a_little_endian_stream_of_bits(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    before = codes.clone()
    packed = pack(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, -(-count * bits // 8)))
    assert packed.is_contiguous()
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        assert int.from_bytes(bytes(stream), "little") == sum(code << at * bits for at, code in enumerate(row))
    assert torch.equal(unpack(packed, bits, count), codes)
    assert torch.equal(codes, before)
