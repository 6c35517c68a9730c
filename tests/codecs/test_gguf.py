"""GGUF tensor types: the bytes are llama.cpp's, the codes our solvers'."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from leaf_checks import check_numpy_decoder, correlated_gram, gaussian, squared_error
from tersor.artifact import decoder_numpy_gguf, decoder_numpy_gguf_vectors
from tersor.codecs import GgufScalar, GgufVector, parse
from tersor.codecs.gguf_blocks import GgufBlocks
from tersor.codecs.gguf_grids import GRIDS, parity
from tersor.codecs.gguf_layout import KINDS
from tersor.contracts import Encoded, Gram
from tersor.errors import BadInput, ShapeMismatch
from tersor.solvers import CoordinateDescent, Encoder, ErrorFeedback, Nearest

gguf = pytest.importorskip("gguf")

WIDTH = 512
NAMES = [*KINDS, *GRIDS]
HALVES = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "tq1_0": (52,), "tq2_0": (64,)}
"""Where a block's float16 numbers are, where not at its beginning."""


def kind_of(name: str) -> int:
    return int(gguf.GGMLQuantizationType[name.upper()])


def gguf_codec(name: str) -> GgufBlocks:
    codec = parse(name)
    assert isinstance(codec, GgufBlocks)
    return codec


def alone(name: str) -> ModuleType:
    return decoder_numpy_gguf if name in KINDS else decoder_numpy_gguf_vectors


def peer(name: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()]))


def any_blocks(name: str, rows: int, seed: int) -> NDArray[np.uint8]:
    """Random bytes, but with float16 numbers that are finite: subnormal, zero and negative ones among them."""
    generator = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[kind_of(name)][1]
    blocks = generator.integers(0, 256, (rows * 2, size), dtype=np.uint8)
    starts = HALVES.get(name, (0, 2) if name in ("q4_1", "q5_1", "q4_k", "q5_k") else (0,))
    for start in starts:
        number = (generator.standard_normal(len(blocks)) * generator.choice([0, 1e-7, 1e-3, 8], len(blocks))).astype(
            "<f2"
        )
        blocks[:, start : start + 2] = number.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", NAMES)
class TestBytes:
    def test_bits_are_those_of_the_format(self, name: str) -> None:
        block, nbytes = gguf.GGML_QUANT_SIZES[kind_of(name)]
        assert gguf_codec(name).bits((7, 3 * block)) == 8 * 7 * 3 * nbytes
        assert gguf_codec(name) == (GgufScalar(name) if name in KINDS else GgufVector(name))
        assert str(parse(name)) == name

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 2**31), rows=st.integers(1, 5))
    def test_any_bytes_decode_as_the_format_says(self, name: str, seed: int, rows: int) -> None:
        blocks = any_blocks(name, rows, seed)
        codec, columns = gguf_codec(name), 2 * gguf_codec(name).kind.block
        tensors = {"blocks": torch.from_numpy(blocks)}
        values = codec.decode(tensors, (rows, columns))
        assert np.array_equal(values.numpy(), peer(name, blocks).reshape(rows, columns))
        by_numpy = alone(name).decode(name, {"blocks": blocks}, rows, columns)
        assert by_numpy.dtype == np.float32
        assert np.array_equal(by_numpy, values.numpy())
        encoded = codec.unpack(tensors, (rows, columns))
        again = codec.pack(encoded, (rows, columns))["blocks"]
        if name == "tq1_0":  # bytes that differ may hold the same digits
            assert torch.equal(codec.decode({"blocks": again}, (rows, columns)), values)
        else:
            assert torch.equal(again, tensors["blocks"])
        codes, _ = codec.round(values, encoded.side, torch.arange(columns))  # also where a scale is 0
        assert int(codes.min()) >= 0
        assert name in GRIDS or int(codes.max()) < KINDS[name].levels

    def test_zeros_and_tiny_weights(self, name: str) -> None:
        weight = gaussian(6, WIDTH) * 0.05
        weight[1] = 0
        weight[2, :256] = 0
        weight[3] *= 1e-6  # scales are subnormal, or below what float16 holds
        weight[4, 32:64] = 3e4
        codec = gguf_codec(name)
        for solver in (Nearest(), ErrorFeedback(order="natural")):
            gram = correlated_gram(WIDTH)
            encoded = solver.solve(weight, codec, solver.prepare(gram, codec.span))
            values = codec.values(encoded, WIDTH)
            assert torch.isfinite(values).all()
            tensors = codec.pack(encoded, (6, WIDTH))
            assert torch.equal(codec.decode(tensors, (6, WIDTH)), values)
            assert np.array_equal(peer(name, tensors["blocks"].numpy()).reshape(6, WIDTH), values.numpy())
            assert float(values[1].abs().max()) <= 2.0**-24 * 127
            assert float((values[3] - weight[3]).abs().max()) < 1e-5

    def test_numpy_decoder(self, name: str) -> None:
        check_numpy_decoder(alone(name), name, 5, WIDTH)

    def test_shapes(self, name: str) -> None:
        block = gguf_codec(name).kind.block
        with pytest.raises(ShapeMismatch, match=rf"{block} do not divide {block + 8}"):
            gguf_codec(name).parts((3, block + 8))
        with pytest.raises(ValueError, match=rf"{block} do not divide {block + 8}"):
            alone(name).parts(name, 3, block + 8)
        codec, empty = gguf_codec(name), torch.empty(0, WIDTH)
        encoded = CoordinateDescent().solve(
            empty, codec, CoordinateDescent().prepare(correlated_gram(WIDTH), codec.span)
        )
        assert codec.decode(codec.pack(encoded, (0, WIDTH)), (0, WIDTH)).shape == (0, WIDTH)


