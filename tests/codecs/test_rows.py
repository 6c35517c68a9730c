"""Stretches of rows: each decodes as its own codec does, and any choice of rows is that choice of the whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.codecs import RowStretches, parse
from tersor.contracts import Codec, DirectCodec, LeafCodec, Stretch
from tersor.errors import BadInput, ShapeMismatch
from tersor.solvers import Nearest

COLUMNS = 24
leaf_texts = st.sampled_from(
    [
        *("int1:g8", "int2:g24:s8", "int3:g4:asym", "int4:row:bf16", "int5:row:asym:s8", "int6:g12", "int8:row"),
        *("fp4:e2m1:g8", "fp6:e3m2:row:s8", "fp8:e4m3:g6:bf16", "lut2:row", "lut3:row", "lut4:row", "bf16", "fp16"),
    ]
)


@st.composite
def row_codecs(draw: st.DrawFn) -> RowStretches:
    """One to five stretches, of 1 to 6 rows each."""
    leaves = draw(st.lists(leaf_texts, min_size=1, max_size=5))
    lengths = draw(st.lists(st.integers(1, 6), min_size=len(leaves), max_size=len(leaves)))
    return RowStretches(tuple(itertools.accumulate(lengths)), tuple(parse(text) for text in leaves))


def encode(codec: Codec, weight: Tensor) -> dict[str, Tensor]:
    """Stored tensors of a codec without stretches."""
    if isinstance(codec, LeafCodec):
        return codec.pack(Nearest().solve(weight, codec, None), (weight.shape[0], weight.shape[1]))
    assert isinstance(codec, DirectCodec)
    return codec.encode(weight)


def encoded(codec: Codec, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors of a random weight, and what their stretches decode to, each by itself."""
    assert isinstance(codec, RowStretches)
    weight = torch.randn(codec.stops[-1], COLUMNS, generator=torch.Generator().manual_seed(seed))
    tensors, values = {}, []
    for start, stop, leaf, index in zip((0, *codec.stops), codec.stops, codec.codecs, itertools.count(), strict=False):
        stored = encode(leaf, weight[start:stop])
        tensors.update({f"s{index}_{name}": tensor for name, tensor in stored.items()})
        values.append(leaf.decode(stored, (stop - start, COLUMNS)))
    return tensors, torch.cat(values)


@settings(max_examples=100, deadline=None)
@given(codec=row_codecs())
def test_text_round_trip(codec: RowStretches) -> None:
    text = str(codec)
    again = parse(text)
    assert again == codec
    assert hash(again) == hash(codec)
    assert str(again) == text
    assert parse(" " + text.replace(",", ", ") + " ") == codec


@settings(max_examples=100, deadline=None)
@given(codec=row_codecs(), seed=st.integers(0, 999))
def test_parts_are_those_of_the_stretches_and_so_are_the_bits(codec: RowStretches, seed: int) -> None:
    shape = (codec.stops[-1], COLUMNS)
    tensors, values = encoded(codec, seed)
    declared = {part.name: (part.dtype, part.shape) for part in codec.parts(shape)}
    assert declared == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    lengths = [stop - start for start, stop in zip((0, *codec.stops), codec.stops, strict=False)]
    alone = [leaf.bits((rows, COLUMNS)) for leaf, rows in zip(codec.codecs, lengths, strict=True)]
    assert codec.bits(shape) == sum(alone) == 8 * sum(tensor.nbytes for tensor in tensors.values())
    decoded = codec.decode(tensors, shape)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, values)


@settings(max_examples=200, deadline=None)
@given(codec=row_codecs(), data=st.data())
def test_any_rows_are_those_rows_of_the_whole(codec: RowStretches, data: st.DataObject) -> None:
    tensors, values = encoded(codec)
    total = len(values)
    numbers = st.lists(st.integers(0, total - 1), max_size=12).map(lambda rows: torch.tensor(rows, dtype=torch.int64))
    rows = data.draw(st.slices(total).filter(lambda s: (s.step or 1) > 0) | numbers)
    found = codec.decode_rows(tensors, (total, COLUMNS), rows)
    assert found.dtype == torch.float32
    assert torch.equal(found, values[rows])


