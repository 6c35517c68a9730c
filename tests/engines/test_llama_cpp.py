"""GGUF files of tiny models of many families, run by llama.cpp itself and compared with transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny_models
from byte_tokenizer import tokenizer
from tersor.anatomy import WeightLoader, analyse, open_source, skeleton
from tersor.codecs import parse
from tersor.engines.llama_cpp.engine import Stored, export
from tersor.engines.llama_cpp.library import LlamaCpp, find_library
from tersor.engines.llama_cpp.names import pieces
from tersor.engines.llama_cpp.pace import PACE
from tersor.engines.llama_cpp.tokenizer import read_vocabulary
from tersor.engines.llama_cpp.write import Recipe, file_bytes, write
from tersor.errors import BadInput, CorruptArtifact, EngineFailed
from tersor.solvers import Encoder, Nearest

FAMILIES = (
    "llama",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "qwen2moe",
    "qwen3moe",
)

RUNNABLE: dict[str, dict[str, object]] = {
    # llama.cpp attends to all that Mistral's window leaves out.
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3": {"query_pre_attn_scalar": 8, "_sliding_window_pattern": 6},
    "qwen3moe": {"norm_topk_prob": True},
}


@pytest.fixture(scope="module")
def engine() -> LlamaCpp:
    path = find_library()
    if path is None:
        pytest.skip("llama.cpp is not installed")
    return LlamaCpp(path)


def recipe_of(folder: Path, family: str, **options: object) -> tuple[Recipe, torch.nn.Module, WeightLoader]:
    model = tiny_models.build(family, **options)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    source = open_source(folder)
    body = skeleton(source)
    recipe = Recipe(analyse(source, body), source.config, read_vocabulary(folder, source.config.vocab_size), "tiny")
    return recipe, model, WeightLoader(source, body)


def write_plain(recipe: Recipe, loader: WeightLoader, path: Path) -> None:
    """Everything in float32."""
    layers = {layer.name: layer for layer in recipe.anatomy.layers}

    def read(name: str) -> Tensor:
        if name not in layers:
            return loader.load([name])[name]
        layer = layers[name]
        value = loader.load([layer.parameter])[layer.parameter].float()
        value = value.transpose(-1, -2) if layer.transposed else value
        return value.reshape(layer.stored_shape).contiguous().view(torch.uint8)

    write(recipe, dict.fromkeys(layers, "F32"), path, read)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_the_same(family: str, engine: LlamaCpp, tmp_path: Path):
    recipe, model, loader = recipe_of(tmp_path / "model", family, **RUNNABLE.get(family, {}))
    path = tmp_path / "model.gguf"
    write_plain(recipe, loader, path)
    types = {layer.name: "F32" for layer in recipe.anatomy.layers}
    assert path.stat().st_size == file_bytes(recipe, types, tmp_path)
    ids = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits[0].float()
    with engine.load(path, length=32) as loaded:
        assert loaded.tokens == 100
        found = loaded.logits(ids[0].tolist())
        assert torch.equal(found, loaded.logits(ids[0].tolist()))
    # llama.cpp keeps keys and values in float16, and computes some functions from float16 tables.
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.std())


@pytest.mark.parametrize("text", PACE)
def test_llama_cpp_runs_every_type(text: str, engine: LlamaCpp, tmp_path: Path):
    """A model with all layers of that type, embedding and head too, puts out what its decoded weights do."""
    recipe, model, loader = recipe_of(tmp_path / "model", "llama", hidden_size=256, intermediate_size=256)
    encode, blocks = Encoder(Nearest()), {}
    with torch.no_grad():
        for layer in recipe.anatomy.layers:
            weight = loader.load([layer.parameter])[layer.parameter].float()
            tensors, values = encode(weight, parse(text), None)
            (blocks[layer.name],) = tensors.values()
            model.get_parameter(layer.parameter).copy_(values)
        ids = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(0))
        wanted = model(ids).logits[0].float()
    export(
        recipe,
        dict.fromkeys(blocks, parse(text)),
        tmp_path / "x.gguf",
        lambda name: {name: blocks[name]} if name in blocks else loader.load([name])[name],
    )
    with engine.load(tmp_path / "x.gguf", length=32) as loaded:
        found = loaded.logits(ids[0].tolist())
    # llama.cpp rounds inputs to 8 bits for all types but floats, and random layers pass every error on.
    assert float((found - wanted).std()) < 0.1 * float(wanted.std())


@pytest.mark.parametrize("kind", ["gpt-2", "smollm"])
def test_llama_cpp_splits_text_the_same(kind: str, engine: LlamaCpp, tmp_path: Path):
    recipe, _, loader = recipe_of(tmp_path / "model", "llama")
    made = tokenizer(kind)
    made.save_pretrained(tmp_path / "model")
    vocabulary = read_vocabulary(tmp_path / "model", 100)
    assert vocabulary.pre == kind
    assert vocabulary.special == {"bos": 1, "eos": 2}
    assert vocabulary.template == made.chat_template
    path = tmp_path / "model.gguf"
    write_plain(Recipe(recipe.anatomy, recipe.config, vocabulary, "x"), loader, path)
    text = "the 2024 thing!? anthem...</s>12"
    with engine.load(path, length=32) as loaded:
        assert loaded.tokenize(text) == made(text).input_ids


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("gemma2", {}, "scales attention by 1/sqrt(256)"),
        (
            "gemma3",
            {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "every 6th",
        ),
        ("qwen3moe", {}, "norm_topk_prob"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    family: str, options: dict[str, object], why: str, tmp_path: Path
):
    recipe, _, loader = recipe_of(tmp_path / "model", family, **options)
    with pytest.raises(BadInput, match=re.escape(why)):
        write_plain(recipe, loader, tmp_path / "model.gguf")


def test_what_cannot_be_written_is_said(tmp_path: Path):
    recipe, _, _ = recipe_of(tmp_path / "model", "neox")
    with pytest.raises(BadInput, match=r"type gpt_neox cannot be written for llama\.cpp"):
        pieces(recipe.anatomy, recipe.config)
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        read_vocabulary(tmp_path / "model", 100)


def test_a_damaged_file_is_refused_in_a_sentence(engine: LlamaCpp, tmp_path: Path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(EngineFailed, match="refuses"), engine.load(path, length=8):
        pass


def test_a_file_of_another_model_is_refused(tmp_path: Path):
    recipe, _, loader = recipe_of(tmp_path / "model", "llama")
    write_plain(recipe, loader, tmp_path / "x.gguf")
    wider, _, _ = recipe_of(tmp_path / "wider", "llama", hidden_size=2 * recipe.config.hidden_size)
    with pytest.raises(CorruptArtifact, match=r"'token_embd\.weight' with the shape .* it is of another model"):
        Stored(tmp_path / "x.gguf", wider)
    (tmp_path / "y.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(CorruptArtifact, match=r"y\.gguf is truncated or malformed"):
        Stored(tmp_path / "y.gguf", recipe)


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path: Path):
    recipe, _, _ = recipe_of(tmp_path / "model", "llama")

    def read(name: str) -> Tensor:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write(recipe, {layer.name: "F32" for layer in recipe.anatomy.layers}, tmp_path / "x.gguf", read)
    assert not list(tmp_path.glob("*.gguf*"))