@pytest.mark.parametrize("name", NAMES)
class TestSolvers:
    def test_each_step_lowers_the_distortion(self, name: str) -> None:
        gram, weight, codec = correlated_gram(WIDTH), gaussian(24, WIDTH, seed=3) * 0.05, gguf_codec(name)

        def lost(encoded: Encoded) -> float:
            error = weight - codec.values(encoded, WIDTH)
            return float(((error @ gram.matrix) * error).double().sum())

        nearest = Nearest().solve(weight, codec, gram)
        solver = CoordinateDescent(start=ErrorFeedback(refit=False))
        plain = solver.start.solve(weight, codec, solver.prepare(gram, codec.span).start)
        fitted = Encoded(plain.codes, codec.refit(weight, plain, gram.matrix))
        moved = solver.solve(weight, codec, solver.prepare(gram, codec.span))
        assert lost(plain) < 0.7 * lost(nearest)
        assert lost(fitted) < 0.99 * lost(plain)
        assert lost(moved) < lost(plain)

    def test_refit_never_raises_a_row(self, name: str) -> None:
        gram, weight, codec = correlated_gram(WIDTH), gaussian(9, WIDTH, seed=5), gguf_codec(name)
        side = codec.prepare(weight)
        # Codes for other weights and a scale that is off, so that there is something to gain.
        other = weight * 1.2 + gaussian(9, WIDTH, seed=6) * 0.3
        encoded = Encoded(codec.round(other, side, torch.arange(WIDTH))[0], side)
        side = codec.refit(weight, encoded, gram.matrix)
        before, after = (
            weight - codec.values(encoded, WIDTH),
            weight - codec.values(Encoded(encoded.codes, side), WIDTH),
        )
        rows = [((error @ gram.matrix) * error).double().sum(1) for error in (before, after)]
        assert (rows[1] <= rows[0]).all()
        assert (rows[1] < 0.9 * rows[0]).any()

    def test_importance_is_heeded(self, name: str) -> None:
        weight, columns = gaussian(16, WIDTH), torch.arange(WIDTH)
        importance = gaussian(1, WIDTH, seed=9)[0].square() + 0.01
        codec = gguf_codec(name).learn(weight, Gram(torch.diag(importance), 1))
        errors = [
            (weight - codec.round(weight, codec.prepare(weight, share), columns)[1]).square() * importance
            for share in (importance, None)
        ]
        assert float(errors[0].sum()) < float(errors[1].sum())


@pytest.mark.parametrize("name", ["q5_1", "q3_k", "iq4_xs", "iq2_xs"])
def test_the_bytes_are_a_tensor_of_a_gguf_file(name: str, tmp_path: Path) -> None:
    codec, weight = gguf_codec(name), gaussian(12, WIDTH) * 0.05
    tensors, values = Encoder(ErrorFeedback())(weight, codec, correlated_gram(WIDTH))
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("w", tensors["blocks"].numpy(), raw_dtype=gguf.GGMLQuantizationType[name.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tensor,) = gguf.GGUFReader(tmp_path / "one.gguf").tensors
    assert tensor.shape.tolist() == [WIDTH, 12]
    assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), values.numpy())


@pytest.mark.parametrize("text", ["rot(iq3_xxs)", "sum(q2_k,lowrank2)", "rows(5:q6_k,12:iq2_s)", "rot(q4_1)"])
def test_inside_other_codecs(text: str) -> None:
    codec, weight, gram = parse(text), gaussian(12, WIDTH) * 0.05, correlated_gram(WIDTH)
    for stretch in codec.stretches(12):
        rows = weight[stretch.start : stretch.stop]
        tensors, values = Encoder(CoordinateDescent())(rows, stretch.codec, gram)
        shape = (stretch.stop - stretch.start, WIDTH)
        assert stretch.codec.bits(shape) == 8 * sum(tensor.nbytes for tensor in tensors.values())
        assert torch.equal(stretch.codec.decode(tensors, shape), values)
        lost, whole = (float(((one @ gram.matrix) * one).sum()) for one in (rows - values, rows))
        assert lost < 0.06 * whole


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0"])
def test_no_worse_than_the_formats_own_quantizer(name: str) -> None:
    weight = gaussian(32, 1024)
    theirs = peer(name, gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name.upper()]))
    assert squared_error(name, weight) < 0.97 * float(np.square(weight.numpy() - theirs).mean())


