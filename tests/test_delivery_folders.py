"""Folders for compressed-tensors: within their budget, one scheme for fused layers, rules told beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny_runs
from tersor import api
from tersor.artifact import plan_to_json
from tersor.cli import app
from tersor.delivery import ENGINES, Delivered
from tersor.engines.compressed_tensors.forms import Form
from tersor.errors import BadInput, CorruptArtifact, EngineFailed, Infeasible, VerificationFailed

pytest.importorskip("compressed_tensors")

NAME = "compressed-tensors"
SETTINGS: dict[str, Any] = {**tiny_runs.SETTINGS, "eval_sequences": 2, "effort": "fast"}


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    return partial(tiny_runs.wide_model, tmp_path)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {"text": tiny_runs.text(tmp_path / "text.txt"), "cache_dir": tmp_path / "cache", **SETTINGS}


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the engine is not installed: a process of its own takes long to start."""
    monkeypatch.setitem(ENGINES, NAME, replace(ENGINES[NAME], installed=lambda: False))  # type: ignore[arg-type]


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def groups_of(folder: Path) -> dict[str, int]:
    """Number of the config group of each layer."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {name: number for number, group in enumerate(config["config_groups"].values()) for name in group["targets"]}


def fill(model: Path, output: Path, settings: dict[str, Any], **more: Any) -> Delivered:
    return api.compress_for(NAME, model, output, **{**settings, **more})


def test_the_real_engine_proves_it(model: Callable[..., Path], settings: dict[str, Any], tmp_path: Path):
    done = fill(model(), tmp_path / "x", settings, size=380_000)
    assert done.proof is not None
    # Transformers computes in float32 what we decode; only the order of sums differs.
    assert done.proof.noise < 1e-7
    assert done.proof.engine.kl == pytest.approx(done.proof.ours.kl, rel=1e-3)
    assert done.proof.file_bytes == stored_bytes(tmp_path / "x") <= 380_000
    assert json.loads((tmp_path / "x.json").read_text())["engine"] == NAME
    for path in (tmp_path / "x").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorruptArtifact):
        api.prove(tmp_path / "x", model(), **settings)


@pytest.mark.parametrize("size", [300_001, 500_000])
@pytest.mark.usefixtures("unproven")
def test_a_folder_fills_its_budget(size: int, model: Callable[..., Path], settings: dict[str, Any], tmp_path: Path):
    done = fill(model(), tmp_path / "x", settings, size=size)
    assert stored_bytes(tmp_path / "x") == done.result.plan.file_bytes <= size
    texts = {name: choice.codec for name, choice in done.result.plan.layers.items()}
    groups = groups_of(tmp_path / "x")
    for block in range(3):
        path = f"model.layers.{block}."
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({texts[path + name] for name in fused}) == 1
            assert len({groups.get(path + name) for name in fused}) == 1
    assert {texts["model.embed_tokens"], texts["lm_head"]} == {"bf16"}
    assert any("embed_tokens in anything but bf16" in note for note in done.result.notes)
    assert done.note.startswith("not proven here: compressed-tensors is not installed (pip install compressed-tensors)")
    assert (tmp_path / "x" / "tokenizer.json").exists()
    assert {path.name for path in tmp_path.glob("*x*")} >= {"x", "x.json", "x.report.html"}
    assert not list(tmp_path.glob("partial*"))


@pytest.mark.usefixtures("unproven")
def test_less_is_impossible(model: Callable[..., Path], settings: dict[str, Any], tmp_path: Path):
    with pytest.raises(Infeasible, match="least possible for this model in compressed-tensors") as caught:
        fill(model(), tmp_path / "x", settings, size=100_000)
    done = fill(model(), tmp_path / "x", settings, size=caught.value.smallest)
    assert done.result.plan.file_bytes <= caught.value.smallest


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"candidates": ("int3:g64",)}, "compressed-tensors cannot run int3:g64; for it, choose among sint4:g32:bf16"),
        ({"candidates": ("sint4:g48:bf16",)}, "compressed-tensors cannot run sint4:g48:bf16"),
        (
            {"candidates": ("sint4:g128:bf16",), "tensor_parallel": 3},
            r"cannot be split over 3 processors\. No candidate is left",
        ),
        ({"memory": "1GB", "size": None}, "give --size instead of --memory"),
        ({"engine": "llama.cpp", "tensor_parallel": 2}, r"llama\.cpp does not split layers over processors"),
        ({"engine": "transformers", "tensor_parallel": 2}, "transformers does not split layers"),
        ({"engine": "vlm"}, "engine 'vlm' is unknown; use transformers or .* or sglang"),
        ({"engine": "vllm", "candidates": ("int3:g64",)}, "compressed-tensors cannot run int3:g64"),
    ],
)
def test_rules_are_told_by_a_plan(more: dict[str, Any], why: str, model: Callable[..., Path], settings: dict[str, Any]):
    with pytest.raises(BadInput, match=why):
        api.plan(model(), fast=True, **{**settings, "engine": NAME, "size": 380_000, **more})


def test_groups_must_divide_what_a_processor_gets(model: Callable[..., Path], settings: dict[str, Any]):
    given = {**settings, "engine": NAME, "size": 380_000, "candidates": ("sint4:g128:bf16", "sint4:g64:bf16", "bf16")}
    alone = api.plan(model(), fast=True, **given)
    assert not any("split over" in note for note in alone.notes)
    split = api.plan(model(), fast=True, **given, tensor_parallel=2)
    # Only o_proj has 128 inputs that are split; down_proj has 256.
    assert any(
        "o_proj and 2 other layers in sint4:g128:bf16: its 128 inputs split over 2 processors leave 64 each, which "
        "groups of 128 do not divide" in note
        for note in split.notes
    )
    chosen = {name: choice.codec for name, choice in split.plan.layers.items() if name.endswith("o_proj")}
    assert "sint4:g128:bf16" not in chosen.values()


def test_models_that_cannot_be_written(model: Callable[..., Path], settings: dict[str, Any]):
    given = {**settings, "engine": NAME, "size": "60%"}
    with pytest.raises(BadInput, match=r"no form for weights that a model stores transposed\. No candidate is left"):
        api.plan(model("gpt2", n_embd=64, hidden_size=64), fast=True, **given)
    with pytest.raises(BadInput, match=r"holds experts that .* does not store one by one, as compressed-tensors needs"):
        api.plan(model("gptoss"), fast=True, **given)


def test_experts_get_one_codec_and_bf16_last_of_all(model: Callable[..., Path], settings: dict[str, Any]):
    experts = model("qwen2moe", moe_intermediate_size=64)
    given = {**settings, "engine": NAME, "size": "95%", "fast": True}
    planned = api.plan(experts, **given)
    chosen = {choice.codec for name, choice in planned.plan.layers.items() if ".experts." in name}
    assert len(chosen) == 1
    assert chosen.pop().startswith("sint8")
    kept = api.plan(experts, **given, candidates=("fp8:e4m3:row:bf16", "bf16"))
    assert {choice.codec for name, choice in kept.plan.layers.items() if ".experts." in name} == {"bf16"}
    assert any("3 other layers in bf16: transformers 5.23 loads packed experts only" in note for note in kept.notes)
    assert not any("loads packed experts only" in note for note in planned.notes)


def test_what_transformers_does_not_load_is_said_in_the_plan(model: Callable[..., Path], settings: dict[str, Any]):
    given = {**settings, "engine": NAME, "size": "60%", "fast": True}
    planned = api.plan(model(), **given, candidates=("int4:g32:asym:bf16", "bf16"))
    assert any("loads no folder with zero points" in note and "not proven here" in note for note in planned.notes)
    assert not any("zero points" in note for note in api.plan(model(), **given).notes)


@pytest.mark.usefixtures("unproven")
def test_a_plan_is_followed_or_refused(model: Callable[..., Path], settings: dict[str, Any], tmp_path: Path):
    planned = api.plan(model(), fast=True, engine=NAME, size=380_000, **settings).plan
    done = api.compress_for(NAME, model(), tmp_path / "x", plan=planned, **settings)
    assert stored_bytes(tmp_path / "x") == planned.file_bytes == done.result.plan.file_bytes
    lines = json.loads(plan_to_json(planned))
    path = tmp_path / "edited.json"

    def refused(why: str, **edits: str) -> None:
        changed = {**lines["layers"], **{name: {"codec": codec} for name, codec in edits.items()}}
        path.write_text(json.dumps({**lines, "layers": changed}))
        with pytest.raises(BadInput, match=why):
            api.compress_for(NAME, model(), tmp_path / "y", plan=path, **settings)

    first = "model.layers.0."
    refused("as one product, which needs one codec for all", **{first + "self_attn.q_proj": "bf16"})
    refused("look up the rows of an embedding", **{"model.embed_tokens": "sint8:row:bf16"})
    refused("compute the head in bf16", lm_head="sint4:g64:bf16")
    refused("cannot run lut3:row", **{first + "mlp.down_proj": "lut3:row"})
    refused(
        "more than its budget", **{first + name: "bf16" for name in ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")}
    )
    refused("does not belong to this model", **{first + "mlp.extra": "bf16"})


@pytest.mark.usefixtures("unproven")
def test_artifacts_are_exported(model: Callable[..., Path], settings: dict[str, Any], tmp_path: Path):
    layers = ("sint4:g64:bf16", "sint8:row:bf16:a8", "fp8:e4m3:row:bf16", "mxfp4:e2m1:g32", "bf16")
    planned = api.plan(model(), fast=True, engine=NAME, size=380_000, **settings, candidates=layers).plan
    api.compress(model(), tmp_path / "good", plan=planned, **settings)
    cache = {"cache_dir": tmp_path / "cache"}
    size = api.export(tmp_path / "good", tmp_path / "x", engine=NAME, **cache)
    assert size == stored_bytes(tmp_path / "x") == planned.file_bytes
    with pytest.raises(BadInput, match="exists already"):
        api.export(tmp_path / "good", tmp_path / "x", engine=NAME, **cache)
    with pytest.raises(BadInput, match="split over 3 processors"):
        api.export(tmp_path / "good", tmp_path / "y", engine=NAME, tensor_parallel=3, **cache)
    api.compress(model(), tmp_path / "bad", size="60%", candidates=("sint4:g64:bf16",), **settings)
    with pytest.raises(BadInput, match="look up the rows of an embedding"):
        api.export(tmp_path / "bad", tmp_path / "y", engine=NAME, **cache)
    model(intermediate_size=128)
    with pytest.raises(BadInput, match="which has other layers by now"):
        api.export(tmp_path / "good", tmp_path / "y", engine=NAME, **cache)
    assert not list(tmp_path.glob("*y*"))


def test_files_of_no_engine(model: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, unproven: None):
    with pytest.raises(BadInput, match="is for no engine that is known here"):
        api.prove(model(), model(), **settings)
    with pytest.raises(BadInput, match="does not exist"):
        api.prove(tmp_path / "none", model(), **settings)
    fill(model(), tmp_path / "x", settings, size=380_000)
    with pytest.raises(EngineFailed, match="not proven here"):
        api.prove(tmp_path / "x", model(), **settings)


@pytest.mark.usefixtures("unproven")
def test_the_commands(model: Callable[..., Path], settings: dict[str, Any], tmp_path: Path):
    words = ["--text", str(settings["text"]), *tiny_runs.OPTIONS, "--for", NAME, "--effort", "fast"]
    folder, runner = str(model()), CliRunner()
    plan = str(tmp_path / "plan.json")
    asked = ["plan", folder, "--size", "380kB", "--for", NAME, "--fast", "--tensor-parallel", "2", "-o", plan, "--json"]
    planned = runner.invoke(app, asked)
    assert planned.exit_code == 0, planned.output
    size = json.loads(planned.stdout)["file_bytes"]
    output = str(tmp_path / "x")
    done = runner.invoke(app, ["compress", folder, "--plan", plan, "--tensor-parallel", "2", "-o", output, *words])
    assert done.exit_code == 0, done.output
    assert stored_bytes(tmp_path / "x") == size
    assert "Compressed for compressed-tensors" in done.stdout


@pytest.mark.usefixtures("unproven")
def test_nothing_is_left_of_a_folder_that_reads_otherwise(
    model: Callable[..., Path], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    api.compress(
        model(),
        tmp_path / "good",
        plan=api.plan(model(), fast=True, engine=NAME, size=380_000, **settings).plan,
        **settings,
    )
    put = Form.put
    monkeypatch.setattr(Form, "put", lambda *given: {name: value.flip(0) for name, value in put(*given).items()})
    with pytest.raises((VerificationFailed, CorruptArtifact)):
        api.export(tmp_path / "good", tmp_path / "x", engine=NAME, cache_dir=tmp_path / "cache")
    assert not list(tmp_path.glob("*x"))


def test_a_quantized_source_is_never_replaced_by_what_is_made_of_it(
    model: Callable[..., Path], settings: dict[str, Any], unproven: None, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    source = model()
    api.compress_for(NAME, source, first, size="60%", **settings)
    with pytest.raises(BadInput, match="first holds the model itself"):
        api.compress_for(NAME, first, first, size="50%", overwrite=True, **settings)
    assert (first / "config.json").exists()
    api.compress_for(NAME, first, second, size="60%", **settings)
    api.compress_for(NAME, source, first, size="60%", overwrite=True, **settings)
