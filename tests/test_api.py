"""The five verbs from Python: the same results as on the command line, and errors that name the option."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import command_line
import tersor
import tiny_runs
from tersor.artifact import plan_to_json
from tersor.errors import BadInput
from tersor.stages.options import Options

ASKED: dict[str, Any] = {"sequences": 4, "length": 32, "eval_sequences": 2, "workers": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def command(folder: Path) -> Callable[..., Any]:
    """The JSON that a command prints."""

    def run(*arguments: object) -> Any:
        return json.loads(command_line.run(*arguments, "--json", cache=folder / "cache").text)

    return run


@pytest.fixture(scope="module")
def result(small: Path, words: Path, folder: Path) -> Any:
    return tersor.compress(
        small, folder / "out", size="25%", text=words, samples=0, cache_dir=folder / "cache" / "tersor", **ASKED
    )


def test_compress(result: Any, small: Path, words: Path, folder: Path, command: Callable[..., Any]) -> None:
    said = command("compress", small, "-o", folder / "again", "--size", "25%", "--text", words, *tiny_runs.OPTIONS)
    assert (folder / "again" / "model.safetensors").read_bytes() == (folder / "out" / "model.safetensors").read_bytes()
    assert said["quality"]["kl"] == result.quality.kl
    assert said["file_bytes"] == result.plan.file_bytes
    assert said["bits_per_weight"] == result.bits_per_weight
    assert result.folder == folder / "out"
    assert result.sample is None
    assert not result.resumed


def test_plan_and_follow_it(result: Any, small: Path, words: Path, folder: Path) -> None:
    planned = tersor.plan(small, size=74_560, text=words, cache_dir=folder / "cache", **ASKED)
    assert planned.plan.layers == result.plan.layers
    assert planned.plan.file_bytes == result.plan.file_bytes
    followed = tersor.compress(
        small, folder / "followed", plan=planned.plan, text=str(words), samples=0, cache_dir=folder / "cache", **ASKED
    )
    assert followed.quality == result.quality
    (folder / "plan.json").write_text(plan_to_json(planned.plan))
    with pytest.raises(BadInput, match="more than the budget of 70,000"):
        tersor.compress(small, folder / "no", plan=folder / "plan.json", size=70_000, cache_dir=folder / "cache")


def test_evaluate(result: Any, words: Path, folder: Path, command: Callable[..., Any]) -> None:
    quality = tersor.evaluate(result.folder, text=words, sequences=4, length=32, cache_dir=folder / "cache")
    said = command("eval", result.folder, "--text", words, "--sequences", 4, "--length", 32, "--seed", 0)
    assert said["kl"] == quality.kl
    assert said["tokens"] == quality.tokens == 4 * 31


def test_inspect(result: Any, small: Path, command: Callable[..., Any]) -> None:
    found = tersor.inspect(small)
    assert found.anatomy is not None
    assert found.artifact is None
    assert command("inspect", small)["errors"] == found.errors
    opened = tersor.inspect(result.folder)
    assert opened.anatomy is None
    assert opened.artifact is not None
    assert opened.artifact.weight_bytes == result.plan.file_bytes


def test_generate(result: Any, folder: Path, command: Callable[..., Any]) -> None:
    pieces: list[str] = []
    text = tersor.generate(result.folder, "hello", tokens=8, on_text=pieces.append)
    assert command("run", folder / "out", "hello", "--tokens", 8)["text"] == text
    assert "".join(pieces) == text + "\n"


def test_a_model_object(result: Any, small: Path, words: Path, folder: Path) -> None:
    """The same weights from memory, tokenizer found where they were loaded from, give the same artifact."""
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = tersor.compress(
        model, folder / "object", size="25%", text=words, samples=0, cache_dir=folder / "cache", **ASKED
    )
    assert made.plan.layers == result.plan.layers
    assert (folder / "object" / "model.safetensors").read_bytes() == (folder / "out" / "model.safetensors").read_bytes()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_callers_state_is_left_alone(small: Path, words: Path, folder: Path) -> None:
    threads, drawn = torch.get_num_threads(), torch.get_rng_state()
    tersor.plan(small, bpw=6, cache_dir=folder / "cache", **ASKED)  # samples text from the model
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("verb", ["plan", "compress", "evaluate", "inspect"])
def test_an_unknown_option_is_named_with_all_there_are(verb: str, small: Path, tmp_path: Path) -> None:
    place = {"compress": {"output": tmp_path / "out"}}.get(verb, {})
    budget = {"size": "25%"} if verb in ("plan", "compress") else {}
    with pytest.raises(BadInput, match=r"Unknown option 'wokers'; options are text, ") as caught:
        getattr(tersor, verb)(small, **place, **budget, wokers=2)
    for name in Options.__dataclass_fields__:
        assert name == "budget" or name in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting",
    [
        {"solver": "magic"}, {"dtype": torch.float32}, {"sequences": 4.5}, {"workers": True}, {"samples": -1},
        {"candidates": []}, {"max_memory": 0}, {"seed": 2**32},
    ],
)  # fmt: skip
def test_settings_are_checked_before_any_work(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"--{next(iter(setting)).replace('_', '-')} "):
        tersor.compress("/nowhere", tmp_path / "out", size="25%", **setting)
