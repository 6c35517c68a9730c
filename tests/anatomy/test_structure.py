import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import tiny_models
from tersor.anatomy import analyse, open_source, skeleton
from tersor.anatomy.layers import find_blocks, find_layers
from tersor.errors import CorruptArtifact, ShapeMismatch, UnknownArchitecture


def look(folder):
    source = open_source(folder)
    model = skeleton(source)
    return source, model, analyse(source, model)


def groups(anatomy, block, key):
    """Layers of a block that share ``key``, as sets of short names, in the order of computation."""
    found: dict[str, list[str]] = {}
    for layer in anatomy.layers_of(block):
        found.setdefault(getattr(layer, key) or f"alone {layer.name}", []).append(layer.name.rsplit(".", 1)[1])
    return [set(names) for names in found.values()]


def sets(lines):
    return [set(line.split()) for line in lines]


GATED = ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]
INPUTS = {
    "llama": GATED,
    "llama-tied": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "mistral": GATED,
    "gemma2": GATED,
    "gemma3": GATED,
    "olmo2": GATED,
    "stablelm": GATED,
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "opt": ["q_proj k_proj v_proj", "out_proj", "fc1", "fc2"],
    "neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gptj": ["q_proj k_proj v_proj fc_in", "out_proj", "fc_out"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "mixtral": ["q_proj k_proj v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "qwen3moe": ["q_proj k_proj v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gptoss": ["q_proj k_proj v_proj", "o_proj", "gate_up_proj", "down_proj"],
    "qwen2moe": [
        "q_proj k_proj v_proj",
        "o_proj",
        "gate_proj up_proj",
        "down_proj",
        "gate_up_proj",
        "down_proj",
    ],
    "deepseek": [
        "q_a_proj kv_a_proj_with_mqa",
        "q_b_proj",
        "kv_b_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
        "gate_proj up_proj",
        "down_proj",
    ],
}
TIED = {"llama-tied", "gemma2", "gemma3", "gpt2", "opt", "falcon", "bloom"}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_tensor_is_accounted_for(tiny, family):
    source, model, anatomy = look(tiny(family))
    assert [fate.name for fate in anatomy.tensors] == list(source.tensors)
    assert all(fate.reason or fate.fate == "encoded" for fate in anatomy.tensors)
    layers = {layer.parameter for layer in anatomy.layers}
    assert {fate.target for fate in anatomy.tensors if fate.fate == "encoded"} == layers
    assert {fate.target for fate in anatomy.tensors if fate.fate == "kept"} == set(anatomy.kept)
    aliases = {name for layer in anatomy.layers for name in layer.tied}
    assert not layers & set(anatomy.kept)
    assert layers | set(anatomy.kept) | aliases == set(model.state_dict())
    real = AutoModelForCausalLM.from_pretrained(source.path)
    persistent = {id(tensor): tensor for tensor in real.state_dict(keep_vars=True).values()}
    assert anatomy.parameters == sum(tensor.numel() for tensor in persistent.values())
    assert anatomy.source_bytes == sum(info.nbytes for info in source.tensors.values())
    assert {dtype for dtype, _ in anatomy.kept.values() if dtype.is_floating_point} <= {torch.float32}
    assert all(tensor.is_meta for tensor in model.parameters())
    assert not model.training


@pytest.mark.parametrize("family", [*INPUTS, "falcon"])
def test_layers_groups_and_ties(tiny, family):
    _, _, anatomy = look(tiny(family))
    assert len(anatomy.blocks) == (3 if family == "llama" else 2)
    if family in INPUTS:
        assert groups(anatomy, len(anatomy.blocks) - 1, "inputs") == sets(INPUTS[family])
    assert anatomy.layers[0].name == anatomy.embedding
    assert anatomy.layers[0].kind == "embedding"
    assert (anatomy.head == anatomy.embedding) == (family in TIED)
    assert anatomy.layers[0].tied == (("lm_head.weight",) if family in TIED else ())
    if family not in TIED:
        assert anatomy.layers[-1].name == anatomy.head
    blocks = [layer.block for layer in anatomy.layers if layer.block is not None]
    assert blocks == sorted(blocks)


def test_fused_groups_have_one_parent(tiny):
    _, _, llama = look(tiny("llama"))
    assert groups(llama, 0, "fused") == sets(GATED)
    _, _, gptj = look(tiny("gptj"))
    assert groups(gptj, 0, "fused") == sets(["q_proj k_proj v_proj", "out_proj", "fc_in", "fc_out"])
    _, _, phi3 = look(tiny("phi3"))
    assert all(layer.fused is None for layer in phi3.layers)


def test_orientation_of_conv1d_and_experts(tiny):
    _, _, gpt2 = look(tiny("gpt2"))
    attention = next(layer for layer in gpt2.layers if layer.name.endswith("c_attn"))
    assert (attention.kind, attention.shape, attention.transposed) == ("conv1d", (96, 32), True)
    for family, transposed, width in (("mixtral", False, 48), ("gptoss", True, 48), ("qwen3moe", False, 24)):
        _, _, anatomy = look(tiny(family))
        gate_up, down = [layer for layer in anatomy.layers_of(0) if layer.kind == "experts"]
        assert (gate_up.shape, gate_up.copies, gate_up.transposed) == ((2 * width, 32), 4, transposed)
        assert (down.shape, down.copies, down.transposed) == ((32, width), 4, transposed)
        assert gate_up.name == gate_up.parameter == "model.layers.0.mlp.experts.gate_up_proj"
        assert gate_up.stored_shape == (4 * 2 * width, 32)


def test_routers_and_odd_parts_are_kept_with_a_reason(tiny):
    _, _, anatomy = look(tiny("qwen2moe"))
    reasons = {fate.target: fate.reason for fate in anatomy.tensors}
    assert reasons["model.layers.0.mlp.gate.weight"] == "router of a mixture of experts"
    assert reasons["model.layers.0.mlp.shared_expert_gate.weight"] == "router of a mixture of experts"
    _, _, opt = look(tiny("opt"))
    assert any("project_in.weight" in note and "outside the blocks" in note for note in opt.notes)
    assert {"model.decoder.project_in.weight", "model.decoder.embed_positions.weight"} <= set(opt.kept)


def test_sharded_files_give_the_same_anatomy(tiny):
    whole, sharded = (look(tiny("qwen3moe", shard=shard))[2] for shard in ("1GB", "20KB"))
    assert len(list(tiny("qwen3moe", shard="20KB").glob("*.safetensors"))) > 3
    assert whole.layers == sharded.layers
    assert whole.kept == sharded.kept
    assert sorted(whole.tensors, key=str) == sorted(sharded.tensors, key=str)


def rewrite(folder, target, change):
    """A copy of a model folder with its tensors changed by ``change(dict)``."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_duplicate_of_the_tied_head_is_tied_and_old_buffers_are_dropped(tiny, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.mtp.proj.weight"] = torch.ones(2, 2)

    _, model, anatomy = look(rewrite(tiny("llama-tied"), tmp_path / "m", change))
    fates = {fate.name: fate for fate in anatomy.tensors}
    assert fates["lm_head.weight"].fate == "tied"
    assert fates["lm_head.weight"].target == "model.embed_tokens.weight"
    assert fates["model.layers.0.self_attn.rotary_emb.inv_freq"].fate == "dropped"
    assert "computes itself" in fates["model.layers.0.self_attn.rotary_emb.inv_freq"].reason
    assert "tokens ahead" in fates["model.mtp.proj.weight"].reason
    assert [note for note in anatomy.notes if "not used" in note] == [
        "1 tensors (16 bytes) of the source are not used by LlamaForCausalLM, first model.mtp.proj.weight"
    ]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_said_to_be_tied_but_different_is_a_layer_of_its_own(tiny, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    _, model, anatomy = look(rewrite(tiny("llama-tied"), tmp_path / "m", change))
    assert (anatomy.embedding, anatomy.head) == ("model.embed_tokens", "lm_head")
    assert model.config.tie_word_embeddings is False


def test_only_the_head_of_a_tied_pair_in_the_files(tiny, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    _, _, anatomy = look(rewrite(tiny("llama-tied"), tmp_path / "m", change))
    assert anatomy.layers[0].parameter == "model.embed_tokens.weight"
    assert {fate.name: fate.fate for fate in anatomy.tensors}["lm_head.weight"] == "encoded"


def test_missing_and_misshapen_tensors_are_named(tiny, tmp_path):
    folder = rewrite(tiny("llama"), tmp_path / "a", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CorruptArtifact, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        look(folder)
    folder = rewrite(tiny("llama"), tmp_path / "b", lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(ShapeMismatch, match=r"model\.norm\.weight.*\(31,\).*\(32,\)"):
        look(folder)
    one = "model.layers.0.mlp.experts.2.down_proj.weight"
    folder = rewrite(tiny("qwen3moe"), tmp_path / "c", lambda t: t.pop(one))
    with pytest.raises(ShapeMismatch, match=r"experts\.down_proj"):
        look(folder)
    gate = "model.layers.0.mlp.experts.2.gate_proj.weight"
    folder = rewrite(tiny("qwen3moe"), tmp_path / "d", lambda t: t.update({gate: torch.ones(3, 5)}))
    with pytest.raises(CorruptArtifact, match=r"experts\.gate_up_proj cannot be put together"):
        look(folder)


class Doubled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


def test_a_linear_that_does_more_than_multiply_is_kept(tiny):
    model = skeleton(open_source(tiny("llama")))
    model.model.layers[1].mlp.up_proj.__class__ = Doubled
    found = find_layers(model)
    assert "Doubled" in found.reasons["model.layers.1.mlp.up_proj.weight"]
    assert any("up_proj.weight" in note for note in found.notes)


def test_a_model_without_blocks_is_not_understood():
    with pytest.raises(UnknownArchitecture, match="No list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)])))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gptj", "gptoss"])
def test_computed_buffers_are_those_of_a_loaded_model(tiny, family):
    folder = tiny(family)
    real = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found = dict(skeleton(open_source(folder)).named_buffers())
    expected = dict(real.named_buffers())
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        if not found[name].is_meta:
            assert found[name].dtype == buffer.dtype
            assert torch.equal(found[name], buffer), name


def test_the_source_configuration_is_not_changed(tiny):
    source = open_source(tiny("mixtral"))
    before = json.dumps(source.config.to_dict(), default=str)
    model = skeleton(source)
    assert json.dumps(source.config.to_dict(), default=str) == before
    assert model.config.dtype == torch.float32