@pytest.mark.parametrize(
    "rows", [slice(0, 0), slice(5, 5), slice(7, 2), slice(9, None), torch.tensor([], dtype=torch.long)]
)
@pytest.mark.parametrize(
    "text", ["rows(4:int3:g8:asym:s8,9:lut3:row)", "rows(9:fp4:e2m1:g8)", "rows(1:bf16,9:int8:row)"]
)
def test_no_rows_at_all(text: str, rows: slice | Tensor) -> None:
    codec = parse(text)
    tensors, _ = encoded(codec)
    assert codec.decode_rows(tensors, (codec.stops[-1], COLUMNS), rows).shape == (0, COLUMNS)


@pytest.mark.parametrize(
    "text", ["int3:g8:asym:s8", "int4:row", "int8:g8", "fp6:e3m2:g8:bf16", "lut3:row", "bf16", "fp16"]
)
def test_codecs_without_stretches_give_rows_too(text: str) -> None:
    codec = parse(text)
    tensors = encode(codec, torch.randn(9, COLUMNS, generator=torch.Generator().manual_seed(1)))
    whole = codec.decode(tensors, (9, COLUMNS))
    assert codec.stretches(9) == (Stretch(0, 9, codec, ""),)
    for rows in (slice(2, 7), slice(3, 3), slice(None), torch.tensor([8, 0, 0, 3]), torch.tensor([], dtype=torch.long)):
        assert torch.equal(codec.decode_rows(tensors, (9, COLUMNS), rows), whole[rows])


def test_stretches_of_one_row() -> None:
    codec = parse("rows(1:int4:row,2:lut2:row,3:bf16,4:int1:g8)")
    assert codec.stretches(4) == tuple(
        Stretch(i, i + 1, parse(text), f"s{i}_") for i, text in enumerate(["int4:row", "lut2:row", "bf16", "int1:g8"])
    )
    tensors, values = encoded(codec)
    assert torch.equal(codec.decode(tensors, (4, COLUMNS)), values)
    for row in range(4):
        assert torch.equal(codec.decode_rows(tensors, (4, COLUMNS), slice(row, row + 1)), values[row : row + 1])


def test_the_last_stop_must_be_the_number_of_rows() -> None:
    codec = parse("rows(4:int4:g8,9:bf16)")
    for rows in (8, 10, 4):
        with pytest.raises(ShapeMismatch, match=rf"of 9 rows.*has {rows};.*must be {rows}"):
            codec.parts((rows, COLUMNS))
        with pytest.raises(ShapeMismatch):
            codec.stretches(rows)
        assert not codec.accepts((rows, COLUMNS))
    assert codec.accepts((9, COLUMNS))
    with pytest.raises(ShapeMismatch, match="8"):
        codec.parts((9, 25))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *[(text, "cannot be read: write rows") for text in ("rows(", "rows()", "rows(bf16)", "rows(4:bf16", "rows(4)")],
        *[(text, "cannot be read: write rows") for text in ("rows(4:bf16,)", "rows(-4:bf16)", "rows(1e3:bf16)")],
        ("rows(9999999999:bf16)", "cannot be read: write rows"),
        ("rows(4:bf16)x", "cannot be read: write rows"),
        ("rows(0:bf16)", "must ascend.*found 0"),
        ("rows(4:bf16,4:int4:g8)", "must ascend.*found 4, 4"),
        ("rows(9:bf16,4:int4:g8)", "must ascend.*found 9, 4"),
        ("rows(4:rows(4:bf16))", "nests|inside"),
        ("rows(4:rows(2:bf16,4:fp16))", r"rows\("),
        ("rows(4:int4)", "'int4'.*group once"),
        ("rows(4:itn4:g8)", "Did you mean int4"),
        ("rows(4:)", "Unknown codec"),
        ("row(4:bf16)", r"Unknown codec.*rows\("),
    ],
)
def test_texts_that_are_none(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_stops_and_codecs_must_pair_up() -> None:
    for stops, codecs in (((), ()), ((4,), ()), ((4, 9), (parse("bf16"),))):
        with pytest.raises(BadInput, match="one stop for each"):
            RowStretches(stops, codecs)
