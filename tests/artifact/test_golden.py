"""The files in tests/golden: good ones decode to the recorded bytes, broken ones fail with the named error."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tersor import errors
from tersor.artifact import hash_files, open_artifact
from tersor.artifact.decoder_numpy import DecodeError, Folder

GOLDEN = Path(__file__).parents[1] / "golden"
ARTIFACTS = GOLDEN / "artifact"


def _names(table: str) -> list[str]:
    spec = importlib.util.spec_from_file_location("golden_names", GOLDEN / "make_artifacts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(getattr(module, table))


@pytest.mark.usefixtures("no_sync")
def test_making_them_again_gives_the_same_bytes(tmp_path: Path, maker: ModuleType) -> None:
    maker.make_all(tmp_path / "again")
    assert hash_files(tmp_path / "again", exclude=()) == hash_files(ARTIFACTS, exclude=())


@pytest.mark.parametrize("name", _names("GOOD"))
def test_good_ones_decode_to_the_recorded_weights(name: str) -> None:
    recorded = json.loads((ARTIFACTS / "decoded.json").read_text())[name]
    artifact = open_artifact(ARTIFACTS / name)
    artifact.verify_hashes()
    plain = Folder(ARTIFACTS / name)
    assert set(recorded) == set(artifact.layers) == set(plain.layers)
    for layer, expected in recorded.items():
        by_numpy = plain.decode(layer)
        assert hashlib.sha256(by_numpy.tobytes()).hexdigest() == expected, layer
        assert artifact.decode(layer).numpy().tobytes() == by_numpy.tobytes(), layer
    for kept in artifact.manifest.kept:
        value = artifact.kept(kept)
        widened = value.float() if value.dtype == torch.bfloat16 else value
        np.testing.assert_array_equal(widened.numpy(), plain.kept(kept))


@pytest.mark.parametrize("name", _names("BROKEN"))
def test_broken_ones_fail_with_the_named_error(name: str, maker: ModuleType) -> None:
    kind, words, _ = maker.BROKEN[name]
    with pytest.raises(getattr(errors, kind)) as caught:
        open_artifact(ARTIFACTS / name)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", _names("BROKEN"))
def test_the_numpy_decoder_never_crashes_on_broken_ones(name: str) -> None:
    message = ""
    try:
        folder = Folder(ARTIFACTS / name)
        for layer in folder.layers:
            folder.decode(layer)
    except DecodeError as error:
        message = str(error)
    assert "\n" not in message


def test_hidden_damage_is_found_by_looking(maker: ModuleType) -> None:
    _, words, _ = maker.HIDDEN["hidden-changed-byte"]
    artifact = open_artifact(ARTIFACTS / "hidden-changed-byte")
    with pytest.raises(errors.CorruptArtifact) as corrupt:
        artifact.verify_hashes()
    assert all(word in str(corrupt.value) for word in words)
    _, words, _ = maker.HIDDEN["hidden-reserved-code"]
    with pytest.raises(DecodeError) as refused:
        Folder(ARTIFACTS / "hidden-reserved-code").decode("head")
    assert all(word in str(refused.value) for word in words)
