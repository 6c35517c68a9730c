"""Embeddings and heads in stretches of rows, in transformers, against plain models with the decoded weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tersor.errors import CorruptArtifact, ShapeMismatch
from tersor.runtime import packed as packed_module
from tersor.runtime.packed import PackedEmbedding, PackedLinear, TiedLinear
from tersor.runtime.products import decoded_only

EMBEDDING = "rows(7:fp16,8:int6:g16:asym:s8,64:int3:g16:s8,96:lut2:row)"
HEAD = "rows(50:int5:row,95:fp4:e2m1:g16:bf16,96:bf16)"
MakeFolder = Callable[..., "object"]


@pytest.fixture(autouse=True)
def _decoded() -> Iterator[None]:
    """Weights are decoded here, so that results are those of plain models but for the order of sums."""
    with decoded_only():
        yield


def choose(name: str) -> str:
    return {"embed_tokens": EMBEDDING, "wte": EMBEDDING, "lm_head": HEAD}.get(name.rpartition(".")[2], "int4:row")


def load(path: Path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def ids() -> torch.Tensor:
    """Every row of the embedding, in no order, and some again."""
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    return torch.cat([order, order[:32]]).view(4, 32)


@pytest.fixture(params=[None, 8 * 4 * 48], ids=["one tile", "tiles across stretches"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(packed_module, "TILE_BYTES", request.param)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_logits_are_those_of_the_plain_model(make_folder: MakeFolder, kind: str, ids: torch.Tensor) -> None:
    folder = make_folder(kind, choose)
    model = load(folder.path)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert str(embedding.codec) == EMBEDDING
    if kind == "qwen2":
        assert isinstance(head, PackedLinear)
        assert str(head.codec) == HEAD
    else:
        assert isinstance(head, TiedLinear)
        assert head.source is embedding
    torch.testing.assert_close(logits(model, ids), logits(folder.plain, ids), rtol=1e-5, atol=2e-6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids[:, :5], **options), folder.plain.generate(ids[:, :5], **options))


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_up_gives_the_rows_of_the_decoded_weight(
    make_folder: MakeFolder, dtype: torch.dtype, ids: torch.Tensor
) -> None:
    folder = make_folder("llama", choose, dtype=dtype)
    embedding, plain = load(folder.path).get_input_embeddings(), folder.plain.get_input_embeddings()
    for some in (ids, ids[:1, :1], torch.tensor([95, 0, 7, 7, 6, 8, 63, 64, 0]), torch.tensor([], dtype=torch.long)):
        found = embedding(some)
        assert found.dtype == dtype
        assert torch.equal(found, plain(some))
    for wrong in (96, -1):
        with pytest.raises(IndexError):
            embedding(torch.tensor([3, wrong]))
    assert torch.equal(embedding.dense(), plain.weight)
    assert torch.equal(embedding.dense(5, 70), plain.weight[5:70])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_and_parts_stay_as_stored(make_folder: MakeFolder, dtype: torch.dtype, ids: torch.Tensor) -> None:
    folder = make_folder("qwen2", choose)
    for model in (load(folder.path, dtype=dtype), load(folder.path).to(dtype)):
        state = model.state_dict()
        for name in (name for name in folder.tensors if "embed_tokens" in name or "lm_head" in name):
            assert state[name].dtype == folder.tensors[name].dtype
            assert torch.equal(state[name], folder.tensors[name])
        assert logits(model, ids).dtype == dtype


@pytest.mark.parametrize("shard", ["50GB", "5KB"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_saving_and_loading_again_changes_nothing(
    make_folder: MakeFolder, kind: str, shard: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    folder = make_folder(kind, choose)
    model = load(folder.path)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "5KB")
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert saved.keys() == folder.tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in folder.tensors.items())
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "tersor", "format": 1, "layers": folder.layers}
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(model, ids))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_dequantize_gives_the_plain_model(make_folder: MakeFolder, kind: str, ids: torch.Tensor) -> None:
    folder = make_folder(kind, choose)
    model = load(folder.path).dequantize()
    expected = folder.plain.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, ids), logits(folder.plain, ids))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (kind != "qwen2")


def test_stacked_experts_in_stretches(make_folder: MakeFolder, ids: torch.Tensor) -> None:
    def stacked(name: str) -> str:
        # 4 experts of 32 rows each: stretches that end inside an expert.
        return "rows(40:int4:row,128:int6:g16)" if name.endswith("down_proj") else "int4:row"

    folder = make_folder("mixtral", stacked)
    torch.testing.assert_close(logits(load(folder.path), ids), logits(folder.plain, ids), rtol=1e-5, atol=2e-6)


def test_gradients_reach_the_inputs_of_the_head(make_folder: MakeFolder, ids: torch.Tensor) -> None:
    folder = make_folder("llama", choose)
    grads = []
    for model in (load(folder.path), folder.plain):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.square().mean().backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_memory_is_that_of_the_file(make_folder: MakeFolder) -> None:
    folder = make_folder("qwen2", choose)
    stored = sum(tensor.nbytes for tensor in folder.tensors.values())
    assert load(folder.path).get_memory_footprint() - stored < 256  # rotary frequencies


def test_stretches_that_do_not_fit_are_refused_by_name(make_folder: MakeFolder) -> None:
    folder = make_folder("llama", choose)
    layer = "model.embed_tokens"

    def error_for(kind: type[Exception], text: str) -> str:
        folder.edit_config(lambda q: q["layers"].update({layer: text}))
        with pytest.raises(kind) as error:
            load(folder.path)
        return str(error.value)

    said = error_for(ShapeMismatch, EMBEDDING.replace("96:", "97:"))
    assert all(word in said for word in (layer, "97", "96"))
    said = error_for(CorruptArtifact, EMBEDDING.replace("7:fp16", "6:fp16"))
    assert all(word in said for word in (f"{layer}.s0_weight", "(6, 48)", "(7, 48)"))
    said = error_for(CorruptArtifact, "rows(7:fp16,96:lut2:row)")
    assert f"{layer}.s1_" in said
    folder.edit_config(lambda q: q["layers"].update({layer: EMBEDDING}))
    del folder.tensors[f"{layer}.s3_table"]
    folder.rewrite()
    with pytest.raises(CorruptArtifact, match=r"lacks.*s3_table"):
        load(folder.path)
