"""Folders for vLLM, SGLang and transformers: bits as the library packs them, loaded by transformers, rules told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_runs
from tersor import api
from tersor.anatomy import Source, analyse, open_source, skeleton
from tersor.anatomy.shards import list_tensors
from tersor.artifact.layout import compute_layout
from tersor.codecs import parse
from tersor.contracts import Anatomy, Codec, Gram
from tersor.engines.compressed_tensors.engine import ENGINE, FolderTarget
from tersor.engines.compressed_tensors.files import Entry, file_bytes, write_files
from tersor.engines.compressed_tensors.forms import DENSE, FORMS, text_of
from tersor.engines.compressed_tensors.inputs import rounding
from tersor.engines.compressed_tensors.rules import refuses
from tersor.errors import BadInput, CorruptArtifact
from tersor.solvers import Encoder, Nearest
from tersor.stages.context import as_parameter

quantization = pytest.importorskip("compressed_tensors.quantization")
compressors = pytest.importorskip("compressed_tensors.compressors")

REACH = 3.7
"""The greatest magnitude of inputs that static scales are for."""
SETTINGS: dict[str, Any] = {**tiny_runs.SETTINGS, "eval_sequences": 2}


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    return partial(tiny_runs.wide_model, tmp_path)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    return {"text": tiny_runs.text(tmp_path / "text.txt"), "cache_dir": tmp_path / "cache", **SETTINGS}


def opened(folder: Path) -> tuple[Source, Anatomy, FolderTarget]:
    source = open_source(folder)
    anatomy = analyse(source, skeleton(source))
    target = ENGINE.open(source, anatomy)
    assert isinstance(target, FolderTarget)
    return source, anatomy, target


def weight_of(rows: int, columns: int) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * 0.05
    weight[1] = 0
    return weight


@pytest.mark.parametrize("text", sorted(FORMS))
@pytest.mark.parametrize("shape", [(24, 256), (20, 384)])
class TestForms:
    def test_the_library_reads_what_we_store(self, text: str, shape: tuple[int, int]) -> None:
        """Its own decompressor gives our values, and its own compressor gives our bits from them."""
        form = FORMS[text]
        parts, values = Encoder(Nearest())(weight_of(*shape), form.codec, Gram(torch.eye(shape[1]), 1, reach=REACH))
        stored = form.put(parts, shape)
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()} == form.spec(shape)
        back = form.get(stored, shape)
        assert back.keys() == parts.keys()
        assert all(back[name].equal(tensor) for name, tensor in parts.items())

        scheme = quantization.QuantizationScheme(targets=["Linear"], format=form.format, **form.scheme())
        compressor = compressors.BaseCompressor.get_value_from_registry(form.format)
        wide = {
            name: tensor.float() if name == "weight_scale" and tensor.dtype == torch.bfloat16 else tensor
            for name, tensor in stored.items()
        }
        plain = compressor.decompress(wide, scheme)
        assert torch.equal(plain["weight"].float(), values)

        scale = plain["weight_scale"].float()
        if text.startswith("mxfp4"):
            scale = torch.ldexp(torch.ones(scale.shape), parts["exponent"].int() - 127)
        given = {"weight": values, "weight_scale": scale}
        if "weight_global_scale" in stored:
            given["weight_global_scale"] = stored["weight_global_scale"]
        if "input_scale" in stored:
            given["input_scale"] = stored["input_scale"]
        if "weight_zero_point" in plain:
            given["weight_zero_point"] = plain["weight_zero_point"]
        again = compressor.compress(given, scheme)
        assert set(stored) == set(again)
        for name in stored.keys() - {"weight_scale"}:
            assert again[name].dtype == stored[name].dtype
            ours, theirs = (
                tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)
                for tensor in (stored[name], again[name])
            )
            assert torch.equal(ours, theirs), name

    def test_schemes_are_told_apart(self, text: str, shape: tuple[int, int]) -> None:
        form = FORMS[text]
        scheme = quantization.QuantizationScheme(targets=["x"], format=form.format, **form.scheme())
        assert text_of(scheme.model_dump(mode="json")) == text
        read = quantization.QuantizationScheme.model_validate(scheme.model_dump(mode="json", exclude_unset=True))
        assert text_of(read.model_dump(mode="json")) == text


def test_targets_are_read_as_the_library_reads_them(model: Callable[..., Path], tmp_path: Path) -> None:
    """Folders of other tools name classes and patterns, and the order in which they rounded columns."""
    written(model(), tmp_path / "out", ["sint4:g64:bf16"])
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    settings = config["quantization_config"]
    (group,) = settings["config_groups"].values()
    group["weights"]["actorder"] = "static"
    target = opened(tmp_path / "model-llama")[2]
    expected = target.stored(tmp_path / "out").texts
    for targets in (["Linear"], [r"re:.*_proj$"]):
        group["targets"], settings["ignore"] = targets, ["lm_head"]
        path.write_text(json.dumps(config))
        assert target.stored(tmp_path / "out").texts == expected
    settings["ignore"] = ["re:.*"]
    path.write_text(json.dumps(config))
    with pytest.raises(CorruptArtifact, match=r"q_proj.weight' must be torch.bfloat16"):
        target.stored(tmp_path / "out")
    settings["ignore"] = ["re:("]
    path.write_text(json.dumps(config))
    with pytest.raises(CorruptArtifact, match=r"the target 're:\(' is no pattern"):
        target.stored(tmp_path / "out")
    settings["ignore"] = []
    group["weights"]["num_bits"] = 3
    path.write_text(json.dumps(config))
    with pytest.raises(BadInput, match="a scheme that tersor does not read; it reads sint4"):
        target.stored(tmp_path / "out")
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "compressed-tensors"}}))
    with pytest.raises(CorruptArtifact, match="no configuration of compressed-tensors"):
        target.stored(tmp_path / "out")


def test_a_head_that_the_class_would_tie_stays_its_own(model: Callable[..., Path], tmp_path: Path) -> None:
    """Gemma's head is its embedding unless the configuration says otherwise, even where files hold another."""
    folder = model("gemma2")
    tensors = load_file(folder / "model.safetensors")
    head = torch.flip(tensors["model.embed_tokens.weight"], (0,))
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "tie_word_embeddings"})
    )
    written(folder, tmp_path / "out", ["sint4:g64:bf16"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head)


@pytest.mark.parametrize("limit", [10**9, 400, 1])
def test_sizes_of_files_are_exact(limit: int, tmp_path: Path) -> None:
    entries = [
        Entry("b.weight_shape", torch.int64, (2,)),
        Entry("a.weight", torch.int8, (3, 5)),
        Entry("naïve.scale", torch.bfloat16, (7, 1)),
        Entry("c", torch.float32, (11,)),
    ]
    values = {
        entry.name: torch.arange(math.prod(entry.shape)).to(entry.dtype).reshape(entry.shape) for entry in entries
    }
    write_files(tmp_path, entries, lambda entry: values[entry.name], limit)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == file_bytes(entries, limit)
    found = list_tensors(tmp_path)
    assert {name: (info.dtype, info.shape) for name, info in found.items()} == {
        entry.name: (entry.dtype, entry.shape) for entry in entries
    }
    for path in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert torch.equal(tensor, values[name])
    with pytest.raises(ValueError, match="expected"):
        write_files(tmp_path, entries, lambda _: torch.zeros(1), limit)


@pytest.mark.parametrize("shard", [10**9, 500_000, 300_000, 100_000])
def test_a_folder_takes_at_most_so_much_more_than_an_artifact(shard: int, model: Callable[..., Path]) -> None:
    """Whatever codecs the layers get, and in however many files they lie."""
    _, anatomy, target = opened(model())
    target = replace(target, shard=shard)

    def artifact_bytes(texts: Mapping[str, str]) -> int:
        parts = {layer.name: parse(texts[layer.name]).parts(layer.stored_shape) for layer in anatomy.layers}
        named = {f"{name}.{part.name}": (part.dtype, part.shape) for name, found in parts.items() for part in found}
        return compute_layout({**named, **anatomy.kept}, max_shard_size=shard).total_bytes

    most = target.overhead(artifact_bytes({layer.name: DENSE for layer in anatomy.layers}))
    for texts in [*([text] for text in FORMS), sorted(FORMS)]:
        chosen = {name: str(codec) for name, codec in mixed(anatomy, texts).items()}
        assert target.file_bytes(chosen) <= artifact_bytes(chosen) + most, (shard, texts)


@pytest.mark.parametrize(
    ("name", "shape", "text", "ranks", "why"),
    [
        ("q_proj", (60, 128), "sint4:g64:bf16", 8, "its 60 outputs cannot be split over 8 processors"),
        ("o_proj", (60, 132), "sint8:row:bf16", 8, "its 132 inputs cannot be split over 8 processors"),
        (
            "o_proj",
            (60, 256),
            "sint4:g128:bf16",
            4,
            "its 256 inputs split over 4 processors leave 64 each, which groups",
        ),
        ("q_proj", (60, 192), "sint4:g128:bf16", 4, "groups of 128 do not divide its 192 inputs"),
        ("q_proj", (60, 132), "sint4:row:bf16", 1, "words of 8 codes do not divide its 132 inputs"),
        ("o_proj", (60, 144), "sint4:row:bf16", 4, "its 144 inputs split over 4 processors leave 36 each, which words"),
        ("q_proj", (60, 128), "int4:g64:asym:bf16", 1, "words of 8 zero points do not divide its 60 outputs"),
        ("q_proj", (144, 128), "int4:g64:asym:bf16", 4, "its 144 outputs split over 4 processors leave 36 each"),
    ],
)
def test_every_rule_has_its_sentence(
    name: str, shape: tuple[int, int], text: str, ranks: int, why: str, model: Callable[..., Path]
) -> None:
    _, anatomy, _ = opened(model())
    layer = replace(next(one for one in anatomy.layers if one.name.endswith(name)), shape=shape)
    said = refuses(anatomy, layer, parse(text), ranks)
    assert said is not None
    assert said.startswith(why)
    able = replace(layer, shape=(256, 1024))
    assert refuses(anatomy, able, parse(text), min(ranks, 2)) is None


def mixed(anatomy: Anatomy, texts: list[str]) -> dict[str, Codec]:
    """Codecs by layer: each of ``texts`` somewhere, layers that are fused alike."""
    codecs, turn = {}, {}
    for layer in anatomy.layers:
        key = ENGINE.together(layer) or layer.name
        able = [text for text in texts if refuses(anatomy, layer, parse(text), 1) is None]
        turn.setdefault(key, able[len(turn) % len(able)] if able else DENSE)
        codecs[layer.name] = parse(turn[key])
    return codecs


def written(folder: Path, output: Path, texts: list[str]) -> tuple[FolderTarget, dict[str, dict[str, torch.Tensor]]]:
    """A folder with these codecs, rounded to nearest; what each layer stores."""
    from tersor.anatomy import WeightLoader

    source, anatomy, target = opened(folder)
    loader = WeightLoader(source, skeleton(source))
    codecs = mixed(anatomy, texts)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for layer in anatomy.layers:
        weight = loader.load([layer.parameter])[layer.parameter].float()
        weight = (weight.transpose(-1, -2) if layer.transposed else weight).reshape(layer.stored_shape)
        gram = Gram(torch.eye(layer.shape[1]), 1, reach=REACH)
        parts[layer.name] = Encoder(Nearest())(weight, codecs[layer.name], gram)[0]

    def read(name: str) -> Any:
        return parts[name] if name in parts else loader.load([name])[name]

    target.write(codecs, output, read)
    assert sum(path.stat().st_size for path in output.glob("*.safetensors")) == target.file_bytes(
        {name: str(codec) for name, codec in codecs.items()}
    )
    stored = target.stored(output)
    assert stored.texts == {name: str(codec) for name, codec in codecs.items()}
    for layer in anatomy.layers:
        for name, tensor in stored.tensors(layer, codecs[layer.name]).items():
            assert torch.equal(tensor, parts[layer.name][name])
    return target, parts


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma2"])
def test_stock_transformers_computes_what_we_decode(family: str, model: Callable[..., Path], tmp_path: Path) -> None:
    check_run(model(family), tmp_path / "out", ["sint4:g64:bf16", "sint8:row:bf16", "nvfp4:s9", "mxfp4:e2m1:g32"])


@pytest.mark.parametrize(("family", "options"), [("qwen2moe", {"moe_intermediate_size": 64}), ("mixtral", {})])
def test_stock_transformers_stacks_packed_experts(
    family: str, options: dict[str, int], model: Callable[..., Path], tmp_path: Path
) -> None:
    """Under the names of the source's files, which are vLLM's too; experts of one scheme, other layers of others."""
    check_run(model(family, **options), tmp_path / "out", ["sint4:g32:bf16", "sint8:row:bf16"])
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    down = {"qwen2moe": "mlp.experts.3.down_proj", "mixtral": "block_sparse_moe.experts.3.w2"}[family]
    assert {name for name in names if down in name and ".layers.1." in name} == {
        f"model.layers.1.{down}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")
    }
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [group["targets"] for group in settings["config_groups"].values()]
    (experts,) = (one for one in targets if any("experts" in name and "shared" not in name for name in one))
    assert len(experts) == 3
    assert all(name.startswith("re:") and name.endswith("$") for name in experts)


