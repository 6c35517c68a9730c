"""Compiled products of stored tensors against decoded weights: every codec, every level of instructions.

A product rounds the inputs that its innermost codec sees to steps of their greatest magnitude over 32384, so that each
is off by half a step at most: an output by ``max |x'| Σ |w'| / 64768``. Rotations keep lengths, so with
``max |x'| ≤ ‖x‖`` and ``Σ |w'| ≤ √n ‖w‖`` that is at most ``‖x‖ ‖w‖ √n / 64768``, whatever the basis. Tables that lie
on no even grid of 256 steps are rounded to half a step in 65535, which adds as much again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from contracts.test_codecs_and_solvers import LEAVES
from contracts.test_tiles_and_solvers import LEAVES as TILED
from tersor.codecs import parse
from tersor.contracts import Codec, Gram, LeafCodec
from tersor.kernels import products
from tersor.runtime.products import product_of
from tersor.solvers import Encoder, Nearest

pytestmark = pytest.mark.skipif(not products.available, reason="nothing was compiled")
LEVELS = ("avx512", "avx2", "portable")
COMPOSED = [
    "bf16",
    "fp16",
    "vq5x2",
    "vq8x3:r2",
    "vq4x12:r3",
    "rot(vq6x4)",
    "pvq3:n12",
    "pvq4:n8",
    "int4:g6",
    "int3:g2:asym:s8",
    "sint5:g6",
    "block4:layer:shift",
    "block8:layer:fp16",
    "block5:9x6",
    "block2:100x8:fp16",
    "sparse2of4",
    "sparse1of3(int4:row)",
    "sparse3of8(int4:g6:asym)",
    "sparse7of16(bf16)",
    "bitstack1:k1:plain",
    "bitstack3:k5",
    "rot(bitstack2:k3)",
    "colscale(e8p:row)",
    "rot(int3:g32)",
    "rot(lut3:row):seed5",
    "rot(trellis2:L10)",
    "rot(sum(int2:g32,lowrank4))",
    "sum(int3:g32,lowrank6)",
    "sum(sparse1,int3:row,lowrank2)",
    "sum(int2:g32,lowrank6(int4:g4):plain)",
    "sparse2.5",
    "cols(int4:row,bin:row):0.2",
    "cols(int4:g16,bin:g40):16:inputs",
    "cols(int3:row,colscale(bin:row)):19",
    "colscale(int2:g24:s8)",
    "colscale(bin:row)",
    "rot(cols(int4:row,sum(bin:row,lowrank2)):0.125)",
    "klt16(int3:g32)",
    "klt(int3:row):weights",
    "lowrank12",
    "lowrank5(int8:row)",
    "rows(40:int6:g32:s8,64:rot(trellis4:L8),72:bf16)",
]
STREAMS = ["coded(int4:row):3.3", "coded(ternary:g32):1.9", "coded(fp4:e2m1:g32):3.6", "rot(coded(int5:row):3.2)"]
NONE = {
    "fp4:e2m1:g6",
    "ternary:g6",
    "lut2:g32",
    "lut3:g64",
    "lut4:g96",
    "pvq1:n32",
    "sparse2of4(lut3:row)",
    "sparse1of3(ternary:row)",
    "weights(int8:row,bin:row):0.05",
}
ALL = [text for text in (*LEAVES, *TILED, *COMPOSED, *STREAMS) if text not in NONE]
ROWS = 72


@pytest.fixture(autouse=True)
def _all_levels_again() -> Iterator[None]:
    yield
    products._products.limit_isa("avx512")


@cache
def encoded(text: str, rows: int = ROWS, columns: int = 96) -> tuple[Codec, dict[str, Tensor], Tensor]:
    """Codec, stored tensors and decoded weight of something like a layer, with an outlier and a row of zeros."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[min(3, rows - 1), 5 % columns] = 1.0
    weight[rows // 2 :][: rows > 1] = 0.0
    codec = parse(text)
    gram = Gram(x.T @ x / len(x), len(x))
    codec = codec.learn(weight, gram) if isinstance(codec, LeafCodec) else codec
    tensors, values = {}, []
    for stretch in codec.stretches(rows):
        found, value = Encoder(Nearest())(weight[stretch.start : stretch.stop], stretch.codec, gram)
        tensors.update({stretch.prefix + name: tensor for name, tensor in found.items()})
        values.append(value)
    return codec, tensors, torch.cat(values)


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x[:, 0] *= 8.0
    return x


def bound(weight: Tensor, x: Tensor, *, terms: float = 2.0) -> Tensor:
    """What outputs may be off by. ``terms``: how far weights of terms go beyond their sum's; and tables."""
    longest = weight.norm(dim=1).max()
    return terms * x.norm(dim=1, keepdim=True) * longest * weight.shape[1] ** 0.5 / 64768


def check(product: products.Product, weight: Tensor, x: Tensor, terms: float = 2.0) -> None:
    wanted = (x.double() @ weight.double().T).float()
    for level in LEVELS:
        products._products.limit_isa(level)
        found = products.multiply(product, x)
        assert found.shape == wanted.shape
        assert ((found - wanted).abs() <= bound(weight, x, terms=terms)).all(), level
        # Far below the bound on the whole: half steps do not all point the same way.
        assert (found - wanted).norm() <= 1.25e-4 * terms * wanted.norm(), level


@pytest.mark.parametrize("text", ALL)
def test_products_are_those_of_the_decoded_weight(text: str) -> None:
    columns = 96 if parse(text).accepts((ROWS, 96)) else 192 if parse(text).accepts((ROWS, 192)) else 256
    codec, tensors, weight = encoded(text, columns=columns)
    product = product_of(codec, tensors, (ROWS, columns))
    assert product is not None
    assert (product.rows, product.columns) == (ROWS, columns)
    for tokens in (1, 5, 64):
        # Factors in codes of their own: what the first is off by, the second makes larger than its product with it.
        check(product, weight, inputs(tokens, columns, tokens), terms=40.0 if re.search(r"lowrank\d+\(", text) else 2.0)


@pytest.mark.parametrize("text", ALL)
def test_rows_are_those_of_the_decoded_weight(text: str) -> None:
    columns = 96 if parse(text).accepts((ROWS, 96)) else 192 if parse(text).accepts((ROWS, 192)) else 256
    codec, tensors, weight = encoded(text, columns=columns)
    product = product_of(codec, tensors, (ROWS, columns))
    assert product is not None
    some = torch.tensor([ROWS - 1, 0, 3, 41, 65])
    found = products.read_rows(product, some)
    if found is None:
        assert not text.startswith(("int", "trellis", "rot(int", "rot(trellis", "rows", "bf16")), text
        return
    torch.testing.assert_close(found, weight[some], rtol=1e-5, atol=2e-6 * float(weight.abs().max()))
    with pytest.raises(ValueError, match=f"row {ROWS} is not one of {ROWS}"):
        products.read_rows(product, torch.tensor([0, ROWS]))


@pytest.mark.parametrize(
    "text", ["int4:row", "int3:row:asym", "sint8:row", "lut3:row", "fp8:e5m2:row", "ternary:row", "bin3:row:s8",
             "trellis3:L8", "rot(int5:row)", "rot(trellis2:L8)", "bf16", "sparse2.5", "lowrank2", "colscale(int2:row)"]
)  # fmt: skip
@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (3, 31), (257, 33), (70, 100), (5, 577)])
def test_odd_sizes(text: str, rows: int, columns: int) -> None:
    codec, tensors, weight = encoded(text, rows, columns)
    product = product_of(codec, tensors, (rows, columns))
    assert product is not None
    for tokens in (1, 3, 17):
        check(product, weight, inputs(tokens, columns, tokens), terms=4.0)


