"""GGUF files as sources: every type, and what llama.cpp's converter does to tensors undone."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny_gguf
import tiny_models
from byte_tokenizer import tokenizer
from tersor.anatomy import WeightLoader, analyse, cache, open_source, skeleton
from tersor.anatomy.packed import gguf as reading
from tersor.anatomy.shards import map_tensor
from tersor.engines.llama_cpp.tokenizer import read_vocabulary
from tersor.engines.llama_cpp.write import Recipe
from tersor.engines.llama_cpp.write import write as write_gguf
from tersor.errors import BadInput, UnknownArchitecture

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

TYPES = [
    kind
    for kind in gguf.GGMLQuantizationType
    if kind.name not in ("F32", "F16", "BF16", "F64") and hasattr(gguf.quants, kind.name)
]
FAMILIES = {
    "llama": {},
    "llama-tied": {},
    # transformers gives these the widths of heads and experts and the number of positions that they usually have.
    "qwen3": {"head_dim": 128},
    "gpt2": {"n_positions": 1024},
    "gemma3": {"query_pre_attn_scalar": 8, "_sliding_window_pattern": 6},
    "qwen3moe": {"norm_topk_prob": True, "head_dim": 128, "moe_intermediate_size": 768},
}
WIDE = {"hidden_size": 64, "intermediate_size": 96}


def converted(folder, family, kind, **options):
    """A tiny model as our own writer makes a GGUF of it, matrices in ``kind``: the file, and the model's tensors."""
    folder.mkdir()
    model = tiny_models.build(family, **{**FAMILIES[family], **options})
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    model = model.to(dtype)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    source = open_source(folder)
    body = skeleton(source)
    anatomy = analyse(source, body)
    layers = {layer.name: layer for layer in anatomy.layers}
    loader = WeightLoader(source, body)

    def read(name):
        if name not in layers:
            return loader.load([name])[name]
        layer = layers[name]
        value = loader.load([layer.parameter])[layer.parameter]
        value = value.transpose(-1, -2) if layer.transposed else value
        value = value.reshape(layer.stored_shape).contiguous()
        if kind in ("F32", "F16", "BF16"):
            return value.view(torch.uint8)
        blocks = gguf.quants.quantize(value.float().numpy(), gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(blocks.view(np.uint8))

    file = folder.with_suffix(".gguf")
    vocabulary = read_vocabulary(folder, source.config.vocab_size)
    write_gguf(Recipe(anatomy, source.config, vocabulary, "tiny"), dict.fromkeys(layers, kind), file, read)
    return file, model.state_dict()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_come_back_as_they_were(family, kind, tmp_path):
    file, expected = converted(tmp_path / "model", family, kind)
    source = open_source(file, cache_dir=tmp_path / "cache")
    assert source.lossy_note is None
    model = skeleton(source)
    loader = WeightLoader(source, model)
    found = loader.load(list(expected))
    for name, tensor in expected.items():
        # Gemma's norms are stored with one added, in float32, which a float32 norm does not survive to the last bit.
        close = {"rtol": 0, "atol": 2e-7} if family == "gemma3" and kind == "F32" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found[name].float(), tensor.float(), **close, msg=name)
    assert found["lm_head.weight"].dtype == expected["lm_head.weight"].dtype
    assert source.config.dtype == expected["lm_head.weight"].dtype
    assert not [note for note in analyse(source, model).notes if "lost" in note]


@pytest.mark.parametrize(("kind", "dtype"), [("Q4_0", torch.bfloat16), ("Q8_0", torch.float16)])
@pytest.mark.parametrize("family", ["llama", "qwen3moe"])
def test_blocks_are_what_transformers_makes_of_them(family, kind, dtype, tmp_path):
    file, _ = converted(tmp_path / "model", family, kind, **WIDE)
    source = open_source(file, cache_dir=tmp_path / "cache")
    assert source.lossy_note == f"GGUF {kind}"
    note = analyse(source, skeleton(source)).notes[0]
    assert note == f"the source is GGUF {kind}: what it lost before is not counted"
    loader = WeightLoader(source, skeleton(source))
    for name, tensor in cache._read_gguf(file).state_dict().items():
        found = loader.load([name])[name]
        if tensor.ndim > 1 and "gate.weight" not in name:
            assert found.dtype == dtype, name
        assert torch.equal(found.to(torch.bfloat16), tensor) or dtype == torch.float16, name
        torch.testing.assert_close(found.to(torch.bfloat16), tensor, rtol=2**-7, atol=0, msg=name)


