"""Packed checkpoints as whole models: what is said of them, what they compute, and what becomes of them."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import tersor
import tiny_packed
import tiny_runs
from tersor.anatomy import analyse, load_whole, open_source, skeleton
from tersor.anatomy.packed import module as shared
from tersor.anatomy.shards import ComputedTensor, map_tensor
from tersor.errors import CannotResume, CorruptArtifact, NotFinite, ShapeMismatch, TersorError
from tersor.report.data import LayerReport, ReportData
from tersor.report.figures import size_bars, size_parts

Q = "model.layers.0.self_attn.q_proj"


def put(name, make):
    return lambda tensors: tensors.update({f"{Q}.{name}": make(tensors[f"{Q}.{name}"])})


def test_every_stored_tensor_has_its_fate(gptq):
    made = gptq()
    source = open_source(made.folder)
    model = skeleton(source)
    anatomy = analyse(source, model)
    with safe_open(made.folder / "model.safetensors", "pt") as file:
        assert sorted(fate.name for fate in anatomy.tensors) == sorted(file.keys())
    fates = {fate.name: fate for fate in anatomy.tensors}
    for leaf in ("qweight", "qzeros", "scales", "g_idx"):
        assert (fates[f"{Q}.{leaf}"].fate, fates[f"{Q}.{leaf}"].target) == ("encoded", f"{Q}.weight")
        assert fates[f"{Q}.{leaf}"].reason == "dequantized"
    assert fates[f"{Q}.qweight"].dtype == "int32"
    assert anatomy.notes == ("the source is GPTQ 4-bit g16: what it lost before is not counted",)
    assert {layer.name: layer.shape for layer in anatomy.layers}[Q] == (32, 32)
    assert anatomy.source_bytes == sum(2 * tensor.numel() for tensor in made.weights.values())


def test_weights_are_made_when_they_are_asked_for(gptq, monkeypatch):
    made = gptq()
    source = open_source(made.folder)
    info = source.tensors[f"{Q}.weight"]
    assert isinstance(info, ComputedTensor)
    assert [part.name for part in info.stored] == [f"{Q}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")]
    whole = map_tensor(info)
    monkeypatch.setattr(shared, "_STRETCH", 40)
    assert torch.equal(map_tensor(info), whole)
    assert map_tensor(info).data_ptr() != whole.data_ptr()


def test_the_fingerprint_sees_changes_in_packed_tensors(gptq):
    made = gptq()
    first = open_source(made.folder)
    before = first.fingerprint(), first.stamp()
    made.change(put("qzeros", lambda t: t ^ 1))
    after = open_source(made.folder)
    assert len({before[0], after.fingerprint()}) == 2
    assert before[1] != after.stamp()


def test_settings_beside_the_configuration(gptq):
    made = gptq()
    file = made.folder / "config.json"
    raw = json.loads(file.read_text())
    settings = raw.pop("quantization_config")
    file.write_text(json.dumps(raw))
    with pytest.raises(TersorError):
        analyse(open_source(made.folder), skeleton(open_source(made.folder)))
    beside = made.folder / "quantize_config.json"
    beside.write_text(json.dumps({key: value for key, value in settings.items() if key != "quant_method"}))
    source = open_source(made.folder)
    assert beside not in source.side_files
    before = source.fingerprint()
    beside.write_text(json.dumps({**settings, "damp_percent": 0.1}))
    assert open_source(made.folder).fingerprint() != before
    beside.write_text("{")
    with pytest.raises(CorruptArtifact, match=r"quantize_config\.json is not JSON"):
        open_source(made.folder)


def test_a_whole_model_computes_what_its_dequantized_copy_does(gptq, tmp_path):
    for family in ("llama", "llama-tied", "qwen3moe"):
        made = gptq(family=family)
        source = open_source(made.folder)
        model = load_whole(source, torch.float32)
        plain = tmp_path / "plain"
        shutil.copytree(made.folder, plain)
        save_file(made.weights, plain / "model.safetensors")
        (plain / "config.json").write_text(json.dumps(source.plain_config()))
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()(ids).logits
            assert torch.equal(model(ids).logits, expected)
        assert model.generation_config.eos_token_id == 2
        shutil.rmtree(plain)
        shutil.rmtree(made.folder)


def test_a_packed_model_is_compressed_like_any_other(gptq, complete, tmp_path):
    made = gptq()
    settings = {**tiny_runs.SETTINGS, "samples": 1}
    planned = tersor.plan(made.folder, size="60%", fast=True)
    assert planned.notes[0] == "the source is GPTQ 4-bit g16: what it lost before is not counted"
    result = tersor.compress(made.folder, tmp_path / "out", size="60%", cache_dir=tmp_path / "cache", **settings)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "tersor"
    assert "bits" not in config["quantization_config"]
    assert result.quality.kl < 0.05
    assert result.sample is not None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.config.quantization_config).__name__ == "TersorConfig"
    words = tiny_runs.text(tmp_path / "words.txt")
    again = tersor.evaluate(tmp_path / "out", text=words, cache_dir=tmp_path / "cache", **_only_texts(settings))
    assert again.kl < 0.05
    original = tersor.evaluate(
        made.folder, against=complete("llama", dtype=torch.float16), text=words, **_only_texts(settings)
    )
    assert 0 < original.kl < 1


def _only_texts(settings):
    return {key: value for key, value in settings.items() if key in ("sequences", "length", "workers", "dtype")}


def test_a_scale_that_is_no_number_is_named(gptq, tmp_path):
    made = gptq()
    made.change(put("scales", lambda t: t.index_fill(0, torch.tensor([1]), float("nan"))))
    with pytest.raises(NotFinite, match=rf"{Q}\.weight"):
        tersor.compress(made.folder, tmp_path / "out", size="60%", cache_dir=tmp_path, **tiny_runs.SETTINGS)
    assert not (tmp_path / "out").exists()


def test_packed_layers_that_are_no_linears_are_refused(complete, tmp_path):
    """GPT-2 keeps its weights the other way round, and packed ones do not say so."""
    made = tiny_packed.write(
        complete("gpt2", dtype=torch.float16),
        tmp_path / "packed",
        {"quant_method": "gptq", "bits": 4, "group_size": -1},
        lambda weight: tiny_packed.round_off(weight.T, 4, weight.shape[0], order=False, dtype=torch.float16),
        lambda rounded: tiny_packed.gptq(rounded, 4),
    )
    source = open_source(made.folder)
    with pytest.raises((ShapeMismatch, CorruptArtifact)):
        analyse(source, skeleton(source))


def test_the_report_does_not_take_packed_bytes_for_the_sources(gptq, tmp_path):
    """The source's size counts 16 bits a weight; its packed tensors would not add up to it."""
    made = gptq()
    source = open_source(made.folder)
    anatomy = analyse(source, skeleton(source))
    data = ReportData(
        model="m",
        model_type="llama",
        budget=1000,
        kept_bytes=0,
        parameters=anatomy.parameters,
        source_bytes=anatomy.source_bytes,
        file_bytes=1000,
        layers=tuple(LayerReport(layer, "int4:g16", 10, None, None, ()) for layer in anatomy.layers),
        tensors=anatomy.tensors,
    )
    assert [label for label, _, _ in size_bars(data, size_parts(data))] == ["Compressed"]


def test_an_interrupted_run_goes_on_and_notices_another_source(gptq, tmp_path):
    made = gptq()
    settings = {
        **tiny_runs.SETTINGS,
        "size": "60%",
        "text": tiny_runs.text(tmp_path / "w.txt"),
        "cache_dir": tmp_path / "c",
    }
    tersor.compress(made.folder, tmp_path / "whole", **settings)

    def stop(stage, done, total):
        if stage == "encode" and done == 1:
            raise KeyboardInterrupt

    for folder in ("out", "other"):
        with pytest.raises(KeyboardInterrupt):
            tersor.compress(made.folder, tmp_path / folder, progress=stop, **settings)
    assert tersor.compress(made.folder, tmp_path / "out", **settings).resumed
    whole, resumed = (tmp_path / folder / "model.safetensors" for folder in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes()
    made.change(put("scales", lambda t: t * 1.5))
    with pytest.raises(CannotResume):
        tersor.compress(made.folder, tmp_path / "other", **settings)
