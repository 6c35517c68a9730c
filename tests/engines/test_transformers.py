"""Artifact folders in transformers, against plain models that hold the decoded weights."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from tersor.engines.transformers import TersorConfig, TersorQuantizer, register
from tersor.errors import BadInput, CorruptArtifact, ShapeMismatch, UnknownArchitecture
from tersor.runtime import packed as packed_module
from tersor.runtime.packed import Packed, PackedEmbedding, PackedExperts, PackedLinear, TiedLinear
from tersor.runtime.products import decoded_only

KINDS = ["llama", "qwen2", "gpt2", "gemma2", "gemma3", "mixtral", "qwen3_moe", "gpt_oss", "falcon"]
MakeFolder = Callable[..., "object"]


@pytest.fixture(autouse=True)
def _decoded() -> Iterator[None]:
    """Weights are decoded here, so that results are those of plain models but for the order of sums."""
    with decoded_only():
        yield


def load(path: Path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_model_computes_what_the_plain_one_does(
    make_folder: MakeFolder, kind: str, ids: torch.Tensor
) -> None:
    folder = make_folder(kind, "int4:g16" if kind != "qwen3_moe" else "int4:g8")
    model = load(folder.path)
    assert not model.training
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model, ids), logits(folder.plain, ids), rtol=1e-5, atol=2e-6)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), folder.plain.generate(ids, **options))
    kinds = {type(module) for module in model.modules()}
    assert not {torch.nn.Linear, torch.nn.Embedding, transformers.pytorch_utils.Conv1D} & {
        type(model.get_submodule(name)) for name in folder.layers
    }
    assert any(issubclass(one, PackedEmbedding) for one in kinds)
    assert (PackedExperts in kinds) == (kind in ("mixtral", "qwen3_moe", "gpt_oss"))


@pytest.mark.parametrize("codec", ["int3:row:asym:s8", "fp4:e2m1:g16:bf16", "fp8:e4m3:row", "lut3:row", "bf16", "fp16"])
def test_every_codec_runs(make_folder: MakeFolder, codec: str, ids: torch.Tensor) -> None:
    folder = make_folder("llama", codec)
    torch.testing.assert_close(logits(load(folder.path), ids), logits(folder.plain, ids), rtol=1e-5, atol=2e-6)


def test_mixed_codecs_and_layers_kept_plain(make_folder: MakeFolder, ids: torch.Tensor) -> None:
    def choose(name: str) -> str | None:
        return {"o_proj": None, "down_proj": "lut2:row", "lm_head": "bf16"}.get(name.rpartition(".")[2], "int5:g16")

    folder = make_folder("qwen2", choose)
    model = load(folder.path)
    torch.testing.assert_close(logits(model, ids), logits(folder.plain, ids), rtol=1e-5, atol=2e-6)
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    assert str(model.model.layers[0].mlp.down_proj.codec) == "lut2:row"


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize(
    "dtypes", itertools.product([torch.float32, torch.bfloat16], [torch.float32, torch.bfloat16, torch.float16, None])
)
def test_any_dtype_and_parts_stay_as_stored(
    make_folder: MakeFolder, kind: str, dtypes: tuple[torch.dtype, torch.dtype | None], ids: torch.Tensor
) -> None:
    stored, asked = dtypes
    folder = make_folder(kind, "int4:row:s8", dtype=stored)
    model = load(folder.path) if asked is None else load(folder.path, dtype=asked)
    asked = asked or stored
    assert model.dtype == asked
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[2] in ("codes", "scale", "super"):
            assert torch.equal(tensor, folder.tensors[name])
            assert tensor.dtype == folder.tensors[name].dtype
    got = logits(model, ids)
    assert got.dtype == asked
    folder.plain.save_pretrained(folder.path / "plain")
    plain = load(folder.path / "plain", dtype=asked, experts_implementation="eager")
    if stored in (torch.float32, asked):
        # Otherwise the plain file has lost what the packed one has not: its weights are rounded to bfloat16.
        torch.testing.assert_close(got, logits(plain, ids), rtol=1e-5, atol=2e-6)


def test_a_model_that_keeps_some_layers_in_float32(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder("llama", "int4:row", dtype=torch.bfloat16)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"q_proj", "norm"})
    model = load(folder.path)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.part("scale").dtype == torch.float16
    assert model.model.layers[0].self_attn.q_proj.part("codes").dtype == torch.uint8


def test_renaming_rules_for_original_checkpoints_leave_an_artifact_alone(
    make_folder: MakeFolder, ids: torch.Tensor
) -> None:
    folder = make_folder("llama")
    model = load(folder.path, key_mapping={r"mlp\.up_proj": "mlp.gate_proj"})
    torch.testing.assert_close(logits(model, ids), logits(folder.plain, ids), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_tied_head_shares_the_embedding(make_folder: MakeFolder, kind: str, ids: torch.Tensor) -> None:
    folder = make_folder(kind)
    model = load(folder.path)
    head = model.get_output_embeddings()
    assert isinstance(head, TiedLinear)
    assert head.source is model.get_input_embeddings()
    before = logits(model, ids)
    model.tie_weights()
    assert torch.equal(logits(model, ids), before)
    assert not [name for name in model.state_dict() if name.startswith("lm_head")]
    twin = copy.deepcopy(model)
    assert twin.get_output_embeddings().source is twin.get_input_embeddings()


def test_a_tied_head_of_a_kept_embedding(make_folder: MakeFolder, ids: torch.Tensor) -> None:
    folder = make_folder("llama", lambda name: None if "embed" in name else "int4:row")
    model = load(folder.path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model, ids), logits(folder.plain, ids), rtol=1e-5, atol=2e-6)


def test_a_head_of_its_own_although_the_config_ties_it(make_folder: MakeFolder, ids: torch.Tensor) -> None:
    folder = make_folder("qwen2")
    folder.plain.config.tie_word_embeddings = True
    folder.rewrite()
    model = load(folder.path)
    assert isinstance(model.lm_head, PackedLinear)
    torch.testing.assert_close(logits(model, ids), logits(folder.plain, ids), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "shard"), [*((kind, "50GB") for kind in KINDS), ("llama", "20KB"), ("mixtral", "20KB")]
)
def test_saving_and_loading_again_changes_nothing(
    make_folder: MakeFolder, kind: str, shard: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    folder = make_folder(kind, lambda name: "fp16" if "o_proj" in name else "int4:row", dtype=torch.bfloat16)
    model = load(folder.path)
    model.save_pretrained(tmp_path / "again", max_shard_size=shard)
    saved = {}
    for file in sorted((tmp_path / "again").glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            saved.update({name: content.get_tensor(name) for name in content.keys()})  # noqa: SIM118
    assert saved.keys() == folder.tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in folder.tensors.items())
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "tersor", "format": 1, "layers": folder.layers}
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(model, ids))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize_gives_the_plain_model(
    make_folder: MakeFolder, kind: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    folder = make_folder(kind)
    model = load(folder.path).dequantize()
    assert not any(isinstance(module, (Packed, TiedLinear)) for module in model.modules())
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in folder.plain.named_modules()
    }
    expected = folder.plain.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, ids), logits(folder.plain, ids))
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "plain"), ids), logits(folder.plain, ids))


def test_dequantize_in_another_dtype(make_folder: MakeFolder) -> None:
    model = load(make_folder("llama").path).dequantize(dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_whole_weight_never_exists(
    make_folder: MakeFolder, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder("mixtral")
    monkeypatch.setattr(packed_module, "TILE_BYTES", 8 * 4 * 32)
    largest = 0
    plain_decode = Packed.decode

    def decode(self: Packed, rows: slice | torch.Tensor) -> torch.Tensor:
        nonlocal largest
        result = plain_decode(self, rows)
        largest = max(largest, len(result))
        return result

    monkeypatch.setattr(Packed, "decode", decode)
    torch.testing.assert_close(logits(load(folder.path), ids), logits(folder.plain, ids), rtol=1e-5, atol=2e-6)
    assert largest == 8


def test_memory_is_that_of_the_file(make_folder: MakeFolder) -> None:
    folder = make_folder("llama", dtype=torch.bfloat16)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in folder.tensors.values())
    model = load(folder.path)
    assert model.get_memory_footprint() - stored < 256  # rotary frequencies


def test_gradients_reach_the_inputs(make_folder: MakeFolder, ids: torch.Tensor) -> None:
    folder = make_folder("mixtral")
    grads = []
    for model in (load(folder.path), folder.plain):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.square().mean().backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_base_model_loads_alone_and_saves(
    make_folder: MakeFolder, kind: str, ids: torch.Tensor, tmp_path: Path
) -> None:
    folder = make_folder(kind)
    model = AutoModel.from_pretrained(folder.path)
    with torch.no_grad():
        hidden = model(ids).last_hidden_state
        torch.testing.assert_close(hidden, folder.plain.base_model(ids).last_hidden_state, rtol=1e-5, atol=2e-6)
        model.save_pretrained(tmp_path / "base")
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "base")(ids).last_hidden_state, hidden)


def test_another_head_is_new_but_the_body_is_loaded(make_folder: MakeFolder) -> None:
    folder = make_folder("qwen2")
    model = AutoModelForSequenceClassification.from_pretrained(folder.path, num_labels=3)
    assert type(model.score) is torch.nn.Linear
    codes = model.model.layers[1].mlp.up_proj.part("codes")
    assert torch.equal(codes, folder.tensors["model.layers.1.mlp.up_proj.codes"])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_run_eagerly_and_say_so_otherwise(make_folder: MakeFolder, kind: str, ids: torch.Tensor) -> None:
    folder = make_folder(kind)
    model = load(folder.path, experts_implementation="grouped_mm")
    torch.testing.assert_close(logits(model, ids), logits(folder.plain, ids), rtol=1e-5, atol=2e-6)
    assert model.dequantize().config._experts_implementation == "grouped_mm"


# What bad input gets


def drop(name: str) -> Callable[[dict], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: torch.Tensor) -> Callable[[dict], object]:
    return lambda tensors: tensors.__setitem__(name, tensor)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop(f"{UP}.scale"), ["model.safetensors", "lacks", f"{UP}.scale"]),
        (drop(f"{UP}.codes"), ["lacks", f"{UP}.codes"]),
        (drop("model.norm.weight"), ["lacks", "model.norm.weight"]),
        (put(f"{UP}.codes", torch.zeros(64, 23, dtype=torch.uint8)), [f"{UP}.codes", "(64, 24)", "(64, 23)"]),
        (put(f"{UP}.scale", torch.ones(64, 1)), [f"{UP}.scale", "float16", "float32"]),
        (put(f"{UP}.zero", torch.ones(64, 1)), [f"{UP}.zero", "no place"]),
        (put("lm_head.weight", torch.ones(96, 48)), ["lm_head.weight", "no place"]),
        (put("model.norm.weight", torch.ones(47)), ["model.norm.weight", "(48,)", "(47,)"]),
    ],
)
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
def test_a_damaged_file_is_refused_by_name(
    make_folder: MakeFolder, damage: Callable[[dict], object], words: list[str], options: dict
) -> None:
    folder = make_folder("llama")
    damage(folder.tensors)
    folder.rewrite()
    with pytest.raises(CorruptArtifact) as error:
        load(folder.path, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(make_folder: MakeFolder, keep: float) -> None:
    file = make_folder("llama").path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors is truncated"):
        load(file.parent)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda q: q.update(format=2), BadInput, ["format 2", "format 1", "upgrade"]),
        (lambda q: q.update(extra=1), BadInput, ["unknown entry 'extra'"]),
        (lambda q: q.pop("layers"), BadInput, ["'layers'"]),
        (lambda q: q["layers"].update({UP: 4}), BadInput, ["'layers'"]),
        (lambda q: q["layers"].update({UP: "imt4:g16"}), BadInput, [UP, "imt4:g16", "Did you mean int4"]),
        (lambda q: q["layers"].update({UP: "int4:g31"}), ShapeMismatch, [UP, "31", "48"]),
        (lambda q: q["layers"].update({UP: "int5:row"}), CorruptArtifact, [f"{UP}.codes", "(64, 30)", "(64, 24)"]),
        (lambda q: q["layers"].pop(UP), CorruptArtifact, [f"{UP}.codes", "no place"]),
        (lambda q: q["layers"].update({"model.layers.7.mlp": "bf16"}), CorruptArtifact, ["model.layers.7.mlp"]),
        (lambda q: q["layers"].update({"model.norm": "bf16"}), CorruptArtifact, ["model.norm", "LlamaRMSNorm"]),
        (lambda q: q["layers"].update({"model.norm.weight": "bf16"}), CorruptArtifact, ["model.norm.weight", "(48,)"]),
    ],
)
def test_a_wrong_config_is_refused_with_a_sentence(
    make_folder: MakeFolder, change: Callable[[dict], None], kind: type[Exception], words: list[str]
) -> None:
    folder = make_folder("llama")
    folder.edit_config(change)
    with pytest.raises(kind) as error:
        load(folder.path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_weights_given_as_a_dictionary_are_checked_too(make_folder: MakeFolder, ids: torch.Tensor) -> None:
    folder = make_folder("llama")
    config = transformers.AutoConfig.from_pretrained(folder.path)
    given = dict(folder.tensors)
    model = transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=given)
    torch.testing.assert_close(logits(model, ids), logits(folder.plain, ids), rtol=1e-5, atol=2e-6)
    del given[f"{UP}.scale"]
    config = transformers.AutoConfig.from_pretrained(folder.path)
    with pytest.raises(CorruptArtifact, match=r"up_proj\.scale"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=given)


def test_pickled_weights_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("llama")
    (folder.path / "model.safetensors").unlink()
    torch.save(folder.tensors, folder.path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="not a safetensors file"):
        load(folder.path)


def test_a_plain_model_cannot_be_loaded_as_packed(make_folder: MakeFolder, tmp_path: Path) -> None:
    folder = make_folder("llama")
    folder.plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(BadInput, match="tersor compress"):
        load(tmp_path / "plain", quantization_config=TersorConfig(layers=folder.layers))


def test_a_weight_shared_with_something_else_is_refused(
    make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder("llama", lambda name: "int4:row" if "norm" not in name else None)
    tied = {"lm_head.weight": "model.embed_tokens.weight", "model.norm.weight": "model.embed_tokens.weight"}
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_tied_weights_keys", tied)
    with pytest.raises(UnknownArchitecture, match=r"LlamaRMSNorm 'model\.norm' shares"):
        load(folder.path)


def test_registering_is_idempotent() -> None:
    register()
    register()
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["tersor"] is TersorConfig
    assert AUTO_QUANTIZER_MAPPING["tersor"] is TersorQuantizer


def test_registering_changes_nothing_else_in_transformers_and_loads_no_model_code() -> None:
    program = """
import sys
import torch, transformers.quantizers.auto as auto
def state():
    modules = [sys.modules[n] for n in sorted(sys.modules) if n.split(".")[0] in ("transformers", "torch")]
    return {(m.__name__, k): id(v) for m in modules for k, v in vars(m).items() if not k.startswith("__")}
before, loaded, seed = state(), set(sys.modules), torch.initial_seed()
sizes = len(auto.AUTO_QUANTIZER_MAPPING), len(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
from tersor.engines.transformers import register
register()
after = state()
assert all(after[key] == value for key, value in before.items())
assert sizes == (len(auto.AUTO_QUANTIZER_MAPPING) - 1, len(auto.AUTO_QUANTIZATION_CONFIG_MAPPING) - 1)
assert torch.initial_seed() == seed
new = {name for name in set(sys.modules) - loaded if not name.startswith("tersor")}
assert not {name for name in new if "modeling" in name}, new
"""
    subprocess.run([sys.executable, "-c", program], check=True)
