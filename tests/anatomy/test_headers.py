"""Safetensors files as they are written: the library reads them, sizes are exact, and there is one writer of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import tersor
from tersor.anatomy.headers import (
    DTYPE_NAMES,
    DTYPES,
    Item,
    fill_shards,
    fixed_bytes,
    header,
    index,
    least_fixed_bytes,
    most_shards,
    shard_name,
)
from tersor.errors import BadInput

names = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30)
items = st.dictionaries(
    names, st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 40), max_size=3)), max_size=8
).map(lambda found: [Item(name, DTYPES[kind], tuple(shape)) for name, (kind, shape) in found.items()])


@settings(max_examples=60, deadline=None)
@given(items=items)
def test_the_library_reads_what_is_written(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> None:
    (shard,) = fill_shards(items, 10**9)
    path = tmp_path_factory.getbasetemp() / "one.safetensors"
    path.write_bytes(header(shard) + bytes(sum(item.nbytes for item in shard)))
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {item.name for item in items}
        for item in items:
            found = file.get_tensor(item.name)
            assert (found.dtype, tuple(found.shape)) == (item.dtype, item.shape)


@settings(max_examples=100, deadline=None)
@given(items=items, limit=st.sampled_from([1, 30, 1000, 10**9]))
def test_bounds_hold_wherever_a_tensor_lies(items: list[Item], limit: int) -> None:
    shards = fill_shards(items, limit)
    assert sorted(item.name for shard in shards for item in shard) == sorted(item.name for item in items)
    data = sum(item.nbytes for item in items)
    places = {item.name: shard_name(n, len(shards)) for n, shard in enumerate(shards, 1) for item in shard}
    several = len(shards) > 1
    size = data + sum(len(header(shard)) for shard in shards) + (len(index(places, data)) if several else 0)
    assert len(shards) <= max(1, min(most_shards(data, limit), len(items)))
    least = least_fixed_bytes() + data + sum(item.least_bytes() for item in items)
    most = fixed_bytes(len(shards)) + data + sum(item.most_bytes(limit, sharded=several) for item in items)
    assert least <= size <= most
    if several:
        assert json.loads(index(places, data)) == {"metadata": {"total_size": data}, "weight_map": places}


def test_what_no_file_can_hold_is_refused() -> None:
    for name, dtype, word in (("a", torch.complex64, "complex64"), ("__metadata__", torch.uint8, "cannot be called")):
        with pytest.raises(BadInput, match=word):
            Item(name, dtype, (1,))


def test_there_is_one_table_of_types() -> None:
    """But for the NumPy decoder's, which shares nothing by intention."""
    assert len(DTYPE_NAMES) == len(DTYPES)
    folder = Path(tersor.__file__).parent
    held = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*.py")
        if '"F8_E4M3"' in path.read_text("utf-8") or '"data_offsets": [' in path.read_text("utf-8")
    }
    assert held <= {"anatomy/headers.py", "artifact/decoder_numpy.py"}
