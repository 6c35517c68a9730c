"""Opening artifacts: right values, lazily; every single-byte change is refused, found by the hashes, or harmless."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tersor.artifact import hash_files, open_artifact
from tersor.codecs import parse
from tersor.contracts import Codec
from tersor.errors import BadInput, CorruptArtifact, TersorError


def test_what_it_gives(small: Path, maker: ModuleType) -> None:
    artifact = open_artifact(small)
    assert {name: str(codec) for name, codec in artifact.layers.items()} == {
        name: text for name, (text, _) in maker.small_layers().items()
    }
    assert artifact.shapes == {name: shape for name, (_, shape) in maker.small_layers().items()}
    assert artifact.config["model_type"] == "llama"
    assert artifact.weight_bytes == (small / "model.safetensors").stat().st_size
    for salt, (name, (text, shape)) in enumerate(maker.small_layers().items()):
        expected = maker.tensors_by_hand(text, shape, salt)
        found = artifact.tensors(name)
        assert list(found) == [part.name for part in parse(text).parts(shape)]
        assert all(found[part].equal(tensor) for part, tensor in expected.items())
        whole = artifact.decode(name)
        assert whole.dtype == torch.float32
        assert tuple(whole.shape) == shape
        assert whole.equal(parse(text).decode(expected, shape))
        for rows in (slice(0, 1), slice(1, None), slice(None, -1), slice(1, 1)):
            assert artifact.decode(name, rows).equal(whole[rows])
    for name, tensor in maker.small_kept().items():
        assert artifact.kept(name).equal(tensor)
    artifact.verify_hashes()


@pytest.mark.parametrize("shard", [10**9, 60])
def test_stretches_of_rows(tmp_path: Path, maker: ModuleType, shard: int) -> None:
    text, shape = "rows(1:int6:g4:asym,4:lut2:row,9:bf16)", (9, 8)
    maker.build(tmp_path / "a", {"embed": (text, shape)}, maker.small_kept(), max_shard_size=shard)
    artifact = open_artifact(tmp_path / "a")
    assert list(artifact.tensors("embed")) == ["s0_codes", "s0_scale", "s0_zero", "s1_codes", "s1_table", "s2_weight"]
    whole = artifact.decode("embed")
    assert whole.equal(parse(text).decode(maker.tensors_by_hand(text, shape), shape))
    for rows in (slice(None), slice(0, 1), slice(2, 6), slice(-3, None), slice(0, 9, 4), slice(4, 4), slice(0, 99)):
        assert artifact.decode("embed", rows).equal(whole[rows])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rows(1:int6:g4:asym,4:lut2:row,10:bf16)", ["tersor.json", "'embed'", "10 rows", "has 9"]),
        ("rows(2:int6:g4:asym,4:lut2:row,9:bf16)", ["model.safetensors", "embed.s0_", "[2, ", "[1, "]),
        ("rows(1:int6:g4:asym,9:bf16)", ["model.safetensors", "embed.s1_", "no such tensor"]),
        ("rows(4:lut2:row,1:bf16)", ["config.json", "'embed'", "ascend"]),
        ("rows(4:lut2:row", ["config.json", "'embed'", "cannot be read"]),
    ],
)
def test_stretches_that_do_not_fit_the_file(tmp_path: Path, maker: ModuleType, text: str, words: list[str]) -> None:
    good = "rows(1:int6:g4:asym,4:lut2:row,9:bf16)"
    maker.build(tmp_path / "a", {"embed": (good, (9, 8))}, maker.small_kept())
    maker.edit_json(tmp_path / "a" / "config.json", lambda c: c["quantization_config"]["layers"].update(embed=text))
    with pytest.raises(CorruptArtifact) as error:
        open_artifact(tmp_path / "a")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_sharded(tmp_path: Path, maker: ModuleType) -> None:
    maker.build(tmp_path / "one", maker.small_layers(), maker.small_kept())
    maker.build(tmp_path / "many", maker.small_layers(), maker.small_kept(), max_shard_size=30)
    one, many = open_artifact(tmp_path / "one"), open_artifact(tmp_path / "many")
    assert len(many.files) > 2
    for name in one.layers:
        assert one.decode(name).equal(many.decode(name))
    listed = [path for path in (tmp_path / "many").iterdir() if path.name.startswith("model")]
    assert many.weight_bytes == sum(path.stat().st_size for path in listed)


def test_nothing_is_changed_by_reading_and_writing_to_what_was_read(small: Path) -> None:
    before = hash_files(small)
    artifact = open_artifact(small)
    artifact.tensors("embed")["codes"].fill_(0)  # a private copy of the page, not the file
    assert hash_files(small) == before


def test_unknown_names(small: Path) -> None:
    artifact = open_artifact(small)
    with pytest.raises(BadInput, match="no encoded layer is called 'x'"):
        artifact.decode("x")
    with pytest.raises(BadInput, match=r"no kept tensor is called 'embed\.codes'"):
        artifact.kept("embed.codes")
    with pytest.raises(BadInput, match=r"config\.json is missing"):
        open_artifact(small / "nowhere")


def test_codecs_come_from_the_parser_given(small: Path) -> None:
    asked = []

    def other(text: str) -> Codec:
        asked.append(text)
        return parse(text)

    open_artifact(small, parse=other)
    assert asked == ["int4:g4:asym", "fp4:e2m1:g4", "fp16"]


def test_verify_reports_progress_and_missing_files(small: Path) -> None:
    seen: list[tuple[int, int]] = []
    artifact = open_artifact(small)
    artifact.verify_hashes(lambda done, total: seen.append((done, total)))
    total = sum(path.stat().st_size for path in small.iterdir() if path.name != "tersor.json")
    assert seen[-1] == (total, total)
    (small / "calibration.safetensors").unlink()
    with pytest.raises(CorruptArtifact, match=r"calibration\.safetensors: expected this file"):
        artifact.verify_hashes()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "calibration.safetensors"])
def test_any_changed_byte_is_found_and_the_file_named(small: Path, name: str) -> None:
    path = small / name
    raw = path.read_bytes()
    choice = random.Random(0)
    positions = range(len(raw)) if len(raw) < 300 else sorted(choice.sample(range(len(raw)), 150))
    for position in positions:
        changed = bytearray(raw)
        changed[position] ^= 1 << choice.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(TersorError) as caught:
            open_artifact(small).verify_hashes()
        assert "\n" not in str(caught.value)
        if name != "config.json":  # whose damage may first show as disagreement with another file
            assert name in str(caught.value)
    path.write_bytes(raw)
    open_artifact(small).verify_hashes()


def test_a_changed_manifest_gives_a_sentence_or_loads(small: Path) -> None:
    path = small / "tersor.json"
    raw = path.read_bytes()
    choice = random.Random(1)
    said = []
    for _ in range(300):
        changed = bytearray(raw)
        changed[choice.randrange(len(raw))] = choice.randrange(256)
        path.write_bytes(changed)
        try:
            open_artifact(small).verify_hashes()
        except TersorError as error:
            said.append(str(error))
    assert len(said) > 100
    assert not any("\n" in sentence for sentence in said)


def test_a_file_cut_anywhere_is_refused(small: Path) -> None:
    path = small / "model.safetensors"
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
            open_artifact(small)


def test_two_files_with_the_same_tensor(tmp_path: Path, maker: ModuleType) -> None:
    folder = tmp_path / "many"
    maker.build(folder, maker.small_layers(), maker.small_kept(), max_shard_size=30)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    (folder / second).write_bytes((folder / first).read_bytes())
    maker.edit_json(folder / "tersor.json", lambda m: m["files"][second].update(bytes=(folder / second).stat().st_size))
    with pytest.raises(CorruptArtifact, match="expected it once"):
        open_artifact(folder)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model-00009-of-00009.safetensors", "found none"),
        ("../model.safetensors", "found none"),
        (None, r"index\.json: tensor 'embed\.scale': expected file model-0000"),
    ],
)
def test_wrong_index(tmp_path: Path, maker: ModuleType, file: str | None, words: str) -> None:
    folder = tmp_path / "many"
    maker.build(folder, maker.small_layers(), maker.small_kept(), max_shard_size=60)

    def change(index: dict[str, dict[str, str]]) -> None:
        weight_map = index["weight_map"]
        others = [name for name in sorted(set(weight_map.values())) if name != weight_map["embed.scale"]]
        weight_map["embed.scale"] = file or others[0]

    maker.edit_json(folder / "model.safetensors.index.json", change)
    with pytest.raises(CorruptArtifact, match=words):
        open_artifact(folder)


def test_a_weight_file_that_the_manifest_does_not_list(tmp_path: Path, maker: ModuleType) -> None:
    folder = tmp_path / "many"
    maker.build(folder, maker.small_layers(), maker.small_kept(), max_shard_size=30)
    (folder / "model.safetensors").write_bytes(b"planted")  # transformers would prefer it to the shards
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors: expected in the list of files"):
        open_artifact(folder)
