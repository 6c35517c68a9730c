"""Entropy-coded trellises as codes of a fixed length: exactly the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tersor.codecs import parse
from tersor.codecs.ectcq import EntropyCodedTrellis
from tersor.codecs.packing import packed_width
from tersor.codecs.run_time_codes import RunTimeCodes, ectcq_run_time
from tersor.kernels import coded, products, products_composed
from tersor.solvers import Encoder, Nearest


def _encoded(text: str, weight: Tensor) -> tuple[EntropyCodedTrellis, dict[str, Tensor], tuple[int, int]]:
    codec = parse(text)
    assert isinstance(codec, EntropyCodedTrellis)
    tensors, _ = Encoder(Nearest())(weight, codec, None)
    return codec, tensors, (weight.shape[0], weight.shape[1])


def _weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.exp2(0.4 * torch.randn(rows, 1, generator=draw)) * torch.exp2(
        0.4 * torch.randn(columns, generator=draw)
    )
    return torch.randn(rows, columns, generator=draw) * spread * 0.02


def _check(text: str, weight: Tensor) -> RunTimeCodes:
    codec, tensors, shape = _encoded(text, weight)
    found = ectcq_run_time(codec, tensors, shape)
    assert found is not None
    assert torch.equal(found.dense(), codec.decode(tensors, shape))
    assert found.codes.shape == (shape[0], packed_width(shape[1], found.bits))
    assert found.table.shape == (2**found.bits,)
    assert bool((found.table.diff() >= 0).all())
    assert found.start[-1] == len(found.value) == len(found.column)
    return found


@pytest.mark.parametrize("text", ["ectcq1", "ectcq2", "ectcq2:t1", "ectcq3:t64", "ectcq4"])
@pytest.mark.parametrize("shape", [(150, 131), (24, 300)])
def test_weights_are_exactly_those_of_the_codec(text, shape):
    found = _check(text, _weight(*shape))
    assert len(found.value) <= 2 * 0.02 * shape[0] * shape[1]


def test_without_compiled_kernels_too(monkeypatch):
    codec, tensors, shape = _encoded("ectcq2", _weight(40, 70))
    wanted = codec.decode(tensors, shape)
    monkeypatch.setattr(coded, "_coded", None)
    assert torch.equal(codec.decode(tensors, shape), wanted)
    found = ectcq_run_time(codec, tensors, shape)
    assert found is not None
    assert torch.equal(found.dense(), wanted)


def test_outliers_are_listed_and_exact():
    weight = _weight(200, 256)
    weight[3, 5], weight[3, 200], weight[150, 0] = 9.0, -12.345, 3.0
    found = _check("ectcq2.5", weight)
    assert found.bits < 8
    assert len(found.value) > 0


def test_rates_at_which_nothing_is_won_are_left_alone():
    codec, tensors, shape = _encoded("ectcq8", _weight(150, 128))
    assert ectcq_run_time(codec, tensors, shape) is None


def test_zeros():
    found = _check("ectcq2", torch.zeros(30, 64))
    assert found.bits == 1
    assert bool((found.dense() == 0).all())


@pytest.mark.skipif(not products.available, reason="nothing was compiled")
def test_products_take_them_as_they_are():
    weight = _weight(150, 256)
    weight[3, 5] = 2.0
    codec, tensors, shape = _encoded("ectcq2", weight)
    found = ectcq_run_time(codec, tensors, shape)
    assert found is not None
    codes = products.row_codes(
        found.codes, bits=found.bits, columns=256, group=None, scale=None, table=found.table[None]
    )
    rest = products_composed.sparse(found.value, found.column, found.start, 256)
    product = products_composed.scaled(products_composed.total([codes, rest]), found.step)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    wanted = x.double() @ codec.decode(tensors, shape).double().T
    assert float((products.multiply(product, x) - wanted).norm() / wanted.norm()) < 2e-4
