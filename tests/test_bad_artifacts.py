"""What damaged artifacts and folders that are none get: one clear sentence, from every command that opens them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

import command_line
import tiny_runs

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(small: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    outcome = command_line.run(
        "compress",
        small,
        "-o",
        folder / "artifact",
        "--size",
        "25%",
        "--text",
        words,
        *tiny_runs.OPTIONS,
        cache=folder / "cache",
    )
    assert outcome.code == 0, outcome.err
    return folder / "artifact"


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def change_a_codec(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"][QUERY] = "int2:g32"
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (truncate, r"model\.safetensors: expected \d+ bytes as in tersor\.json, found \d+; the file is truncated"),
        (flip_a_bit, r"model\.safetensors: expected SHA-256 \w+ as in tersor\.json, found \w+; the file was changed"),
        (change_a_codec, rf"'{QUERY}\."),
        (lambda folder: (folder / "model.safetensors").unlink(), r"expected model\.safetensors .* found neither"),
        (lambda folder: (folder / "tersor.json").unlink(), r"tersor\.json is missing"),
        (lambda folder: (folder / "tersor.json").write_text("{"), r"tersor\.json: expected JSON"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), r"tokenizer\.json: expected \d+ bytes"),
    ],
)
def test_damaged_artifacts(
    made: Path, words: Path, tmp_path: Path, damage: Callable[[Path], object], fragment: str
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "artifact"))
    damage(folder)
    for arguments in (
        ("eval", folder, "--text", words, "--length", 32),
        ("run", folder, "hello", "--tokens", 2),
        ("inspect", folder),
    ):
        assert re.search(fragment, command_line.run(*arguments, cache=tmp_path).sentence)


def test_an_artifact_against_another_model(made: Path, small: Path, words: Path, tmp_path: Path) -> None:
    """One weight in the middle of the file makes another model."""
    model = Path(shutil.copytree(small, tmp_path / "model"))
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    safetensors.torch.save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    outcome = command_line.run("eval", made, "--against", model, "--text", words, "--length", 32, cache=tmp_path)
    assert f"{model} is not the model that {made} was made from" in outcome.sentence


def test_what_is_no_artifact(made: Path, small: Path, words: Path, tmp_path: Path) -> None:
    assert "is not a tersor artifact" in command_line.run("run", small, "hello", cache=tmp_path).sentence
    assert "is not a tersor artifact" in command_line.run("run", tmp_path / "nix", "hello", cache=tmp_path).sentence
    outcome = command_line.run("eval", small, "--text", words, "--length", 32, cache=tmp_path)
    assert outcome.sentence.endswith("say what to compare it with: --against MODEL.")
    assert "does not exist" in command_line.run("eval", tmp_path / "nix", cache=tmp_path).sentence
    outcome = command_line.run("compress", made, "-o", tmp_path / "out", "--size", "25%", cache=tmp_path)
    assert "quantized with tersor (it was written by tersor already)" in outcome.sentence


def test_prompts_that_cannot_be_continued(made: Path, tmp_path: Path) -> None:
    def sentence(*arguments: object) -> str:
        return command_line.run("run", made, *arguments, cache=tmp_path).sentence

    assert sentence("") == "The prompt is empty; give some text to continue."
    assert "--tokens 0" in sentence("hello", "--tokens", 0)
    assert "--temperature -1" in sentence("hello", "--temperature", "-1")
    assert "5 tokens and --tokens 60 are more than the 64 that the model takes" in sentence("hello", "--tokens", 60)
