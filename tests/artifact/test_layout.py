"""Predicted layout against real files: sizes to the byte, readable by the safetensors library, costs that bound."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.artifact import ArtifactWriter, compute_layout, fixed_cost, header_cost, most_shards, tensor_header_cost
from tersor.artifact.header import DTYPE_NAMES, METADATA, read_header
from tersor.contracts import Part
from tersor.errors import BadInput

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
tensor_maps = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(list(DTYPE_NAMES)), shapes),
    max_size=9,
)


def _fill(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.bool:
        return (torch.arange(math.prod(shape)) % 2 == 0).reshape(shape)
    size = math.prod(shape) * dtype.itemsize
    return (torch.arange(size) * 7 % 251).to(torch.uint8).view(dtype).reshape(shape)


@pytest.mark.usefixtures("no_sync")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=tensor_maps, limit=st.sampled_from([1, 16, 100, 10**9]))
def test_predicted_files_are_the_real_files(
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], limit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    layout = compute_layout(tensors, max_shard_size=limit)
    contents = {name: _fill(dtype, shape) for name, (dtype, shape) in tensors.items()}
    folder = tmp_path_factory.mktemp("layout") / "out.partial"
    with ArtifactWriter(folder, layout, {}) as writer:
        writer.write("all", contents)
        writer.finish()
    assert sum((folder / file).stat().st_size for file in layout.files) == layout.total_bytes
    loaded = {}
    for shard in layout.shards:
        assert (folder / shard.name).stat().st_size == shard.nbytes
        assert len(shard.header) % 8 == 0
        header = read_header(folder / shard.name)
        assert header.metadata == METADATA
        if header.tensors:
            loaded.update(safetensors.torch.load_file(folder / shard.name))
        for name, stored in header.tensors.items():
            entry = layout.entries[name]
            assert (entry.file, entry.offset) == (shard.name, header.data_start + stored.start)
            assert entry.offset % entry.dtype.itemsize == 0
    assert set(loaded) == set(tensors)
    for name, tensor in loaded.items():
        assert (tensor.dtype, tuple(tensor.shape)) == tensors[name]
        assert tensor.reshape(-1).view(torch.uint8).equal(contents[name].reshape(-1).view(torch.uint8))


@settings(max_examples=200, deadline=None)
@given(tensors=tensor_maps, limit=st.sampled_from([1, 16, 100, 10**9]))
def test_costs_bound_the_size_from_above_and_tightly(
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], limit: int
) -> None:
    layout = compute_layout(tensors, max_shard_size=limit)
    data = sum(entry.nbytes for entry in layout.entries.values())
    assert len(layout.shards) <= most_shards(data, limit)
    sharded = len(layout.shards) > 1
    bound = fixed_cost(len(layout.shards)) + data
    bound += sum(
        tensor_header_cost(name, *spec, max_shard_size=limit, sharded=sharded) for name, spec in tensors.items()
    )
    assert layout.total_bytes <= bound
    largest = max([limit, *(entry.nbytes for entry in layout.entries.values())])
    digits = 2 * (len(str(largest)) - 1) * len(tensors)
    assert bound - layout.total_bytes <= digits + 8 * len(layout.shards) + 24


def test_header_cost_of_a_layer_is_that_of_its_tensors() -> None:
    parts = (Part("codes", torch.uint8, (64, 48)), Part("scale", torch.float16, (64, 2)))
    assert header_cost("model.q", parts) == sum(
        tensor_header_cost(f"model.q.{part.name}", part.dtype, part.shape) for part in parts
    )
    with_index = header_cost("model.q", parts, sharded=True)
    assert with_index > header_cost("model.q", parts) > header_cost("model.q", parts, max_shard_size=10**5)


def test_layout_is_a_function_of_its_input() -> None:
    tensors = {f"t{i}": (torch.uint8 if i % 2 else torch.float16, (i, 3)) for i in range(20)}
    assert compute_layout(tensors).digest() == compute_layout(dict(tensors)).digest()
    assert compute_layout(tensors).digest() != compute_layout(tensors, max_shard_size=100).digest()
    reordered = dict(reversed(tensors.items()))
    assert compute_layout(reordered).digest() != compute_layout(tensors).digest()


def test_shards_are_named_and_filled_as_said() -> None:
    layout = compute_layout(
        {"a": (torch.uint8, (60,)), "b": (torch.uint8, (40,)), "c": (torch.uint8, (1,)), "d": (torch.uint8, (500,))},
        max_shard_size=100,
    )
    assert {name: entry.file for name, entry in layout.entries.items()} == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00001-of-00003.safetensors",
        "c": "model-00002-of-00003.safetensors",
        "d": "model-00003-of-00003.safetensors",
    }
    assert layout.files[-1] == "model.safetensors.index.json"
    assert compute_layout({}).files == ("model.safetensors",)


@pytest.mark.parametrize(
    ("name", "dtype", "word"),
    [
        ("a", torch.complex64, "complex64"),
        ("__metadata__", torch.uint8, "__metadata__"),
        ("\ud800", torch.uint8, "Unicode"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(name: str, dtype: torch.dtype, word: str) -> None:
    with pytest.raises(BadInput, match=word):
        compute_layout({name: (dtype, (1,))})


def test_paths_are_not_touched(tmp_path: Path) -> None:
    compute_layout({"a": (torch.uint8, (2**50,))})
    assert not any(tmp_path.iterdir())
