"""The five commands on a tiny model: what they print, as tables and as JSON, and that they agree with each other."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import command_line
import tiny_gguf
import tiny_runs
from command_line import Outcome
from tersor.artifact import open_artifact
from tersor.version import __version__

VERBS = ("plan", "compress", "eval", "inspect", "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this file's artifacts and plans are made."""
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def tersor(folder: Path) -> Callable[..., Outcome]:
    """A command that must go well and be silent on standard error, which is no terminal."""

    def run(*arguments: object) -> Outcome:
        outcome = command_line.run(*arguments, cache=folder / "cache")
        assert outcome.code == 0, outcome.err
        assert outcome.err == ""
        return outcome

    return run


@pytest.fixture(scope="module")
def options(words: Path) -> tuple[object, ...]:
    return ("--size", "25%", "--text", words, *tiny_runs.OPTIONS)


@pytest.fixture(scope="module")
def plan_options(words: Path) -> tuple[object, ...]:
    """The same for `plan`, which takes no samples of text."""
    return ("--size", "25%", "--text", words, "--sequences", 4, "--length", 32, "--eval-sequences", 2, "--workers", 1)


@pytest.fixture(scope="module")
def planned(
    tersor: Callable[..., Outcome], small: Path, folder: Path, plan_options: tuple[object, ...]
) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(tersor("plan", small, *plan_options, "-o", folder / "plan.json", "--json").out)
    return data


@pytest.fixture(scope="module")
def made(tersor: Callable[..., Outcome], small: Path, folder: Path, options: tuple[object, ...]) -> dict[str, Any]:
    """What `compress --json` says of the artifact ``folder / "out"``."""
    data: dict[str, Any] = json.loads(tersor("compress", small, "-o", folder / "out", *options, "--json").out)
    return data


def digest(artifact: Path) -> str:
    return hashlib.sha256((artifact / "model.safetensors").read_bytes()).hexdigest()


