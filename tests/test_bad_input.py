"""What bad input gets: one clear sentence on standard error, exit code 2, and nothing half-written left behind.

Each case is run as a user would run it. Models, budgets, options, texts and plans here; artifacts in
``test_bad_artifacts.py``; full disks and interrupted runs in ``test_hard_limits.py``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import command_line
import tiny_runs
from command_line import Outcome
from tersor import api
from tersor.artifact import open_artifact
from tersor.errors import Infeasible


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return Path(shutil.copytree(small, tmp_path / "model"))


@pytest.fixture
def refused(model: Path, words: Path, tmp_path: Path) -> Callable[..., str]:
    """Compress, be refused, find nothing left behind; the sentence. Later options win over those that come first."""

    def run(*arguments: object, source: object = model, budget: tuple[str, ...] = ("--size", "25%")) -> str:
        before = sorted(tmp_path.rglob("*"))
        out = tmp_path / "out"
        given = ("-o", out, *budget, "--text", words, *tiny_runs.OPTIONS, *arguments)
        outcome = command_line.run("compress", source, *given, cache=tmp_path.parent / "cache")
        sentence = outcome.sentence
        assert sorted(tmp_path.rglob("*")) == before
        return sentence

    return run


@pytest.fixture
def compress(model: Path, words: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Compress the model folder into ``out``; it must go well."""

    def run(*arguments: object, budget: tuple[str, ...] = ("--size", "25%")) -> Outcome:
        given = ("-o", tmp_path / "out", *budget, "--text", words, *tiny_runs.OPTIONS, *arguments)
        outcome = command_line.run("compress", model, *given, cache=tmp_path.parent / "cache")
        assert outcome.code == 0, outcome.err
        return outcome

    return run


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(model: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = model / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def set_values(name: str, value: float, where: Any = (3, 4)) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][where] = value

    return change


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/model", "not a hub id!", "./missing"])
def test_a_model_that_is_not_there(refused: Callable[..., str], name: str) -> None:
    sentence = refused(source=name)
    assert f"There is no file or folder {Path(name)}" in sentence
    assert "expected a model folder, a .gguf file or a hub id" in sentence


def test_a_folder_without_configuration(refused: Callable[..., str], model: Path) -> None:
    (model / "config.json").unlink()
    assert refused() == f"{model} has no config.json; give a transformers model folder."


def test_an_unknown_model_type(refused: Callable[..., str], model: Path) -> None:
    edit_config(model, model_type="quux")
    sentence = refused()
    assert "'quux'" in sentence
    assert sentence.endswith("upgrade transformers.")


def test_a_model_that_is_no_decoder(refused: Callable[..., str], model: Path) -> None:
    edit_config(model, model_type="t5")
    assert "'t5'" in refused()


