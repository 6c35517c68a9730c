"""tersor.json: round trip, refusals that name the field, hashes of files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tersor.artifact import (
    FileRecord,
    Manifest,
    SourceRecord,
    TextRecord,
    hash_files,
    ids_sha256,
    read_manifest,
    write_calibration,
    write_manifest,
)
from tersor.contracts import Choice, Plan, Quality
from tersor.errors import BadInput, CorruptArtifact, NotFinite

MANIFEST = Manifest(
    versions={"tersor": "0.1.0", "torch": "2.6", "transformers": "5.10"},
    source=SourceRecord("some/model", "abc"),
    plan=Plan({"a": Choice("int4:g64", 100, 0.5)}, 200, 199, 0.5, {"seed": 1}),
    shapes={"a": (4, 64)},
    kept={"norm.weight": (torch.bfloat16, (64,)), "steps": (torch.int64, ())},
    text=TextRecord("text.txt", 1000, 7, "0" * 64),
    quality=Quality(0.01, 0.001, 12.0, 11.5, 0.9, 4096, "held out"),
    errors={"a": 0.05},
    notes=("little text",),
    files={"model.safetensors": FileRecord(10, "f" * 64), "sub/x.json": FileRecord(0, "e" * 64)},
    facts={"seconds": 3, "devices": ["cpu"]},
)


def test_round_trip() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    bare = dataclasses.replace(MANIFEST, text=None, quality=None, errors={}, notes=(), files={}, facts={})
    assert Manifest.from_json(bare.to_json()) == bare


def test_unknown_fields_are_ignored_so_that_new_ones_can_come() -> None:
    data = {**json.loads(MANIFEST.to_json()), "brand_new": 1}
    assert Manifest.from_json(json.dumps(data).encode()) == MANIFEST


def test_unknown_measurements_are_null_and_infinite_ones_refused() -> None:
    assert MANIFEST.quality is not None
    unknown = dataclasses.replace(MANIFEST, quality=dataclasses.replace(MANIFEST.quality, kl=math.nan))
    raw = unknown.to_json()
    assert json.loads(raw)["quality"]["kl"] is None
    quality = Manifest.from_json(raw).quality
    assert quality is not None
    assert math.isnan(quality.kl)
    with pytest.raises(NotFinite, match="error of a is inf"):
        dataclasses.replace(MANIFEST, errors={"a": math.inf}).to_json()


def change(path: str, value: Any) -> bytes:
    data = json.loads(MANIFEST.to_json())
    *parents, last = path.split("/")
    place = data
    for key in parents:
        place = place[key]
    place[last] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("format", None, "expected format 1"),
        ("format", "1", "expected format 1"),
        ("versions", {"torch": 2}, "'versions' to be an object of texts"),
        ("source", 3, "'source' to be an object"),
        ("source/origin", None, "source: expected 'origin' to be a text"),
        ("plan", None, "plan: expected a plan"),
        ("plan/layers", {"a": 3}, "plan: layer 'a' needs a codec"),
        ("shapes", {"a": [4]}, "'shapes.a' to be"),
        ("shapes", {"a": [4, 0]}, "'shapes.a' to be"),
        ("shapes", {"a": [4, True]}, "'shapes.a' to be"),
        ("kept", {"n": {"dtype": "X", "shape": []}}, "'kept.n' to be a dtype and a shape"),
        ("kept", {"n": {"dtype": [], "shape": []}}, "'kept.n' to be a dtype and a shape"),
        ("kept", {"n": 1}, "'kept.n' to be a dtype and a shape"),
        ("text/tokens", -1, "text: expected 'tokens' to be a whole number"),
        ("text/seed", True, "text: expected 'seed' to be a whole number"),
        ("quality/kl", "low", "quality: expected 'kl' to be a finite number"),
        ("errors", {"a": "x"}, "'errors.a' to be a finite number"),
        ("notes", "n", "'notes' to be a list"),
        ("files", {"/etc/x": {"bytes": 1, "sha256": ""}}, "inside the artifact"),
        ("files", {"a/../../x": {"bytes": 1, "sha256": ""}}, "inside the artifact"),
        ("files", {"C:\\x": {"bytes": 1, "sha256": ""}}, "inside the artifact"),
        ("files", {"x": {"bytes": "1", "sha256": ""}}, "files.x: expected 'bytes' to be a whole number"),
        ("files", {"x": 1}, "files.x: expected 'bytes' to be a whole number"),
        ("facts", [], "'facts' to be an object"),
    ],
)
def test_each_wrong_field_is_named(path: str, value: Any, words: str) -> None:
    with pytest.raises(CorruptArtifact) as caught:
        Manifest.from_json(change(path, value))
    assert words in str(caught.value)
    assert str(caught.value).startswith("tersor.json")
    assert "\n" not in str(caught.value)


def test_a_newer_format_asks_for_an_upgrade() -> None:
    with pytest.raises(BadInput, match="format 9 is newer than the 1 this tersor reads; upgrade"):
        Manifest.from_json(change("format", 9))


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b'{"a": 1, "a": 2}', b"[" * 100_000])
def test_not_json(raw: bytes) -> None:
    with pytest.raises(CorruptArtifact, match=r"tersor\.json"):
        Manifest.from_json(raw)


def test_files_and_hashes(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.bin").write_bytes(b"22")
    (tmp_path / "one.bin").write_bytes(b"1" * 5_000_000)
    (tmp_path / ".state").mkdir()
    (tmp_path / ".state" / "journal.jsonl").write_bytes(b"no part of the artifact")
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    seen: list[tuple[int, int]] = []
    files = hash_files(tmp_path, lambda done, total: seen.append((done, total)))
    assert list(files) == ["b/two.bin", "one.bin"]
    assert files["b/two.bin"] == FileRecord(2, hashlib.sha256(b"22").hexdigest())
    assert files["one.bin"] == FileRecord(5_000_000, hashlib.sha256(b"1" * 5_000_000).hexdigest())
    assert seen[-1] == (5_000_002, 5_000_002)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_calibration_ids(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3], [70000, 5, 6]])
    digest = write_calibration(tmp_path, ids)
    stored = safetensors.torch.load_file(tmp_path / "calibration.safetensors")
    assert list(stored) == ["ids"]
    assert stored["ids"].dtype == torch.int32
    assert stored["ids"].equal(ids.int())
    assert digest == ids_sha256(ids) == hashlib.sha256(ids.int().numpy().tobytes()).hexdigest()