def test_zero_points_are_read_by_the_library(model: Callable[..., Path], tmp_path: Path) -> None:
    check_run(model(), tmp_path / "out", ["int4:g32:asym:bf16", "sint4:g64:bf16", "int4:row:asym:bf16"])


def both(folder: Path, output: Path, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a folder with these codecs, run by transformers, and of a plain model with our decoded weights."""
    target, parts = written(folder, output, texts)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state = plain.state_dict()
    for layer in target.anatomy.layers:
        if layer.kind in ("linear", "experts") and layer.block is not None:
            text = target.stored(output).texts[layer.name]
            decoded = parse(text).decode(parts[layer.name], layer.stored_shape)
            if layer.kind == "experts":
                decoded = decoded.bfloat16()  # transformers unpacks experts in the type of their scales
            state[layer.parameter].copy_(as_parameter(decoded, layer))
    ids = torch.randint(3, 100, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = plain(ids).logits[0]
    with ENGINE.run(output, 24, 1) as running:
        found = running.logits(ids[0].tolist())
        assert torch.equal(found, running.logits(ids[0].tolist()))
    return found, wanted


def check_run(folder: Path, output: Path, texts: list[str]) -> None:
    found, wanted = both(folder, output, texts)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.std())


@pytest.mark.parametrize(
    ("text", "noise"), [("sint8:row:bf16:a8", 0.06), ("sint8:row:bf16:a8s", 0.3), ("fp8:e4m3:row:bf16", 0.2)]
)
def test_inputs_are_rounded_as_it_runs(text: str, noise: float, model: Callable[..., Path], tmp_path: Path) -> None:
    """What the engine adds to the loss of weights: the more, the coarser it rounds inputs; and it does round them."""
    found, wanted = both(model(), tmp_path / "out", [text])
    assert 1e-3 < float((found - wanted).std() / wanted.std()) < noise


@pytest.mark.parametrize("text", ["sint8:row:bf16:a8", "sint8:row:bf16:a8s", "fp8:e4m3:row:bf16"])
def test_what_rounding_inputs_does_is_predicted(text: str, model: Callable[..., Path], tmp_path: Path) -> None:
    """The library's own rounding of inputs, layer by layer, is ours to the bit."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    form = FORMS[text]
    parts, _ = Encoder(Nearest())(weight_of(24, 128), form.codec, Gram(torch.eye(128), 1, reach=REACH))
    linear = torch.nn.Linear(128, 24, bias=False)
    scheme = quantization.QuantizationScheme(targets=["Linear"], format=form.format, **form.scheme())
    quantization.initialize_module_for_quantization(linear, scheme)
    if "input_scale" in parts:
        linear.input_scale.data = parts["input_scale"].float()
    inputs = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(1)) * 2
    inputs[0, 3] = 0
    ours = rounding(form.codec, lambda: parts)
    assert ours is not None
    theirs = forward_quantize(linear, inputs, "input", scheme.input_activations)
    assert torch.equal(ours(inputs), theirs)
    assert not torch.equal(inputs, theirs)