def test_pickled_weights(refused: Callable[..., str], model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    sentence = refused()
    assert "pytorch_model.bin, a pickle, which can run code when opened and is refused" in sentence
    assert "save_pretrained" in sentence


def test_a_truncated_shard(refused: Callable[..., str], complete: Callable[..., Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(complete("llama-tied", shard="20KB"), tmp_path / "sharded"))
    shard = sorted(model.glob("model-*.safetensors"))[1]
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    sentence = refused(source=model)
    assert str(shard) in sentence
    assert f"{size} bytes, it has {size - 100}; copy or download it again" in sentence
    shard.unlink()
    assert shard.name in refused(source=model)


def test_code_that_comes_with_a_model_is_not_run(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    edit_config(model, model_type="quux", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "pass --trust-remote-code if you trust it" in refused()
    assert not (tmp_path / "ran").exists()


def test_a_model_without_tokenizer(refused: Callable[..., str], model: Path) -> None:
    for file in model.glob("token*"):
        file.unlink()
    assert f"No tokenizer could be loaded from {model}" in refused()


# The budget -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "fragment"),
    [
        ((), "exactly one budget, --size, --memory or --bpw; found none"),
        (("--size", "1MB", "--bpw", "4"), "found --size and --bpw"),
        (("--size", "1MB", "--memory", "4MB"), "found --size and --memory"),
        (("--size", "lots"), "--size 'lots' is not a size: write bytes, or a number with KB"),
        (("--size", "-5MB"), "--size '-5MB' is not a size"),
        (("--size", "5XB"), "--size '5XB' is not a size"),
        (("--memory", ""), "--memory '' is not a size"),
        (("--bpw", "0"), "--bpw 0 is not a number of bits per weight between 0 and 64"),
        (("--bpw", "nan"), "--bpw nan is not"),
    ],
)
def test_no_budget_or_a_senseless_one(refused: Callable[..., str], budget: tuple[str, ...], fragment: str) -> None:
    assert fragment in refused(budget=budget)


@pytest.mark.parametrize("kind", ["size", "memory", "bpw"])
def test_a_budget_below_the_least_possible_names_it_and_that_one_works(
    refused: Callable[..., str], compress: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    sentence = refused(budget=(f"--{kind}", "1"))
    named = re.search(rf"weight files of ([\d,]+) bytes; give --{kind} ([\d.]+) or more", sentence)
    assert named is not None, sentence
    least = int(named[1].replace(",", ""))
    compress(budget=(f"--{kind}", named[2]))
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size == least if kind != "bpw" else size <= least + 100


def test_the_exception_carries_the_least_size(model: Path, words: Path, tmp_path: Path) -> None:
    with pytest.raises(Infeasible) as caught:
        api.plan(model, size="1kB", fast=True, cache_dir=tmp_path / "cache")
    least = caught.value.smallest
    with pytest.raises(Infeasible):
        api.plan(model, size=least - 1, fast=True, cache_dir=tmp_path / "cache")
    assert api.plan(model, size=least, fast=True, cache_dir=tmp_path / "cache").plan.file_bytes == least


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("--workers", "0"), "--workers 0 cannot be used; give a whole number of at least 1"),
        (("--sequences", "1"), "--sequences 1 cannot be used; give a whole number of at least 2"),
        (("--length", "7"), "--length 7 cannot be used"),
        (("--length", "65"), "--length 65 is more than the 64 tokens that"),
        (("--eval-sequences", "0"), "--eval-sequences 0 cannot be used"),
        (("--samples", "3"), "--samples 3 cannot be used; give a whole number from 0 to 2"),
        (("--seed", "-1"), "--seed -1 cannot be used"),
        (("--solver", "magic"), "--solver 'magic' is unknown; use coordinate, feedback, nearest"),
        (("--sensitivity", "high"), "--sensitivity 'high' is unknown; use fisher, flat"),
        (("--allocator", "greedy"), "--allocator 'greedy' is unknown"),
        (("--dtype", "float16"), "--dtype 'float16' is unknown; use bfloat16, float32"),
        (("--max-memory", "1MB"), "--max-memory 1,000,000 bytes is too little for this model"),
        (("--max-memory", "some"), "--max-memory 'some' is not a size"),
        (("--candidates", " , "), "--candidates names no codec"),
        (("--candidates", "itn4:g32"), "Did you mean int4?"),
        (("--candidates", "int4:g100"), "None of the candidates int4:g100 can take model.embed_tokens with 64 inputs"),
    ],
)
def test_options_that_cannot_be(refused: Callable[..., str], options: tuple[str, ...], fragment: str) -> None:
    assert fragment in refused(*options)


def test_a_stream_cannot_serve_a_budget_of_memory(refused: Callable[..., str]) -> None:
    said = refused("--candidates", "int4:g32,rot(ectcq5)", budget=("--memory", "6MB"))
    assert "rot(ectcq5) is small in files only, as it runs decoded: give --size instead of --memory" in said


def test_a_codec_that_cannot_take_a_layer_gives_way_to_the_next_and_it_is_said(
    compress: Callable[..., Outcome], tmp_path: Path
) -> None:
    data = json.loads(compress("--candidates", "int4:g96,int3:g32,int8:row", "--json").text)
    # Only the two layers with 96 inputs have groups of 96.
    assert any(
        note.startswith("int4:g96 cannot take 14 of 16 layers (first model.embed_tokens") for note in data["notes"]
    )
    codecs = {name: str(codec) for name, codec in open_artifact(tmp_path / "out").layers.items()}
    assert {name for name, codec in codecs.items() if codec == "int4:g96"} <= {
        f"model.layers.{block}.mlp.down_proj" for block in (0, 1)
    }


def test_outputs_that_cannot_be_written(refused: Callable[..., str], tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("precious")
    assert refused("-o", taken) == f"{taken} exists already; choose another --output, or add --overwrite to replace it."
    assert refused("-o", taken, "--overwrite") == (
        f"{taken} is a folder of other things, which would be lost; choose another --output."
    )
    assert (taken / "mine").read_text() == "precious"
    assert f"The folder {tmp_path / 'a'} does not exist" in refused("-o", tmp_path / "a" / "b")


@pytest.mark.parametrize("engine", ["transformers", "compressed-tensors"])
def test_the_model_itself_is_never_replaced(refused: Callable[..., str], model: Path, engine: str) -> None:
    before = {path: path.read_bytes() for path in model.iterdir()}
    for output in (model, model.parent):
        assert "would be lost; choose another --output." in refused("-o", output, "--overwrite", "--for", engine)
    assert {path: path.read_bytes() for path in model.iterdir()} == before


def test_a_plan_that_cannot_be_written_is_said_before_any_work(model: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing" / "plan.json"):
        outcome = command_line.run("plan", model, "--size", "25%", "-o", place, cache=tmp_path / "cache")
        assert outcome.sentence == f"The plan cannot be written to {place}; give a file in a folder that exists."


# The text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("missing.txt", None, "There is no file missing.txt"),
        ("empty.txt", b"", "empty.txt holds no text (0 tokens)"),
        ("short.txt", b"hello", "short.txt gives 6 tokens, less than two sequences of 32; give more text"),
        ("odd.txt", b"fine\nbad \xff\n", "odd.txt, line 2 is not UTF-8"),
        ("notes.doc", b"hello", "notes.doc ends in '.doc', expected .txt, .jsonl, .parquet"),
        ("torn.jsonl", b'{"text": "hello"}\n{"text": \n', "torn.jsonl, line 2 is not valid JSON"),
        ("other.jsonl", b'{"body": "hello"}\n', "other.jsonl, line 1 has no field 'text' or 'messages'"),
        ("list.jsonl", b'{"text": 5}\n', "list.jsonl, line 1: field 'text' holds a value of type int"),
    ],
)
def test_texts_that_cannot_be_used(
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes | None,
    fragment: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    assert fragment in refused("--text", name)
    if content != b"hello" or name.endswith(".doc"):  # a short text is enough to measure on
        assert fragment in refused("--eval-text", name)


def test_too_little_text_is_a_warning_with_the_number_of_tokens(
    compress: Callable[..., Outcome], tmp_path: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("hello " * 20)
    data = json.loads(compress("--text", text, "--json").text)
    assert any(note.startswith("short.txt holds only 121 tokens: 3 sequence(s) of 32") for note in data["notes"])


# Plans ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(small: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    outcome = command_line.run("plan", small, "--fast", "--size", "25%", "-o", path, cache=path.parent)
    assert outcome.code == 0
    plan: dict[str, Any] = json.loads(path.read_text())
    return plan


QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "fragment"),
    [
        ("{,", "plan.json: line 1, column 2 is not JSON"),
        ("[]", "expected a plan, that is a JSON object with 'layers'; write one with `tersor plan`"),
        ({QUERY + "x": "int4:row"}, f"no layer '{QUERY}x'; did you mean '{QUERY}'?"),
        ({QUERY: None}, f"layer '{QUERY}' has no codec; add a line for it"),
        ({QUERY: "int4"}, f"layer '{QUERY}': Codec 'int4' cannot be read"),
        ({QUERY: {"codec": 4}}, f"layer '{QUERY}' needs a codec"),
        ({QUERY: "int4:g100"}, f"layer '{QUERY}': Codec int4:g100 cannot take a layer of 64 inputs"),
        ({"lm_head": "bf16", "model.embed_tokens": "bf16"}, "bytes, more than the budget of 74,560: choose smaller"),
    ],
)
def test_plans_that_cannot_be_followed(
    refused: Callable[..., str], planned: Mapping[str, Any], tmp_path: Path, edit: str | dict[str, Any], fragment: str
) -> None:
    path = tmp_path / "plan.json"
    if isinstance(edit, str):
        path.write_text(edit)
    else:
        layers = {name: choice for name, choice in {**planned["layers"], **edit}.items() if choice is not None}
        path.write_text(json.dumps({**planned, "layers": layers}))
    assert fragment in refused("--plan", path)


def test_a_plan_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"The plan {tmp_path / 'nix.json'} cannot be read" in refused("--plan", tmp_path / "nix.json", budget=())


# Weights and activations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.1.mlp.up_proj.weight", (3, 4)),
        ("model.embed_tokens.weight", (99, 4)),
        ("model.norm.weight", 5),
        ("lm_head.weight", (3, 4)),
    ],
)
def test_weights_that_are_not_finite_are_named(
    refused: Callable[..., str], model: Path, name: str, where: Any, value: float
) -> None:
    edit_weights(model, set_values(name, value, where))
    assert f"Tensor {name} in {model / 'model.safetensors'} has NaN or Inf in 1 of" in refused()