@pytest.mark.parametrize(
    ("name", "ceiling"),
    # Mean squared error on a unit Gaussian that llama.cpp's own quantizer has without an importance matrix, measured
    # once on 128 rows of 1024 (ggml_quantize_chunk).
    [("q4_0", 0.00741), ("q4_1", 0.00615), ("q5_0", 0.00183), ("q5_1", 0.00144), ("q8_0", 2.9e-5), ("iq4_nl", 0.00583),
     ("q2_k", 0.0880), ("q3_k", 0.02297), ("q4_k", 0.00510), ("q5_k", 0.001316), ("q6_k", 0.000316),
     ("iq4_xs", 0.00592), ("tq1_0", 0.65), ("tq2_0", 0.65), ("iq2_xxs", 0.1198), ("iq2_xs", 0.0909), ("iq2_s", 0.0620),
     ("iq3_xxs", 0.0334), ("iq3_s", 0.01875)],
)  # fmt: skip
def test_below_the_error_of_llama_cpp(name: str, ceiling: float) -> None:
    assert squared_error(name, gaussian(32, 1024)) < 0.98 * ceiling


@pytest.mark.parametrize("name", GRIDS)
class TestVectors:
    def test_grids_are_those_of_the_format(self, name: str) -> None:
        theirs = getattr(gguf.quants, name.upper())
        theirs.init_grid()
        assert np.array_equal(GRIDS[name].grid.numpy(), theirs.grid.reshape(theirs.grid_shape))
        assert np.array_equal(decoder_numpy_gguf_vectors.grid(name), GRIDS[name].grid.numpy())

    @pytest.mark.parametrize("weighted", [False, True])
    def test_the_nearest_vector_is_found(self, name: str, weighted: bool) -> None:
        codec, kind = GgufVector(name), GRIDS[name]
        generator = torch.Generator().manual_seed(4)
        middle = float(kind.grid.square().mean().sqrt())
        target = torch.randn(60, kind.span, generator=generator) * middle
        worth = torch.rand(60, kind.span, generator=generator) * 3 + 0.1 if weighted else torch.ones(60, kind.span)
        found = codec.closest(target, worth if weighted else None)
        assert not kind.even or not parity(found >> kind.bits * kind.points).any()
        least = (worth * (codec.unit(found[:, None]) - target).square()).sum(1)
        tries = torch.randint(0, 1 << kind.bits * kind.points + kind.span, (50_000,), generator=generator)
        tries = tries[parity(tries >> kind.bits * kind.points) == 0] if kind.even else tries
        # Random vectors, and for each target the signs that are its own with random points.
        others = codec.unit(tries[:, None])
        own = others.abs()[None, :3000] * torch.where(target < 0, -1.0, 1.0)[:, None]
        allowed = (target < 0).sum(1) % 2 == 0 if kind.even else torch.ones(60, dtype=torch.bool)
        for vectors, some in ((others.expand(60, -1, -1), torch.ones(60, dtype=torch.bool)), (own, allowed)):
            loss = (worth[:, None] * (vectors - target[:, None]).square()).sum(2).amin(1)
            assert (least <= loss * 1.0001)[some].all()

    def test_columns_that_matter_are_nearer(self, name: str) -> None:
        weight, gram = gaussian(16, WIDTH) * 0.05, correlated_gram(WIDTH)
        scale = torch.exp(gaussian(1, WIDTH, seed=8)[0])
        uneven = Gram(gram.matrix * scale * scale[:, None], gram.tokens)
        losses = []
        for codec in (GgufVector(name), GgufVector(name).learn(weight, uneven)):
            assert codec == GgufVector(name)
            encoded = Nearest().solve(weight, codec, uneven)
            error = weight - codec.values(encoded, WIDTH)
            losses.append(float(((error @ uneven.matrix) * error).sum()))
        assert losses[1] < 0.85 * losses[0]


def test_bad_texts() -> None:
    with pytest.raises(BadInput, match="no options"):
        parse("q4_k:g64")
    with pytest.raises(BadInput, match=r"Did you mean q4_k"):
        parse("q4_K_S")
    with pytest.raises(BadInput, match="q4_k"):
        GgufScalar("q9_k")
    with pytest.raises(BadInput, match="iq3_s"):
        GgufVector("iq4_xs")
    with pytest.raises(ValueError, match="options"):
        decoder_numpy_gguf.parts("q4_k:g64", 1, 256)