def test_a_whole_run_without_a_terminal_prints_one_object_and_nothing_else(small: Path, tmp_path: Path) -> None:
    """Text sampled from the model itself, samples before and after, in a process of its own."""
    asked = ("--size", "30%", "--sequences", 3, "--length", 24, "--eval-sequences", 2, "--samples", 1, "--json")
    outcome = command_line.launch("compress", small, "-o", tmp_path / "out", *asked, cache=tmp_path / "cache")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    data = json.loads(outcome.out)
    assert data["file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size <= data["budget"]
    assert data["quality"]["text"] == "text sampled from the model itself"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


def test_help_and_version(tersor: Callable[..., Outcome]) -> None:
    assert tersor("--version").out == f"tersor {__version__}\n"
    assert all(re.search(rf"\b{verb}\b", tersor("--help").out) for verb in VERBS)
    for verb in VERBS:
        assert "Usage:" in tersor(verb, "--help").out


def test_the_plan_says_exactly_what_compress_then_writes(
    planned: dict[str, Any], made: dict[str, Any], folder: Path
) -> None:
    assert planned["file_bytes"] == made["file_bytes"] == (folder / "out" / "model.safetensors").stat().st_size
    assert planned["file_bytes"] <= planned["budget"] == made["budget"]
    assert planned["predicted_kl"] == made["predicted_kl"] > 0
    codecs = {name: str(codec) for name, codec in open_artifact(folder / "out").layers.items()}
    assert {name: layer["codec"] for name, layer in planned["layers"].items()} == codecs
    assert {fate["fate"] for fate in planned["tensors"]} == {"encoded", "kept"}
    assert len(planned["tensors"]) == 21
    assert min(planned[cost] for cost in ("peak_memory", "disk", "seconds")) > 0


def test_a_plan_written_and_followed_gives_the_same_bytes(
    tersor: Callable[..., Outcome], small: Path, folder: Path, options: tuple[object, ...],
    planned: dict[str, Any], made: dict[str, Any],
) -> None:  # fmt: skip
    written = json.loads((folder / "plan.json").read_text())
    assert written["file_bytes"] == planned["file_bytes"]
    followed = ("--plan", folder / "plan.json", *options[2:])
    data = json.loads(tersor("compress", small, "-o", folder / "followed", *followed, "--json").out)
    assert digest(folder / "followed") == digest(folder / "out")
    assert data["predicted_kl"] == planned["predicted_kl"]


def test_an_edited_plan_is_followed_and_sized_anew(
    tersor: Callable[..., Outcome], small: Path, folder: Path, options: tuple[object, ...], planned: dict[str, Any]
) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan["layers"]["lm_head"] = "int2:g32"
    (folder / "edited.json").write_text(json.dumps(plan))
    followed = ("--plan", folder / "edited.json", *options[2:])
    outcome = tersor("compress", small, "-o", folder / "edited", *followed)
    size = (folder / "edited" / "model.safetensors").stat().st_size
    assert f"{size:,} bytes of {planned['budget']:,}" in outcome.out
    assert size < planned["file_bytes"]
    assert "unknown: the plan was edited" in outcome.out
    assert str(open_artifact(folder / "edited").layers["lm_head"]) == "int2:g32"
    kept = json.loads((folder / "edited" / "plan.json").read_text())
    assert kept["file_bytes"] == size
    assert kept["predicted"] is kept["layers"]["lm_head"]["distortion"] is None


def test_the_table_of_a_plan(tersor: Callable[..., Outcome], small: Path, plan_options: tuple[object, ...]) -> None:
    table = tersor("plan", small, *plan_options).out
    assert "q_proj" in table
    assert "74,560 bytes" in table
    assert "16 encoded, 5 kept" in table
    assert re.search(r"predicted KL.*nats/token", table)
    assert re.search(r"peak memory.*above the interpreter's own", table)


def test_a_fast_plan_needs_no_text(tersor: Callable[..., Outcome], small: Path) -> None:
    data = json.loads(tersor("plan", small, "--fast", "--bpw", 5, "--json").out)
    assert data["file_bytes"] <= data["budget"]
    assert data["predicted_kl"] is None
    assert "not measured (--fast)" in tersor("plan", small, "--fast", "--bpw", 5).out


def test_a_finished_artifact(made: dict[str, Any], folder: Path) -> None:
    assert made["folder"] == str(folder / "out")
    assert made["bits_per_weight"] == pytest.approx(8 * made["file_bytes"] / 74_560)
    assert 0 <= made["quality"]["kl"] < 0.1
    assert made["quality"]["tokens"] == 2 * 31
    assert set(made["stages"]) == {"open", "text", "statistics", "plan", "encode", "verify", "samples"}
    assert Path(made["report"]).read_text().startswith("<!doctype html>")
    artifact = open_artifact(folder / "out")
    artifact.verify_hashes()
    assert artifact.manifest.quality is not None
    assert artifact.manifest.quality.kl == made["quality"]["kl"]
    assert not (folder / "out.partial").exists()


def test_the_table_of_a_finished_artifact(
    tersor: Callable[..., Outcome], small: Path, folder: Path, options: tuple[object, ...], made: dict[str, Any]
) -> None:
    table = tersor("compress", small, "-o", folder / "out", *options, "--overwrite").out
    assert f"{made['file_bytes']:,} bytes of 74,560 (99." in table
    for row in ("bits per weight", "KL", "perplexity", "top-1 agreement", "time", "peak memory", "artifact", "report"):
        assert row in table
    assert str(folder / "out" / "report.html") in table


def test_eval_agrees_with_itself_and_with_what_is_equal(
    tersor: Callable[..., Outcome], small: Path, folder: Path, words: Path, made: dict[str, Any]
) -> None:
    asked = ("--text", words, "--sequences", 4, "--length", 32, "--json")
    by_manifest = json.loads(tersor("eval", folder / "out", *asked).out)
    assert set(by_manifest) == {"kl", "kl_error", "perplexity", "reference_perplexity", "top1", "tokens", "text"}
    assert 0 < by_manifest["kl"] < 0.1
    assert json.loads(tersor("eval", folder / "out", "--against", small, *asked).out) == by_manifest
    same = json.loads(tersor("eval", small, "--against", small, *asked).out)
    assert same["kl"] == pytest.approx(0, abs=1e-9)
    assert same["top1"] == 1
    assert same["perplexity"] == same["reference_perplexity"] == by_manifest["reference_perplexity"]
    assert re.search(r"KL .*nats/token", tersor("eval", folder / "out", *asked[:-1]).out)


def test_inspect_a_model(tersor: Callable[..., Outcome], small: Path) -> None:
    data = json.loads(tersor("inspect", small, "--json").out)
    assert data["parameters"] == 74_560
    assert len(data["layers"]) == 16
    for errors in data["errors"].values():
        # Errors relative to the weight's norm: about 2^-bits, and smaller with every bit.
        assert 0.2 < errors["int2:row"] < 0.5
        assert math.isclose(errors["int4:row"], errors["int3:row"] / 2, rel_tol=0.3)
        assert errors["int8:row"] < 0.01
    table = tersor("inspect", small).out
    assert "model.layers.1.self_attn.q_proj" in table
    assert "16 encoded, 5 kept" in table


def test_inspect_an_artifact(tersor: Callable[..., Outcome], folder: Path, made: dict[str, Any]) -> None:
    data = json.loads(tersor("inspect", folder / "out", "--json").out)
    assert data["weight_bytes"] == made["file_bytes"]
    assert data["quality"] == made["quality"]
    assert set(data["layers"]) == set(data["errors"]) == set(data["shapes"])
    table = tersor("inspect", folder / "out").out
    for name, codec in data["layers"].items():
        assert re.search(rf"{re.escape(name)} .*{re.escape(codec)}", table), name


def test_run_continues_a_prompt(tersor: Callable[..., Outcome], folder: Path, made: dict[str, Any]) -> None:
    asked = ("run", folder / "out", "hello", "--tokens", 8)
    data = json.loads(tersor(*asked, "--json").out)
    assert data["prompt"] == "hello"
    said = command_line.run(*asked, cache=folder / "cache")
    assert said.text == data["text"] + "\n"
    assert "written" in said.err
    drawn = [json.loads(tersor(*asked, "--json", "--temperature", 2, "--seed", s).out)["text"] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_gguf_file_is_read_without_a_word(tersor: Callable[..., Outcome], folder: Path, words: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    model = tiny_gguf.write(folder / "model.gguf")
    asked = ("--size", "40%", "--text", words, *tiny_runs.OPTIONS, "--json")
    data = json.loads(tersor("compress", model, "-o", folder / "from-gguf", *asked).out)
    assert data["file_bytes"] == (folder / "from-gguf" / "model.safetensors").stat().st_size <= data["budget"]
    assert not [note for note in data["notes"] if note.startswith("the source is")]  # float32 has lost nothing


def test_options_reach_the_run_and_are_recorded(
    tersor: Callable[..., Outcome], small: Path, folder: Path, words: Path
) -> None:
    asked = (
        "--bpw", 6, "--text", words, "--eval-text", words, "--sequences", 3, "--length", 24, "--eval-sequences", 2,
        "--samples", 0, "--seed", 7, "--candidates", "int4:row, bf16", "--solver", "feedback", "--sensitivity", "flat",
        "--allocator", "lagrangian", "--no-propagate", "--share-fused", "--dtype", "float32", "--workers", 2,
    )  # fmt: skip
    tersor("compress", small, "-o", folder / "options", *asked)
    artifact = open_artifact(folder / "options")
    assert artifact.manifest.facts["options"] == {
        "budget": {"kind": "bpw", "amount": 6.0, "relative": False},
        "text": str(words), "text_field": None, "text_split": "train", "eval_text": str(words), "eval_sequences": 2,
        "sequences": 3, "length": 24, "samples": 0, "seed": 7, "candidates": ["int4:row", "bf16"],
        "solver": "feedback", "sensitivity": "flat", "allocator": "lagrangian", "propagate": False,
        "share_fused": True, "dtype": "float32", "effort": "normal", "tune": None,
        "engine": "transformers", "tensor_parallel": 1, "onnx_accuracy_level": None, "like": None,
            "token_time": None,
    }  # fmt: skip
    assert {str(codec) for codec in artifact.layers.values()} == {"int4:row", "bf16"}