def test_plan_and_inspect_name_damaged_weights_too(model: Path, words: Path, tmp_path: Path) -> None:
    edit_weights(model, set_values("model.layers.1.mlp.up_proj.weight", float("nan")))
    cache = tmp_path / "cache"
    for arguments in (
        ("plan", model, "--size", "25%", "--text", words, "--length", 32),
        ("plan", model, "--size", "25%", "--fast"),
        ("inspect", model),
    ):
        assert "model.layers.1.mlp.up_proj" in command_line.run(*arguments, cache=cache).sentence
    # What the failed plan had done is of no use to anybody.
    assert not list(cache.rglob("*.json"))


@pytest.mark.parametrize(
    ("name", "value", "fragment"),
    [
        ("model.layers.1.input_layernorm.weight", 1e30, "Activations entering model.layers.1.self_attn.q_proj are not"),
        ("model.layers.1.post_attention_layernorm.weight", 3e38, "model.layers.1"),
        ("model.norm.weight", 3e38, "logits have NaN or Inf"),
    ],
)
@pytest.mark.parametrize("sensitivity", ["fisher", "flat"])
def test_activations_that_are_not_finite_are_named(
    refused: Callable[..., str], model: Path, name: str, value: float, fragment: str, sensitivity: str
) -> None:
    edit_weights(model, set_values(name, value, slice(None)))
    sentence = refused("--sensitivity", sensitivity)
    assert fragment in sentence or (name == "model.norm.weight" and "Activations entering lm_head" in sentence)
    assert "check the source model" in sentence


