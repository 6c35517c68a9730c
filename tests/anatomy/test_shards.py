import contextlib
import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tersor.anatomy.shards import list_tensors, map_tensor, read_infos, samples
from tersor.errors import BadInput, CorruptArtifact, TersorError

KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


def example(kind):
    return (torch.arange(12) % 2).reshape(3, 4).to(kind)


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, begin, end, kind="F32"):
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_of_all_kinds_come_back(tmp_path):
    tensors = {f"t{i}": example(kind) for i, kind in enumerate(KINDS)}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "model.safetensors")
    infos = list_tensors(tmp_path)
    assert infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = map_tensor(infos[name])
        assert (found.dtype, found.shape, infos[name].nbytes) == (tensor.dtype, tensor.shape, tensor.nbytes)
        assert torch.equal(
            found.view(torch.uint8) if found.ndim else found, tensor.view(torch.uint8) if found.ndim else tensor
        )


def test_a_tensor_at_an_odd_place_is_read_right(tmp_path):
    file = tmp_path / "model.safetensors"
    values = torch.tensor([1.0, -2.0])
    header = json.dumps({"a": entry([3], 0, 3, "U8"), "b": entry([2], 3, 11)}).encode()
    file.write_bytes(raw(header, b"xyz" + values.numpy().tobytes()))
    assert torch.equal(map_tensor(read_infos(file)["b"]), values)


BROKEN = {
    "not a whole": b"\x10\x00",
    "announce": struct.pack("<Q", 1 << 60) + b"{}",
    "not JSON (": raw(b"{ not json"),
    "not a JSON object": raw([1]),
    "lacks dtype": raw({"a": {"dtype": "F32", "shape": [1]}}),
    "needs 8 bytes": raw({"a": entry([2], 0, 4)}, b"1234"),
    "begins at byte 4": raw({"a": entry([1], 4, 8)}, b"12345678"),
    "expected 4": raw({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"123456"),
    "truncated": raw({"a": entry([2], 0, 8)}, b"1234"),
    "too long": raw({"a": entry([1], 0, 4)}, b"12345"),
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_files_are_told_apart(tmp_path, words):
    (tmp_path / "model.safetensors").write_bytes(BROKEN[words])
    with pytest.raises(CorruptArtifact) as caught:
        list_tensors(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_a_type_that_torch_has_not_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(raw({"a": entry([1], 0, 4, "X99")}, b"1234"))
    with pytest.raises(BadInput, match="X99"):
        list_tensors(tmp_path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_damage_gives_anything_but_a_sentence(tmp_path, data):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.int8)}, file)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(TersorError):
        for info in list_tensors(tmp_path).values():
            map_tensor(info)


def shards(folder, placed):
    save_file({"a": torch.ones(1)}, folder / "one.safetensors")
    save_file({"b": torch.ones(2)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(placed if isinstance(placed, str) else json.dumps(placed))
    return folder


def test_an_index_and_what_can_be_wrong_with_it(tmp_path):
    good = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    assert set(list_tensors(shards(tmp_path, good))) == {"a", "b"}
    for placed, words in (
        ({"weight_map": {"a": "one.safetensors", "b": "three.safetensors"}}, "three.safetensors, which is not in"),
        ({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}, "places tensor c in two.safetensors"),
        ({"weight_map": {"a": "../one.safetensors"}}, "not the name of a file beside it"),
        ({"weight_map": {}}, "no weight_map"),
        ("{", "not JSON"),
    ):
        with pytest.raises(CorruptArtifact, match=words):
            list_tensors(shards(tmp_path, placed))


def test_folders_without_usable_weights(tmp_path):
    with pytest.raises(BadInput, match="no safetensors file; expected"):
        list_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadInput, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        list_tensors(tmp_path)
    for name in ("x", "y"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(BadInput, match="2 safetensors files but no model"):
        list_tensors(tmp_path)
    (tmp_path / "y.safetensors").unlink()
    assert set(list_tensors(tmp_path)) == {"x"}


def test_samples_cover_start_stretches_and_end(tmp_path):
    file = tmp_path / "f"
    file.write_bytes(bytes(range(100)))
    assert [list(piece) for piece in samples(file, every=40, length=2)] == [[0, 1], [40, 41], [80, 81], [98, 99]]