def stub(path, blocks, kinds, extra=()):
    """A llama of ``blocks`` blocks, 256 wide, all zeros but the up projections, whose blocks are random bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, blocks),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 256),
        (writer.add_feed_forward_length, 8),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 500000.0),
        (writer.add_vocab_size, 100),
    ):
        add(value)
    tiny_gguf._add_tokenizer(writer)
    zeros = {"attn_norm": (256,), "ffn_norm": (256,), "ffn_down": (256, 8), "ffn_gate": (8, 256)}
    zeros |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (256, 256))
    plain = {"token_embd": (100, 256), "output_norm": (256,)}
    plain |= {f"blk.{block}.{name}": shape for block in range(blocks) for name, shape in zeros.items()}
    for name, shape in plain.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, dtype=np.float16 if len(shape) > 1 else np.float32))
    draw = np.random.default_rng(0)
    stored = {}
    for block, kind in enumerate(kinds):
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        stored[block] = draw.integers(0, 256, (8, 256 // size * nbytes), dtype=np.uint8)
        writer.add_tensor(f"blk.{block}.ffn_up.weight", stored[block], raw_dtype=kind)
    for name, value in extra:
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def test_every_type_that_the_package_dequantizes(tmp_path, monkeypatch):
    assert len(TYPES) > 20
    stored = stub(tmp_path / "m.gguf", len(TYPES), TYPES)
    monkeypatch.setattr(reading, "_STRETCH", 600)  # so that rows are taken a few at a time
    source = open_source(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")
    with np.errstate(all="ignore"):
        for block, kind in enumerate(TYPES):
            expected = torch.from_numpy(gguf.dequantize(stored[block], kind))
            found = map_tensor(source.tensors[f"model.layers.{block}.mlp.up_proj.weight"])
            torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=0, equal_nan=True, msg=kind.name)


def test_types_that_it_does_not(tmp_path):
    extra = [("blk.0.ffn_up.weight", np.zeros((8, 256), dtype=np.int8))]
    stub(tmp_path / "m.gguf", 1, [], extra)
    with pytest.raises(BadInput, match=r"ffn_up\.weight .* has the type I8, which the installed package gguf cannot"):
        open_source(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def llama3(factor):
    """What ``rope_freqs`` holds for a Llama 3.1 with 64 frequencies, by the formula of its configuration."""
    values = []
    for i in range(64):
        wave = 2 * np.pi * 500000.0 ** (i / 64)
        if wave < 8192 / 4:
            values.append(1.0)
        elif wave > 8192:
            values.append(factor)
        else:
            smooth = (8192 / wave - 1) / 3
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_rotary_frequencies_reach_the_configuration(tmp_path, factor):
    up = ("blk.0.ffn_up.weight", np.zeros((8, 256), dtype=np.float16))
    stub(tmp_path / "m.gguf", 1, [], [up, ("rope_freqs.weight", llama3(factor))])
    source = open_source(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")
    model = skeleton(source)
    assert source.config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = 500000.0 ** -(torch.arange(64) / 64)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / torch.from_numpy(llama3(factor)))
    fates = {fate.name: fate.fate for fate in analyse(source, model).tensors}
    assert fates["rope_freqs.weight"] == "dropped"


def test_rotary_frequencies_that_cannot_be_said(tmp_path):
    up = ("blk.0.ffn_up.weight", np.zeros((8, 256), dtype=np.float16))
    stub(tmp_path / "m.gguf", 1, [], [up, ("rope_freqs.weight", llama3(8.0)[::-1].copy())])
    with pytest.raises(UnknownArchitecture, match="in a way that transformers cannot express"):
        open_source(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(("shape", "words"), [((256, 8), r"the shape \(8, 256\)"), ((9, 256), "gives 2304 numbers")])
def test_a_weight_of_the_wrong_shape(tmp_path, shape, words):
    stub(tmp_path / "m.gguf", 1, [], [("blk.0.ffn_up.weight", np.zeros(shape, dtype=np.float16))])
    with pytest.raises(UnknownArchitecture, match=words):
        open_source(tmp_path / "m.gguf", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_written_is_an_ordinary_folder(tmp_path):
    file = tiny_gguf.write(tmp_path / "m.gguf")
    source = open_source(file, cache_dir=tmp_path / "cache")
    assert source.path.parent == tmp_path / "cache"
    assert set(load_file(source.path / "model.safetensors")) == set(source.tensors)
    config = json.loads((source.path / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert not source.computed