@pytest.mark.parametrize("solver", ["coordinate", "feedback", "nearest"])
def test_dead_rows_columns_and_channels_are_no_error(
    compress: Callable[..., Outcome], model: Path, tmp_path: Path, solver: str
) -> None:
    def kill(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][7] = 0
        tensors["model.layers.0.input_layernorm.weight"][9] = 0  # a channel that q, k and v never see
        tensors["model.layers.0.mlp.up_proj.weight"][11] = 0  # an input that down_proj never sees
        tensors["model.layers.1.mlp.gate_proj.weight"][:, 5] = 0
        tensors["model.layers.1.self_attn.q_proj.weight"][:] = 0
        tensors["lm_head.weight"][5] = 0

    edit_weights(model, kill)
    codecs = "int2:g32,int3:g32:asym:s8,fp4:e2m1:g32,lut2:row,int8:row,bf16"
    data = json.loads(compress("--solver", solver, "--candidates", codecs, "--json").text)
    assert data["quality"]["kl"] < 1
    artifact = open_artifact(tmp_path / "out")
    assert torch.isfinite(artifact.decode("model.layers.1.self_attn.q_proj")).all()
    assert artifact.decode("model.layers.1.self_attn.q_proj").abs().max() < 1e-4


def test_a_model_of_zeros_is_no_error(compress: Callable[..., Outcome], model: Path) -> None:
    def clear(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "norm" not in name:
                tensor[:] = 0

    edit_weights(model, clear)
    assert json.loads(compress("--json").text)["quality"]["kl"] == pytest.approx(0, abs=1e-6)
