"""NumPy decoding of codecs made of others is torch's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tersor.artifact.decoder_numpy import DecodeError, decode_weight, parse_codec, parts_of
from tersor.artifact.header import DTYPE_NAMES
from tersor.codecs import parse
from tersor.contracts import Gram
from tersor.solvers import Encoder, Nearest

TEXTS = [
    "rot(int3:g24)",
    "rot(lut3:row):seed77",
    "rot(fp4:e2m1:g32:s8)",
    "rot(bf16)",
    "sum(int3:g32:asym,lowrank5)",
    "sum(sparse1.5,int2:row:bf16,lowrank2:plain):again1",
    "rot(sum(int2:g32,sum(sparse3,lowrank4)))",
    "sparse7",
    "cols(int4:row,bin:row):0.2",
    "cols(int4:g8:s8,colscale(bin:row)):24:inputs",
    "weights(int8:row,bin:row):0.05",
    "weights(int4:g4:asym,fdb:g6:s8):0.25:magnitude",
    "rot(weights(bf16,sum(int2:row,lowrank2)):0.100001)",
    "rows(20:weights(lut3:row,ternary:row):0.3,40:weights(trellis2:L8,e8p:row):0.5)",
    "colscale(sum(int2:g24,lowrank2)):again1",
    "klt32(int3:g32:asym)",
    "rot(klt4(sum(lut2:row,lowrank2)):weights)",
    "rows(12:klt16(bf16),40:klt(int5:row))",
    "sparse2of4",
    "sparse1of3(bf16)",
    "rot(sparse5of16(int4:row:bf16))",
    "rows(20:colscale(cols(int5:row,ternary:row):7),40:sparse2of4(int4:row))",
    "lowrank9",
    "rot(trellis2:L12)",
    "rot(trellis3:L10)",
    "sum(trellis1:L12,lowrank2)",
    "rot(e8p:row)",
    "rot(ectcq3)",
    "coded(int4:g48:asym):2.9",
    "rot(coded(fp6:e2m3:row):3.3)",
    "sum(coded(ternary:row):2,lowrank2)",
    "sum(ternary:g32,bin:row)",
    "lowrank7(int8:row)",
    "sum(int3:g32,lowrank3(int5:g8:asym):plain)",
    "rot(lowrank4(trellis2:L8))",
    "bitstack3:k2",
    "sum(bitstack2:k1:plain,lowrank2(ternary:row))",
    "rows(16:bitstack1:k3,40:lowrank2(int8:g8))",
    "rows(16:rot(trellis4:L12),40:mxfp4:e2m1:g32)",
    "rows(16:rot(m2fp4:e2m1:g16),40:sum(m2fp6:e3m2:g32,lowrank2))",
    "rows(20:rot(int5:g32),31:sum(int2:g32,lowrank2),40:bf16)",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("columns", [96, 288])
def test_numpy_and_torch_decode_alike(text: str, columns: int) -> None:
    codec = parse(text)
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(40, columns, generator=generator)
    x = torch.randn(2 * columns, columns, generator=generator)
    encoder = Encoder(Nearest())
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    pieces = []
    for stretch in codec.stretches(40):
        tensors, values = encoder(weight[stretch.start : stretch.stop], stretch.codec, Gram(x.T @ x, len(x)))
        pieces.append(values)
        for name, tensor in tensors.items():
            raw = tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
            arrays[stretch.prefix + name] = (DTYPE_NAMES[tensor.dtype], raw)
    mine = parse_codec(text)
    declared = parts_of(mine, 40, columns)
    assert {name: (dtype, raw.shape) for name, (dtype, raw) in arrays.items()} == declared
    found = decode_weight(mine, 40, columns, lambda name, start, stop: (arrays[name][0], arrays[name][1][start:stop]))
    assert found.dtype == np.float32
    assert np.array_equal(found, torch.cat(pieces).numpy())


@pytest.mark.parametrize("text", ["rotten(int3:g32)", "sums", "lowrank", "vibes4"])
def test_unknown_codecs_are_named(text: str) -> None:
    with pytest.raises(DecodeError, match="not known"):
        parse_codec(text)
