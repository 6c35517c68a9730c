"""The trellis codecs, their search, and the NumPy decoder."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.artifact import decoder_numpy_trellis
from tersor.codecs import Trellis, parse, trellis, trellis_tables
from tersor.contracts import Encoded, Gram, LeafCodec
from tersor.errors import BadInput
from tersor.kernels import reference_trellis
from tersor.kernels import trellis as compiled
from tersor.solvers import Encoder, ErrorFeedback, Nearest

KEYS = sorted(trellis_tables.TABLES)
TEXTS = [f"trellis{bits}:L{window}" for bits, window in KEYS]


def gaussian(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int, seed: int = 2) -> Gram:
    x = gaussian(4 * columns, columns, seed) @ (gaussian(columns, columns, seed + 1) * torch.linspace(2, 0.05, columns))
    return Gram(x.T @ x / len(x), len(x))


def distortion(error: Tensor, gram: Gram) -> float:
    return float(((error @ gram.matrix) * error).sum())


def search(target: Tensor, scale: Tensor, codec: Trellis, *, plain: bool, tile: int, turns: int = 1) -> Tensor:
    run = reference_trellis.trellis_search if plain else compiled.trellis_search
    bits, window = codec.bits_per_code, codec.window
    values = trellis.table_of(bits, window)
    return run(target, scale, values, bits=bits, window=window, tile=tile, context=24, turns=turns)


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trip(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(text) == parse(f" {text}")
    bound = Trellis(2).learn(torch.zeros(600, 4), None)
    assert bound.tile(200) == bound.rows_of_tile == 200
    assert bound == parse("trellis2")
    assert hash(bound) == hash(Trellis(2))
    assert str(bound) == "trellis2:L12"


@pytest.mark.parametrize(
    ("text", "says"),
    [("trellis5", "1 to 4"), ("trellis0:L12", "1 to 4"), ("trellis2:L11", "L8, L10, L12"),
     ("trellis4:L16", "no window"), ("trellis2:12", "such as trellis2:L12"), ("trellis2:L12:L12", "such as"),
     ("trelis2", "trellis2")],
)  # fmt: skip
def test_unreadable_codecs_say_why(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


@settings(max_examples=60, deadline=None)
@given(key=st.sampled_from(KEYS), rows=st.integers(1, 700), columns=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_packing_tiles_and_decoding_agree(key: tuple[int, int], rows: int, columns: int, seed: int) -> None:
    codec = Trellis(*key)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2 ** key[0], (rows, columns), generator=generator, dtype=torch.int32)
    scale = (torch.rand(rows, 1, generator=generator) + 0.01).half().float()
    encoded = Encoded(codes, {"scale": scale})
    tensors = codec.pack(encoded, (rows, columns))
    declared = {part.name: (part.dtype, part.shape) for part in codec.parts((rows, columns))}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == declared
    assert codec.bits((rows, columns)) == 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert codec.tile(rows) <= 256
    assert torch.equal(codec.unpack(tensors, (rows, columns)).codes, codes)
    values = codec.decode(tensors, (rows, columns))
    assert torch.equal(values, codec.values(encoded, columns))
    picks = torch.randint(0, rows, (7,), generator=generator)
    assert torch.equal(codec.decode_rows(tensors, (rows, columns), picks), values[picks])
    assert torch.equal(codec.decode_rows(tensors, (rows, columns), slice(rows // 3, rows)), values[rows // 3 :])
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    decoded = decoder_numpy_trellis.decode(str(codec), arrays, rows, columns)
    assert torch.equal(torch.from_numpy(decoded), values)
    assert {name: shape for name, (_, shape) in decoder_numpy_trellis.parts(str(codec), rows, columns).items()} == {
        part.name: part.shape for part in codec.parts((rows, columns))
    }


def test_numpy_decoder_has_the_same_tables_and_refuses_other_texts() -> None:
    assert decoder_numpy_trellis.TABLES == trellis_tables.TABLES
    for text in ("trellis2:L11", "trellis5:L12", "trellis2:12", "int2:g64"):
        with pytest.raises(ValueError, match="trellis<bits>"):
            decoder_numpy_trellis.parts(text, 8, 8)


@pytest.mark.parametrize(("bits", "window"), [key for key in KEYS if key[1] <= 12])
def test_window_maps_and_tables(bits: int, window: int) -> None:
    masks, unit, integers = trellis_tables.TABLES[bits, window]
    index = reference_trellis.window_map(masks, window)
    # Full rank: every index belongs to as many states. Neither siblings nor merging paths ever share a value's index.
    assert set(torch.bincount(index).tolist()) == {2 ** (window - len(masks))}
    assert len(integers) == 2 ** len(masks)
    assert max(abs(value) for value in integers) <= 127
    assert (index.view(-1, 2**bits).sort(1).values.diff(dim=1) > 0).all()
    assert (index.view(2**bits, -1).sort(0).values.diff(dim=0) > 0).all()
    assert 0 < unit < 2**17


def test_a_window_is_what_the_specification_says() -> None:
    codes = torch.tensor([[1], [2], [3], [0], [2], [1], [1]], dtype=torch.int32)
    found = reference_trellis.states(codes, 2, 8, 4)
    # Tiles of 4 and 3 rows; own code lowest, older ones above, around the ring.
    expected = [0b10110001, 0b11000110, 0b00011011, 0b01101100, 0b10010110, 0b01011001, 0b01100101]
    assert found[:, 0].tolist() == expected


@pytest.mark.skipif(compiled._trellis is None, reason="nothing was compiled")
@pytest.mark.parametrize(("bits", "window"), [(1, 8), (2, 8), (3, 8), (4, 8), (1, 10), (2, 10), (3, 10), (4, 10)])
def test_compiled_and_plain_searches_agree(bits: int, window: int) -> None:
    codec = Trellis(bits, window)
    target = gaussian(75, 5, seed=bits)
    scale = gaussian(75, 1, seed=9).abs()[:, 0] + 0.1
    target[:, 4] = 0.0
    target[20:30, 3] = 1e30  # infinite costs end in ties
    for tile in (75, 40, 72):  # the last with 3 rows that do not fill a window
        for turns in (1, 2, 3):
            found, wanted = (search(target, scale, codec, plain=on, tile=tile, turns=turns) for on in (False, True))
            assert torch.equal(found, wanted)


@given(key=st.sampled_from([key for key in KEYS if key[1] <= 10]), rows=st.integers(1, 90), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_more_turns_around_the_ring_lose_no_more(key: tuple[int, int], rows: int, seed: int) -> None:
    codec, target = Trellis(*key), gaussian(rows, 4, seed)
    scale = torch.linspace(0.5, 1.5, rows)
    values = trellis.table_of(*key)
    losses = []
    for turns in (1, 2, 3):
        path = search(target, scale, codec, plain=False, tile=rows, turns=turns)
        assert torch.equal(reference_trellis.states(path & (2 ** key[0] - 1), *key, rows), path)
        losses.append((target - values[path.long()] * scale[:, None]).square().sum(0))
    assert (losses[1] <= losses[0] * 1.00001).all()
    assert (losses[2] <= losses[1] * 1.00001).all()


@pytest.mark.parametrize(("bits", "window", "rows"), [(1, 8, 16), (2, 8, 8), (1, 8, 7), (2, 8, 3), (4, 10, 2)])
def test_search_comes_near_the_best_of_all_streams(bits: int, window: int, rows: int) -> None:
    codec = Trellis(bits, window)
    target, scale = gaussian(rows, 40, seed=3), torch.linspace(0.5, 1.5, rows)
    values = trellis.table_of(bits, window)

    def error(path: Tensor) -> Tensor:
        assert torch.equal(reference_trellis.states(path & (2**bits - 1), bits, window, rows), path)
        decoded = values[path.long()] * scale[:, None]
        return (target - decoded).square().sum(0)

    best = error(reference_trellis.search_short(target, scale, values, bits, window))
    found = error(search(target, scale, codec, plain=False, tile=rows))
    assert (found >= best - 1e-6).all()
    if rows * bits < window:
        assert torch.allclose(found, best, atol=1e-5)
    else:  # rings of two windows are the worst case: the seam is everywhere
        assert float(found.mean()) < 2.0 * float(best.mean())


@pytest.mark.parametrize(
    ("text", "ceiling"),
    # Shannon: .25 .0625 .01563 .0039; scalar codes with as many bits: .363 .1175 .0345 .0095.
    [("trellis1:L12", 0.267), ("trellis2:L12", 0.0690), ("trellis3:L12", 0.0180), ("trellis4:L12", 0.0047),
     ("trellis2:L8", 0.0750), ("trellis2:L10", 0.0718), ("trellis4:L8", 0.0054)],
)  # fmt: skip
def test_gaussian_distortion(text: str, ceiling: float) -> None:
    codec = parse(text)
    assert isinstance(codec, Trellis)
    columns = 160
    weight = gaussian(256, columns)
    weight /= weight.square().mean().sqrt()  # takes out most of the sample's own error
    ones = torch.ones(256, 1)
    _, values = codec.round(weight, {"scale": ones}, torch.arange(columns))
    squares = (weight - values).square().mean(0)
    # Errors of one path are not independent of one another; those of different columns are.
    assert float(squares.mean()) < ceiling + 2 * float(squares.std()) / math.sqrt(columns)


@pytest.mark.parametrize("text", ["trellis1:L8", "trellis2:L12", "trellis3:L10", "trellis4:L8"])
@pytest.mark.parametrize("rows", [8, 61, 300])
def test_encoding_a_layer(text: str, rows: int) -> None:
    codec = parse(text)
    weight, gram = gaussian(rows, 48, seed=rows) * 0.02, correlated(48)
    weight[rows // 2] = 0
    before = weight.clone()
    tensors, values = Encoder(ErrorFeedback())(weight, codec, gram)
    assert torch.equal(weight, before)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        part.name: part.shape for part in codec.parts((rows, 48))
    }
    assert torch.equal(codec.decode(tensors, (rows, 48)), values)
    _, plain = Encoder(Nearest())(weight, codec, gram)
    assert distortion(weight - values, gram) < 0.97 * distortion(weight - plain, gram)
    assert values[rows // 2].abs().max() < 1e-4
    _, loose = Encoder(ErrorFeedback(refit=False))(weight, codec, gram)
    assert distortion(weight - values, gram) <= distortion(weight - loose, gram) * (1 + 1e-5)


def test_chunks_of_a_layer_and_the_layer_as_one_agree() -> None:
    rows = 600  # three tiles of 200 in chunks of two
    weight = gaussian(rows, 12) * 0.05
    tensors, values = Encoder(Nearest(), workers=2)(weight, parse("trellis2:L8"), None)
    codec = Trellis(2, 8)
    encoded = Nearest().solve(weight, codec, None)
    assert torch.equal(codec.values(encoded, 12), values)
    assert torch.equal(codec.pack(encoded, (rows, 12))["codes"], tensors["codes"])


@pytest.mark.parametrize("text", ["trellis1:L8", "trellis2:L12", "trellis3:L12", "trellis4:L10"])
def test_values_are_fixed_points(text: str) -> None:
    codec = parse(text)
    assert isinstance(codec, Trellis)
    weight = gaussian(64, 24) * 0.3
    side = codec.prepare(weight)
    _, values = codec.round(weight, side, torch.arange(24))
    _, again = codec.round(values, side, torch.arange(24))
    assert torch.equal(again, values)


def test_rows_count_with_their_own_scales() -> None:
    # A row a hundred times larger has its way: its error must not suffer from the small rows around it.
    weight = gaussian(64, 64)
    weight[::2] *= 0.01
    codec = Trellis(2, 10)
    side = codec.prepare(weight)
    _, values = codec.round(weight, side, torch.arange(64))
    error = ((weight - values).square().mean(1) / weight.square().mean(1)).view(32, 2).mean(0)
    assert error[1] < 0.03
    assert error[1] < 0.3 * error[0]


@pytest.mark.skipif(not compiled.compiled, reason="nothing was compiled")
@pytest.mark.parametrize("text", ["trellis1:L8", "trellis2:L10", "trellis3:L12", "trellis4:L8"])
@pytest.mark.parametrize("rows", [64, 300, 513])
def test_columns_in_order_are_searched_at_once_with_the_same_bits(
    text: str, rows: int, monkeypatch: pytest.MonkeyPatch
):
    weight = gaussian(rows, 24)
    codec = parse(text)
    assert isinstance(codec, Trellis)
    factor = ErrorFeedback().prepare(correlated(24))
    at_once = ErrorFeedback().solve(weight, codec, factor)
    assert codec.round_all(weight, codec.prepare(weight), torch.arange(24), weight, torch.zeros(24, 24)) is not None
    monkeypatch.setattr(Trellis, "round_all", LeafCodec.round_all)
    step_by_step = ErrorFeedback().solve(weight, codec, factor)
    assert torch.equal(at_once.codes, step_by_step.codes)
    assert torch.equal(at_once.side["scale"], step_by_step.side["scale"])