def test_layers_of_one_input_share_its_scale(model: Callable[..., Path], given: dict[str, Any], tmp_path: Path) -> None:
    """Whole run: scales from calibration, loaded by transformers alone, logits as predicted."""
    source = model()
    done = api.compress_for(
        ENGINE.name, source, tmp_path / "out", size=10**7, candidates=["sint8:row:bf16:a8s"], **given
    )
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = {name.removesuffix(".input_scale"): one for name, one in tensors.items() if name.endswith("input_scale")}
    _, anatomy, _ = opened(source)
    layers = [layer for layer in anatomy.layers if layer.kind == "linear" and layer.block is not None]
    assert scales.keys() == {layer.name for layer in layers}
    by_input: dict[str, set[float]] = {}
    for layer in layers:
        by_input.setdefault(layer.inputs, set()).add(float(scales[layer.name]))
    assert all(len(found) == 1 and found.pop() > 0 for found in by_input.values())
    assert len({float(one) for one in scales.values()}) > len(by_input) // 2
    proof = done.proof
    assert proof is not None
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "dynamic": False,
        "strategy": "tensor",
        "symmetric": True,
    }
    assert proof.noise < 1e-3 * proof.ours.kl
    assert proof.ours.kl == pytest.approx(proof.engine.kl, rel=0.02)


def test_inputs_of_unknown_size_are_refused() -> None:
    form = FORMS["sint8:row:bf16:a8s"]
    parts, _ = Encoder(Nearest())(weight_of(24, 128), form.codec, None)
    with pytest.raises(BadInput, match="no calibration text reached one; give more --text, or use sint8:row:bf16:a8,"):
        form.put(parts, (24, 128))