@pytest.mark.parametrize("text", sorted(NONE))
def test_codecs_without_a_product_say_so(text: str) -> None:
    columns = 96 if parse(text).accepts((16, 96)) else 192 if parse(text).accepts((16, 192)) else 256
    parts = {part.name: torch.zeros(part.shape, dtype=part.dtype) for part in parse(text).parts((16, columns))}
    assert product_of(parse(text), parts, (16, columns)) is None
    prefixed = {f"r_{name}": part for name, part in parts.items()}
    assert product_of(parse(f"rot({text})"), prefixed, (16, columns)) is None


@pytest.mark.parametrize("text", ["ectcq2.5", "ectcq1.5:t4", "ectcq2:t1", "ectcq4", "rot(ectcq3)"])
@pytest.mark.parametrize(("rows", "columns"), [(256, 192), (150, 131)])
def test_streams_are_kept_as_tables_of_exact_values(text: str, rows: int, columns: int) -> None:
    codec, tensors, weight = encoded(text, rows, columns)
    product = product_of(codec, tensors, (rows, columns))
    assert product is not None
    # Inputs are multiplied by the columns' steps before they are rounded.
    for tokens in (1, 6, 33):
        check(product, weight, inputs(tokens, columns), terms=8.0)


def test_fine_streams_are_kept_in_bfloat16() -> None:
    codec, tensors, weight = encoded("ectcq7", 256, 192)
    product = product_of(codec, tensors, (256, 192))
    assert product is not None
    check(product, weight.bfloat16().float(), inputs(6, 192))


def test_stored_tensors_are_used_where_they_lie() -> None:
    for text in (
        "int4:g32",
        "sint8:row",
        "fp4:e2m1:g32",
        "lut4:row",
        "bin:g32",
        "rot(trellis2:L8)",
        "bf16",
        "vq6x4",
        "e8p:row",
    ):
        codec, tensors, weight = encoded(text)
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        product = product_of(codec, own, (ROWS, 96))
        assert product is not None
        codes = next(tensor for name, tensor in own.items() if name.endswith(("codes", "weight")))
        codes.copy_(codes.flip(1 if codes.ndim > 2 else 0))
        check(product, codec.decode(own, (ROWS, 96)), inputs(3, 96))
        assert not torch.equal(codec.decode(own, (ROWS, 96)), weight)


def test_a_damaged_stream_raises() -> None:
    codec, tensors, _ = encoded("ectcq2.5", 256, 192)
    with pytest.raises(ValueError, match="ends before"):
        product_of(codec, {"stream": tensors["stream"][:40]}, (256, 192))
