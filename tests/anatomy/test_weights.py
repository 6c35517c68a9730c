import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny_models
from tersor.anatomy import WeightLoader, open_source, skeleton, weights
from tersor.errors import CorruptArtifact


def loader_of(folder):
    source = open_source(folder)
    model = skeleton(source)
    return WeightLoader(source, model), model


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_parameters_are_exactly_those_that_transformers_loads(tiny, family):
    folder = tiny(family, shard="40KB")
    loader, model = loader_of(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert expected.keys() == model.state_dict().keys()
    loaded = loader.load(list(expected))
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert loader.unused == ()


def test_types_are_cast_only_when_asked_and_only_floating_ones(tiny):
    loader, _ = loader_of(tiny("qwen3moe", dtype=torch.bfloat16))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert loader.load([name])[name].dtype == torch.bfloat16
    assert loader.load([name], torch.float32)[name].dtype == torch.float32


def test_nothing_else_is_read(tiny, monkeypatch):
    read = []

    def counted(info):
        read.append(info.name)
        return original(info)

    original = weights.map_tensor
    monkeypatch.setattr(weights, "map_tensor", counted)
    loader, _ = loader_of(tiny("mixtral"))
    assert read == []
    loader.load(["model.layers.1.mlp.experts.down_proj", "model.norm.weight"])
    parts = [f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(4)]
    assert read == [*parts, "model.norm.weight"]


def test_both_names_of_a_tied_weight_can_be_asked_for(tiny):
    loader, _ = loader_of(tiny("llama-tied"))
    loaded = loader.load(["lm_head.weight", "model.embed_tokens.weight"])
    assert torch.equal(loaded["lm_head.weight"], loaded["model.embed_tokens.weight"])
    assert loader.provider("lm_head.weight") == "model.embed_tokens.weight"


def test_a_checkpoint_of_the_base_model_without_its_prefix(tiny, tmp_path):
    folder = tiny("llama-tied")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    loader, model = loader_of(tmp_path)
    whole, _ = loader_of(folder)
    names = list(model.state_dict())
    mine, theirs = loader.load(names), whole.load(names)
    assert all(torch.equal(mine[name], theirs[name]) for name in names)


def test_an_unknown_parameter_is_named(tiny):
    loader, _ = loader_of(tiny("llama"))
    with pytest.raises(CorruptArtifact, match=r"model\.layers\.9\.mlp"):
        loader.load(["model.layers.9.mlp.up_proj.weight"])


def test_the_file_is_never_changed_through_a_loaded_tensor(tiny):
    folder = tiny("llama")
    before = (folder / "model.safetensors").read_bytes()
    loader, _ = loader_of(folder)
    loader.load(["model.norm.weight"])["model.norm.weight"].zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert loader.load(["model.norm.weight"])["model.norm.weight"].abs().sum() > 0
