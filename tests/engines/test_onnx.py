"""ONNX folders: our codes bit for bit, ONNX Runtime's logits, exact sizes, rules in a sentence, damaged files."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import tiny_models
import tiny_runs
from tersor import api
from tersor.anatomy import Source, WeightLoader, analyse, open_source, skeleton
from tersor.cli import app
from tersor.codecs import parse
from tersor.codecs.packing import unpack
from tersor.contracts import Anatomy, Codec, Layer, LeafCodec
from tersor.engines.onnx import graph
from tersor.engines.onnx.build import DATA, ENGINE, LAYERS
from tersor.engines.onnx.engine import ONNX, ONNX_QDQ
from tersor.engines.onnx.files import MODEL
from tersor.engines.onnx.layout import grid_of, put_together, take_apart
from tersor.engines.onnx.operators import NBits, Qdq
from tersor.engines.table import engine_of
from tersor.errors import BadInput, CorruptArtifact, EngineFailed, Infeasible
from tersor.solvers import Nearest
from tersor.stages.allocate import artifact_layout, dense_layout
from tersor.stages.context import as_parameter, silent
from tersor.stages.prove import prove_file

NOISE = 2e-5
"""How far logits of about 1 may differ where both sides compute in float32."""
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_layer": 2},
    "qwen2moe": {"hidden_size": 64, "num_hidden_layers": 1, "moe_intermediate_size": 32},
    "gptoss": {"intermediate_size": 32},
}
PLAIN = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


@dataclass
class Model:
    """A tiny model with rounded layers. ``plain`` has the weights that ``tensors`` decode to."""

    source: Source
    anatomy: Anatomy
    plain: Any
    codecs: dict[str, Codec]
    tensors: dict[str, dict[str, Tensor]]
    kept: dict[str, Tensor]

    def read(self, name: str) -> Tensor | Mapping[str, Tensor]:
        return self.tensors[name] if name in self.tensors else self.kept[name]


@pytest.fixture(scope="module", autouse=True)
def _graphs_are_kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each family's graph is exported once for all tests here, and not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("graphs")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def make(family: str) -> Path:
        path = tmp_path_factory.mktemp(family)
        tiny_models.build(family, **SHAPES.get(family, PLAIN)).save_pretrained(path)
        return tiny_runs.with_tokenizer(path, tmp_path_factory.mktemp(f"{family}-complete"))

    return make


@pytest.fixture(scope="module")
def rounded(folder: Callable[[str], Path]) -> Callable[..., Model]:
    """``rounded(family, engine, text, …)``: layers get the given codecs in turn; bf16 where one is refused."""

    def make(family: str, engine: Any, *texts: str) -> Model:
        source = open_source(folder(family))
        body = skeleton(source)
        anatomy = analyse(source, body)
        loader = WeightLoader(source, body)
        plain = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
        state = plain.state_dict()
        made = Model(source, anatomy, plain, {}, {}, {name: loader.load([name])[name] for name in anatomy.kept})
        for at, layer in enumerate(anatomy.layers):
            codec = parse(texts[at % len(texts)])
            if not codec.accepts(layer.stored_shape) or engine.refuses(anatomy, layer, codec, 1):
                codec = parse("bf16")
            weight = _stacked(loader.load([layer.parameter])[layer.parameter].float(), layer)
            stored = (
                codec.pack(Nearest().solve(weight, codec, None), layer.stored_shape)
                if isinstance(codec, LeafCodec)
                else codec.encode(weight)  # type: ignore[attr-defined]
            )
            decoded = as_parameter(codec.decode(stored, layer.stored_shape), layer)
            for name in (layer.parameter, *layer.tied):
                state[name].copy_(decoded)
            made.codecs[layer.name], made.tensors[layer.name] = codec, stored
        return made

    return make


def _stacked(parameter: Tensor, layer: Layer) -> Tensor:
    return (parameter.transpose(-1, -2) if layer.transposed else parameter).reshape(layer.stored_shape).contiguous()


def _texts(model: Model) -> dict[str, str]:
    return {name: str(codec) for name, codec in model.codecs.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "engine", "texts"),
    [
        ("llama-tied", ONNX, ("int4:g16:asym", "sint2:g32", "sint8:g32:bf16", "int4:g32", "fp16")),
        ("llama-tied", ONNX_QDQ, ("sint8:g32", "int8:row:asym")),
        ("qwen2", ONNX, ("q4_0", "int8:g16:asym", "sint4:g32", "int2:g16:asym", "q8_0")),
        ("qwen2", ONNX_QDQ, ("int8:row:asym", "int8:g16:asym", "q8_0", "bf16")),
        ("gpt2", ONNX, ("sint4:g32", "int4:g16:asym")),
        ("gpt2", ONNX_QDQ, ("int8:g32:asym", "sint8:row")),
        ("qwen2moe", ONNX, ("sint4:g32", "int4:g16:asym")),
        ("qwen2moe", ONNX_QDQ, ("sint8:g32", "int8:row:asym")),
        ("gptoss", ONNX, ("int4:g16:asym",)),
        ("deepseek", ONNX, ("int4:g16:asym",)),
    ],
)
def test_the_runtime_computes_what_our_decoding_does(
    family: str, engine: Any, texts: tuple[str, ...], rounded: Callable[..., Model], tmp_path: Path
):
    model = rounded(family, engine, *texts)
    assert set(texts) <= set(_texts(model).values())  # none was passed over for all layers
    target = engine.open(model.source, model.anatomy)
    path = tmp_path / "x"
    target.write(model.codecs, path, model.read)
    stored = target.stored(path)
    assert stored.texts == _texts(model)
    for layer in model.anatomy.layers:
        again = stored.tensors(layer, model.codecs[layer.name])
        assert again.keys() == model.tensors[layer.name].keys()
        assert all(again[part].equal(tensor) for part, tensor in model.tensors[layer.name].items())
    assert all(stored.kept(name).equal(value) for name, value in model.kept.items())
    assert target.file_bytes(_texts(model)) == stored.nbytes == sum((path / n).stat().st_size for n in (MODEL, DATA))
    assert engine_of(path) is engine
    onnx.checker.check_model(path / MODEL)
    domains = {node.domain for node in onnx.load(path / MODEL, load_external_data=False).graph.node}
    assert domains == ({"", "com.microsoft"} if engine is ONNX else {""})
    ids = torch.randint(0, 100, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model.plain(ids).logits[0]
    with engine.run(path, 24, 1) as running:
        found = running.logits(ids[0].tolist())
        assert wanted.std() > 0.1
        assert (found - wanted).abs().max() < NOISE
        _check_cache(running._session, ids.numpy(), found.numpy())


def _check_cache(session: Any, ids: np.ndarray, whole: np.ndarray) -> None:
    """A token after a cache of all others, beside a second sequence that is padded on its left."""
    names = [one.name for one in session.get_outputs()]
    batch = np.concatenate([ids, ids])
    batch[1, :5] = 0
    mask = np.ones(batch.shape, dtype=np.int64)
    mask[1, :5] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    feed = {"input_ids": batch[:, :-1], "attention_mask": mask[:, :-1], "position_ids": positions[:, :-1]}
    for one in session.get_inputs():
        if one.name.startswith("past_key_values."):
            feed[one.name] = np.zeros((2, one.shape[1], 0, one.shape[3]), dtype=np.float32)
    first = session.run(None, feed)
    step = {"input_ids": batch[:, -1:], "attention_mask": mask, "position_ids": positions[:, -1:]}
    step |= {name.replace("present", "past_key_values"): one for name, one in zip(names[1:], first[1:], strict=True)}
    last = session.run(["logits"], step)[0]
    assert np.abs(first[0][0] - whole[:-1]).max() < NOISE
    assert np.abs(last[0, 0] - whole[-1]).max() < NOISE
    assert np.isfinite(last).all()


@pytest.mark.parametrize(
    "text",
    ["int4:g32:asym", "int2:g16:asym", "int8:g32:asym:bf16", "sint4:g16", "sint2:g32", "q4_0", "q8_0", "int4:g32"],
)
def test_bytes_taken_apart_mean_what_our_decoding_says(text: str):
    codec, shape = parse(text), (5, 96)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    weight[0] = 0
    assert isinstance(codec, LeafCodec)
    tensors = codec.pack(Nearest().solve(weight, codec, None), shape)
    pieces = take_apart(codec, tensors, shape)
    grid = grid_of(codec)
    assert grid is not None
    assert {name: (one.dtype, tuple(one.shape)) for name, one in pieces.items()} == grid.pieces(shape)
    groups = grid.groups(96)
    zero = {"stored": None, "middle": 2 ** (grid.bits - 1), "half": (2**grid.bits - 1) / 2}[grid.zero]
    zeros = torch.full((5, groups), zero) if zero is not None else unpack(pieces["zero"], grid.bits, groups)
    codes = unpack(pieces["codes"], grid.bits, 96).reshape(5, groups, -1)
    values = (codes.float() - zeros[:, :, None].float()) * pieces["scale"].float()[:, :, None]
    assert values.reshape(shape).equal(codec.decode(tensors, shape))
    for operators in (NBits(), Qdq()):
        if operators.refuses(grid, lookup=False) is None:
            there = operators.arrange(grid, pieces, shape)
            assert {name: (one.dtype, tuple(one.shape)) for name, one in there.items()} == operators.pieces(grid, shape)
            back = put_together(codec, operators.restore(grid, there, shape), shape)
            assert all(back[name].equal(tensor) for name, tensor in tensors.items())


def test_no_mix_of_codecs_is_larger_than_planned(rounded: Callable[..., Model]):
    """What delivery relies on: a file is larger than an artifact by no more than said, and not much less."""
    draw = random.Random(5)
    for engine in (ONNX, ONNX_QDQ):
        model = rounded("qwen2", engine, "bf16")
        target = engine.open(model.source, model.anatomy)
        larger = target.overhead(dense_layout(model.anatomy).total_bytes)
        for _ in range(4):
            texts = {}
            for layer in model.anatomy.layers:
                named = ("int4:g16", "int2:g32", "int8:g16:asym:bf16", "sint8:row:bf16")
                fits = [text for text in (*engine.candidates("normal"), *named) if _fits(engine, model, layer, text)]
                texts[layer.name] = draw.choice(fits)
            artifact = artifact_layout(model.anatomy, {name: parse(text) for name, text in texts.items()}).total_bytes
            over = target.file_bytes(texts) - artifact
            assert over <= larger < over + 600 * len(texts)


def _fits(engine: Any, model: Model, layer: Layer, text: str) -> bool:
    codec = parse(text)
    return codec.accepts(layer.stored_shape) and engine.refuses(model.anatomy, layer, codec, 1) is None


@pytest.mark.parametrize(
    ("engine", "text", "why"),
    [
        (ONNX, "int3:g32:asym", "onnx cannot run int3:g32:asym: its operators read 2, 4 or 8 bits, not 3"),
        (ONNX, "int4:g48:asym", "groups of 16, 32, 64, 128, 256, not groups of 48"),
        (ONNX, "int4:row:asym", "not whole rows"),
        (ONNX, "int8:g32", "8-bit codes with whole zeros only; add :asym"),
        (ONNX, "int4:g32:asym:s8", "no integer on an even grid"),
        (ONNX, "q4_k", "no integer on an even grid"),
        (ONNX_QDQ, "sint4:g32", "onnx-qdq cannot run sint4:g32: QDQ files hold 8 bits, not 4"),
        (ONNX_QDQ, "int8:row", "codes with whole zeros only; add :asym"),
    ],
)
def test_codecs_that_it_cannot_run_are_named(engine: Any, text: str, why: str):
    with pytest.raises(BadInput, match=why):
        engine.check([text])
    engine.check(engine.candidates("normal"))


def test_layers_that_it_cannot_have_encoded(rounded: Callable[..., Model]):
    model = rounded("qwen2moe", ONNX, "bf16")
    kinds = {layer.kind: layer for layer in model.anatomy.layers}
    for kind in ("embedding", "experts"):
        why = ONNX.refuses(model.anatomy, kinds[kind], parse("int4:g32"), 1)
        assert why == "its look-ups read codes with whole zeros only; add :asym"
        assert ONNX.refuses(model.anatomy, kinds[kind], parse("int4:g32:asym"), 1) is None
    assert ONNX.refuses(model.anatomy, kinds["linear"], parse("int4:g32"), 1) is None


def test_a_model_that_cannot_be_exported(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    source = open_source(folder("qwen2"))

    def fail(self: Any, *_args: Any, **_more: Any) -> None:
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setattr("transformers.exporters.exporter_onnx.OnnxExporter.export", fail)
    monkeypatch.setattr(graph, "_FORM", "of a test")
    with pytest.raises(EngineFailed, match=r"cannot export Qwen2ForCausalLM: no such operator$"):
        ONNX.open(source, analyse(source, skeleton(source)))
    monkeypatch.setitem(__import__("sys").modules, "onnx_ir", None)
    with pytest.raises(BadInput, match=r"pip install 'tersor\[onnx\]'"):
        ONNX.open(source, analyse(source, skeleton(source)))


def test_a_graph_that_uses_a_weight_otherwise(rounded: Callable[..., Model]):
    model = rounded("llama-tied", ONNX, "bf16")
    target = ONNX.open(model.source, model.anatomy)
    proto = onnx.ModelProto.FromString(target.graph)
    turned = next(node for node in proto.graph.node if node.op_type == "Transpose" and "q_proj" in node.input[0])
    turned.op_type = "Cos"
    changed = replace(target, graph=proto.SerializeToString())
    with pytest.raises(BadInput, match=r"uses the weight of model\.layers\.0\.self_attn\.q_proj in Cos, not in a prod"):
        changed.file_bytes(dict.fromkeys(_texts(model), "int4:g16:asym"))
    gone = next(value for value in proto.graph.input if value.name == "model.norm.weight")
    gone.name = "other"
    changed = replace(target, graph=proto.SerializeToString())
    with pytest.raises(BadInput, match=r"does not use the parameter 'model\.norm\.weight'"):
        changed.file_bytes(_texts(model))


def test_a_folder_does_not_say_that_its_source_was_quantized(rounded: Callable[..., Model], tmp_path: Path):
    model = rounded("llama-tied", ONNX, "bf16")
    config = json.loads((model.source.path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    target = ONNX.open(model.source, model.anatomy)
    packed = replace(model.source, path=tmp_path, side_files=())
    replace(target, source=packed).write(model.codecs, tmp_path / "x", model.read)
    assert json.loads((tmp_path / "x" / "config.json").read_text()) == config


def test_damaged_folders(rounded: Callable[..., Model], tmp_path: Path):
    model = rounded("qwen2", ONNX, "sint4:g32")
    target = ONNX.open(model.source, model.anatomy)
    whole = tmp_path / "whole"
    target.write(model.codecs, whole, model.read)
    assert not list(tmp_path.glob("*.partial"))

    def damaged(change: Callable[[Path], None], kind: type[Exception], why: str) -> None:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "bad")
        change(tmp_path / "bad")
        with pytest.raises(kind, match=why):
            target.stored(tmp_path / "bad")

    def edit(change: Callable[[onnx.ModelProto], None]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            proto = onnx.ModelProto.FromString((path / MODEL).read_bytes())
            change(proto)
            (path / MODEL).write_bytes(proto.SerializeToString())

        return apply

    def shorten(path: Path) -> None:
        (path / DATA).write_bytes((path / DATA).read_bytes()[:-9])

    def relocate(proto: onnx.ModelProto) -> None:
        next(t for t in proto.graph.initializer if t.external_data).external_data[0].value = "../secret"

    def reshape(proto: onnx.ModelProto) -> None:
        next(t for t in proto.graph.initializer if t.name.endswith("q_proj.codes")).dims[0] -= 1

    def retext(proto: onnx.ModelProto) -> None:
        prop = next(prop for prop in proto.metadata_props if prop.key == LAYERS)
        prop.value = json.dumps({**json.loads(prop.value), "lm_head": "q4_k"})

    def foreign(proto: onnx.ModelProto) -> None:
        del proto.metadata_props[:]

    damaged(shorten, CorruptArtifact, "fetch it again")
    damaged(lambda path: (path / MODEL).write_bytes(b"\xff" * 99), CorruptArtifact, "not a whole ONNX file")
    damaged(lambda path: (path / DATA).unlink(), CorruptArtifact, "the folder is incomplete")
    damaged(edit(relocate), CorruptArtifact, "does not say where")
    damaged(edit(reshape), CorruptArtifact, "must be torch.uint8")
    damaged(edit(retext), BadInput, "which onnx does not read")
    damaged(edit(foreign), BadInput, "tersor did not write it")
    other = rounded("llama-tied", ONNX, "bf16")
    another = ONNX.open(other.source, other.anatomy)
    with pytest.raises(CorruptArtifact, match="of another model"):
        another.stored(whole)


def test_nothing_is_left_of_a_folder_that_fails(rounded: Callable[..., Model], tmp_path: Path):
    model = rounded("qwen2", ONNX, "sint4:g32")

    def read(name: str) -> Tensor | Mapping[str, Tensor]:
        if name == "lm_head":
            raise CorruptArtifact("gone")
        return model.read(name)

    with pytest.raises(CorruptArtifact, match="gone"):
        ONNX.open(model.source, model.anatomy).write(model.codecs, tmp_path / "x", read)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "texts",
    [
        ("int4:g32:asym",),
        ("sint4:g32",),
        ("sint8:g32",),
        ("sint2:g32",),
        ("int4:g16:asym", "int8:g16:asym", "int4:g32"),
    ],
)
def test_products_of_integers_are_predicted(texts: tuple[str, ...], rounded: Callable[..., Model], tmp_path: Path):
    """At level 4 inputs are rounded to 8 bits, which the prediction follows; at the others they are not."""
    noise = {}
    for level in range(5):
        engine = ONNX.at_level(level)
        model = rounded("llama-tied", engine, *texts)
        target = engine.open(model.source, model.anatomy)
        path = tmp_path / str(level)
        target.write(model.codecs, path, model.read)
        stored = target.stored(path)
        assert stored.said == f"accuracy_level {level}"
        assert target.file_bytes(_texts(model)) == stored.nbytes
        ids = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(1))
        settings = {"chunk": 1, "workers": 1, "origin": "x", "progress": silent}
        body = skeleton(model.source)
        proof = prove_file(path, engine, model.source, body, target, ids, **settings)
        assert proof.said == stored.said
        noise[level] = proof.noise
        assert proof.ours.kl == pytest.approx(proof.engine.kl, rel=0.05)
    assert all(noise[level] < 1e-8 for level in (0, 1, 2, 3))
    # Some kernels round inputs otherwise than most: in others than the weights' groups, or not at all.
    assert noise[4] < 1e-4


def test_levels_are_asked_for_where_files_have_them(folder: Callable[[str], Path], tmp_path: Path):
    text = tiny_runs.text(tmp_path / "text.txt")
    given = {"text": text, "cache_dir": tmp_path / "cache", **tiny_runs.SETTINGS}
    path, plain = tmp_path / "x", folder("llama-tied")
    done = api.compress_for("onnx", plain, path, size=95_000, onnx_accuracy_level=4, **given)
    assert done.proof is not None
    assert done.proof.said == "accuracy_level 4"
    assert json.loads((tmp_path / "x.json").read_text())["proof"]["said"] == "accuracy_level 4"
    nodes = onnx.load(path / MODEL, load_external_data=False).graph.node
    levels = [one.i for node in nodes for one in node.attribute if one.name == "accuracy_level"]
    assert levels
    assert set(levels) == {4}
    assert "accuracy_level 4" in CliRunner().invoke(
        app, ["prove", str(path), "--against", str(plain), "--text", str(text), *tiny_runs.OPTIONS[:6]]
    ).stdout.replace("\n", " ")
    with pytest.raises(
        BadInput, match="Files for onnx-qdq say nothing of it; give --onnx-accuracy-level for onnx only"
    ):
        api.compress_for("onnx-qdq", plain, tmp_path / "y", size=95_000, onnx_accuracy_level=4, **given)
    with pytest.raises(BadInput, match="--onnx-accuracy-level 5 cannot be used; give a whole number from 0 to 4"):
        api.plan(plain, size=95_000, engine="onnx", onnx_accuracy_level=5, **given)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_within_a_budget_from_the_command_line(folder: Callable[[str], Path], tmp_path: Path):
    text = tiny_runs.text(tmp_path / "text.txt")
    words = ["--text", str(text), *tiny_runs.OPTIONS]
    model, output = str(folder("llama-tied")), str(tmp_path / "x")
    runner = CliRunner()
    planned = runner.invoke(app, ["plan", model, "--size", "95kB", "--for", "onnx", "--fast", "--json"])
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["file_bytes"] <= 95_000
    done = runner.invoke(app, ["compress", model, "--size", "95kB", "--for", "onnx", "-o", output, *words])
    assert done.exit_code == 0, done.output
    assert "KL by onnx" in done.stdout
    assert sum((tmp_path / "x" / name).stat().st_size for name in (MODEL, DATA)) <= 95_000
    assert (tmp_path / "x" / "tokenizer.json").is_file()
    said = json.loads((tmp_path / "x.json").read_text())
    assert said["proof"]["noise"] < 1e-7
    keep = [word for word in words if word not in ("--samples", "0")]
    proven = runner.invoke(app, ["prove", output, "--against", model, *keep, "--json"])
    assert proven.exit_code == 0, proven.output
    assert json.loads(proven.stdout)["noise"] < 1e-7


def test_budgets_and_exports(folder: Callable[[str], Path], tmp_path: Path):
    text = tiny_runs.text(tmp_path / "text.txt")
    given = {"text": text, "cache_dir": tmp_path / "cache", **tiny_runs.SETTINGS}
    with pytest.raises(Infeasible, match="least possible for this model in onnx") as caught:
        api.compress_for("onnx", folder("llama-tied"), tmp_path / "x", size=40_000, **given)
    assert caught.value.smallest < 80_000
    with pytest.raises(BadInput, match="onnx cannot run int3:g32"):
        api.compress_for("onnx", folder("llama-tied"), tmp_path / "x", size=90_000, candidates=("int3:g32",), **given)
    assert not list(tmp_path.glob("x*"))
    api.compress(folder("llama-tied"), tmp_path / "made", size="40%", candidates=("sint4:g32",), **given)
    size = api.export(tmp_path / "made", tmp_path / "x", engine="onnx", cache_dir=tmp_path / "cache")
    assert size == sum((tmp_path / "x" / name).stat().st_size for name in (MODEL, DATA))
    with pytest.raises(BadInput, match=r"onnx-qdq cannot run sint4:g32: QDQ files hold 8 bits"):
        api.export(tmp_path / "made", tmp_path / "y", engine="onnx-qdq", cache_dir=tmp_path / "cache")
    assert ONNX.unproven == "not proven here: onnx is not installed (pip install onnxruntime)"


def test_each_file_is_known_by_what_it_holds(tmp_path: Path):
    assert not ONNX.recognises(tmp_path)
    proto = onnx.ModelProto()
    for name, known in (("onnx", ONNX), ("onnx-qdq", ONNX_QDQ)):
        del proto.metadata_props[:]
        proto.metadata_props.add(key=ENGINE, value=name)
        (tmp_path / MODEL).write_bytes(proto.SerializeToString())
        assert [engine for engine in (ONNX, ONNX_QDQ) if engine.recognises(tmp_path)] == [known]
