"""Files for llama.cpp: within their budget to the byte, read back, run by llama.cpp itself, refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import byte_tokenizer
import tiny_models
import tiny_runs
from tersor import api, delivery
from tersor.anatomy import analyse, open_source, skeleton
from tersor.cli import app
from tersor.contracts import Plan
from tersor.engines.llama_cpp import engine as llama_cpp
from tersor.engines.llama_cpp.library import find_library
from tersor.errors import BadInput, CorruptArtifact, EngineFailed, Infeasible

SETTINGS: dict[str, Any] = {**tiny_runs.SETTINGS, "eval_sequences": 3}
needs_engine = pytest.mark.skipif(find_library() is None, reason="llama.cpp is not installed")


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """A model with widths that 32 and 256 divide, and a byte-level tokenizer."""

    def make(family: str = "llama", **options: object) -> Path:
        folder = tmp_path / f"model-{family}"
        wide = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, **options}
        tiny_models.build(family, **wide).save_pretrained(folder)
        byte_tokenizer.tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def compress(tmp_path: Path) -> Callable[..., delivery.Delivered]:
    def run(model: Path, output: Path, **settings: Any) -> delivery.Delivered:
        given = {"text": tiny_runs.text(tmp_path / "text.txt"), "cache_dir": tmp_path / "cache", **SETTINGS}
        return api.compress_for("llama.cpp", model, output, **{**given, **settings})

    return run


@needs_engine
@pytest.mark.parametrize("size", [140_000, 150_000, 171_003])
def test_a_file_fills_its_budget_and_llama_cpp_computes_what_we_predict(
    size: int, model: Callable[..., Path], compress: Callable[..., delivery.Delivered], tmp_path: Path
):
    output = tmp_path / "x.gguf"
    done = compress(model(), output, size=size)
    assert output.stat().st_size == done.result.plan.file_bytes <= size
    assert done.proof is not None
    # llama.cpp rounds activations to 8 bits before it multiplies.
    assert done.proof.noise < 1e-3
    assert done.proof.engine.kl == pytest.approx(done.proof.ours.kl, rel=0.1, abs=1e-3)
    assert {path.name for path in tmp_path.glob("x.gguf*")} == {"x.gguf", "x.gguf.json", "x.gguf.report.html"}
    said = json.loads((tmp_path / "x.gguf.json").read_text())
    assert said["proof"]["noise"] == done.proof.noise
    assert set(said["plan"].values()) <= set(delivery.ENGINES["llama.cpp"].candidates("normal"))
    again = api.prove(output, model(), text=tmp_path / "text.txt", cache_dir=tmp_path / "cache", **SETTINGS)
    assert again.engine.kl == done.proof.engine.kl


@needs_engine
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen2moe"])
def test_other_families(
    family: str, model: Callable[..., Path], compress: Callable[..., delivery.Delivered], tmp_path: Path
):
    options = {
        "gpt2": {"n_embd": 64, "hidden_size": 64},
        "qwen2moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    }
    done = compress(model(family, **options.get(family, {})), tmp_path / "x.gguf", size="40%")
    assert done.proof is not None
    assert done.proof.noise < 2e-3


def test_like_another_file_is_no_larger_and_no_slower(
    model: Callable[..., Path], compress: Callable[..., delivery.Delivered], tmp_path: Path
):
    pace = delivery.ENGINES["llama.cpp"].pace
    assert pace is not None
    folder, other = model(num_hidden_layers=4), tmp_path / "other.gguf"
    quick = ("q4_1", "q5_0", "q8_0")  # for matrices as small as here; with all types to choose from, others are better
    given = compress(folder, other, size=180_000, candidates=quick).result
    free = compress(folder, tmp_path / "free.gguf", size=given.plan.file_bytes).result
    like = compress(folder, tmp_path / "like.gguf", like=other).result

    source = open_source(folder)
    anatomy = analyse(source, skeleton(source))
    read = [layer for layer in anatomy.layers if layer.name != anatomy.embedding]

    def time(plan: Plan) -> float:
        return sum(pace[plan.layers[layer.name].codec].time(layer) for layer in read)

    assert like.plan.file_bytes <= given.plan.file_bytes
    assert time(like.plan) <= time(given.plan) * (1 + 1e-9)
    assert time(free.plan) > time(given.plan)
    assert free.plan.predicted <= like.plan.predicted
    planned = api.plan(folder, engine="llama.cpp", like=other, size=190_000, fast=True, cache_dir=tmp_path / "cache")
    assert planned.plan.budget == 190_000
    alike = api.plan(folder, engine="llama.cpp", like=other, fast=True, cache_dir=tmp_path / "cache")
    assert alike.plan.file_bytes <= alike.plan.budget == given.plan.file_bytes
    assert time(planned.plan) <= time(given.plan) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("engine", "like", "why"),
    [
        (
            "transformers",
            "x.gguf",
            r"How fast transformers runs a file is not known here; give --like with --for llama\.cpp",
        ),
        ("onnx", "x.gguf", r"How fast onnx runs a file is not known here"),
        ("llama.cpp", "none.gguf", r"none\.gguf is no file for llama\.cpp; give one of this very model"),
    ],
)
def test_what_nothing_can_be_like(engine: str, like: str, why: str, model: Callable[..., Path], tmp_path: Path):
    with pytest.raises(BadInput, match=why):
        api.plan(model(), engine=engine, like=tmp_path / like, cache_dir=tmp_path / "cache")


def test_more_bytes_are_needed(model: Callable[..., Path], compress: Callable[..., delivery.Delivered], tmp_path: Path):
    with pytest.raises(Infeasible, match=r"least possible for this model in llama\.cpp") as caught:
        compress(model(), tmp_path / "x.gguf", size=50_000)
    done = compress(model(), tmp_path / "x.gguf", size=caught.value.smallest)
    assert done.result.plan.file_bytes <= caught.value.smallest
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("settings", "name", "why"),
    [
        ({"size": 150_000, "candidates": ("int4:g32",)}, "x.gguf", r"llama\.cpp cannot run int4:g32; for it, choose"),
        ({"size": 150_000}, "x.bin", r"llama\.cpp reads \.gguf files"),
        ({"size": 150_000}, "no/x.gguf", "does not exist; make it"),
    ],
)
def test_rules_are_told_before_any_work(
    settings: dict[str, Any],
    name: str,
    why: str,
    model: Callable[..., Path],
    compress: Callable[..., delivery.Delivered],
    tmp_path: Path,
):
    with pytest.raises(BadInput, match=why):
        compress(model(), tmp_path / name, **settings)
    assert not list(tmp_path.glob("x*"))


def test_a_family_that_cannot_be_written(tiny: Callable[..., Path], tmp_path: Path):
    model = tiny_runs.with_tokenizer(tiny("neox"), tmp_path / "neox")
    with pytest.raises(BadInput, match=r"type gpt_neox cannot be written for llama\.cpp"):
        api.plan(model, size=150_000, engine="llama.cpp", cache_dir=tmp_path / "cache")


def test_without_the_engine_nothing_is_claimed(
    model: Callable[..., Path],
    compress: Callable[..., delivery.Delivered],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(llama_cpp, "find_library", lambda: None)
    done = compress(model(), tmp_path / "x.gguf", size=150_000)
    assert done.proof is None
    assert "not proven here" in done.note
    assert json.loads((tmp_path / "x.gguf.json").read_text())["proof"] is None
    with pytest.raises(EngineFailed, match="not proven here"):
        api.prove(tmp_path / "x.gguf", model(), text=tmp_path / "text.txt", cache_dir=tmp_path / "cache", **SETTINGS)


def test_artifacts_are_exported_where_the_engine_can_run_them(model: Callable[..., Path], tmp_path: Path):
    text = tiny_runs.text(tmp_path / "text.txt")
    given = {"text": text, "cache_dir": tmp_path / "cache", **SETTINGS}
    api.compress(model(), tmp_path / "good", size="40%", candidates=("q4_k", "q4_0", "q8_0"), **given)
    size = api.export(tmp_path / "good", tmp_path / "x.gguf", cache_dir=tmp_path / "cache")
    assert size == (tmp_path / "x.gguf").stat().st_size
    with pytest.raises(BadInput, match="exists already"):
        api.export(tmp_path / "good", tmp_path / "x.gguf", cache_dir=tmp_path / "cache")
    api.compress(model(), tmp_path / "bad", size="40%", candidates=("int4:g32",), **given)
    with pytest.raises(BadInput, match=r"llama\.cpp cannot run"):
        api.export(tmp_path / "bad", tmp_path / "y.gguf", cache_dir=tmp_path / "cache")


def test_damaged_files(model: Callable[..., Path], compress: Callable[..., delivery.Delivered], tmp_path: Path):
    compress(model(), tmp_path / "x.gguf", size=150_000)
    whole = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((CorruptArtifact, EngineFailed)):
        api.prove(tmp_path / "cut.gguf", model(), text=tmp_path / "text.txt", cache_dir=tmp_path / "cache", **SETTINGS)


@needs_engine
def test_the_commands(model: Callable[..., Path], tmp_path: Path):
    text = tiny_runs.text(tmp_path / "text.txt")
    words = ["--text", str(text), *tiny_runs.OPTIONS]
    folder, output = str(model()), str(tmp_path / "x.gguf")
    runner = CliRunner()
    planned = runner.invoke(app, ["plan", folder, "--size", "150kB", "--for", "llama.cpp", "--fast", "--json"])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["file_bytes"] <= 150_000
    done = runner.invoke(app, ["compress", folder, "--size", "150kB", "--for", "llama.cpp", "-o", output, *words])
    assert done.exit_code == 0, done.output
    assert "KL by llama.cpp" in done.stdout
    keep = [word for word in words if word not in ("--samples", "0")]
    proven = runner.invoke(app, ["prove", output, "--against", folder, *keep, "--json"])
    assert proven.exit_code == 0, proven.output
    assert json.loads(proven.stdout)["noise"] < 0.1
