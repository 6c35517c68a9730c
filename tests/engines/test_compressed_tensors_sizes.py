"""How much larger than an artifact a folder for compressed-tensors can get: never more than is set aside for it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tersor.anatomy.shards import TensorInfo
from tersor.artifact.layout import compute_layout
from tersor.codecs import parse
from tersor.contracts import Anatomy, Layer
from tersor.engines.compressed_tensors.engine import FolderTarget
from tersor.engines.compressed_tensors.experts import Piece
from tersor.engines.compressed_tensors.forms import DENSE, FORMS
from tersor.engines.compressed_tensors.rules import refuses

pytest.importorskip("compressed_tensors")

PREFIXES = ("gpt_neox.layers", "transformer.h", "模型.層", 'a "quoted" \\ name', "b" * 200, "ü")
LEAVES = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "q", "w" * 60, "naïve.proj")


class Tensors:
    """What a target asks of a source."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}

    def add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.tensors[name] = TensorInfo(name, dtype, shape, Path("x"), 0)


def invented(draw: random.Random, shard: int) -> FolderTarget:
    """A model of random names and sizes; its files have other names for its parameters, longer or shorter."""
    source, layers, kept, origins = Tensors(), [], {}, {}
    experts: dict[str, tuple[Piece, ...]] = {}
    inside, outside = draw.sample(PREFIXES, 2)
    for number in range(draw.randint(1, 12)):
        name = f"{inside}.{number}.{draw.choice(LEAVES)}"
        rows, columns = draw.randint(1, 40) * draw.choice((1, 8)), draw.choice((3, 16, 32, 33, 64, 128, 192, 1024))
        layers.append(Layer(name, f"{name}.weight", "linear", (rows, columns), number, inputs=name))
        stored = f"{outside}.{number}.{draw.choice(LEAVES)}.weight"
        source.add(stored, draw.choice((torch.float32, torch.bfloat16, torch.float16)), (rows, columns))
        origins[f"{name}.weight"] = (stored,)
        for leaf in draw.sample(("bias", "norm", "gate"), draw.randint(0, 3)):
            size: tuple[int, ...] = (draw.randint(1, 70),) * draw.randint(1, 2)
            dtype = draw.choice((torch.float32, torch.bfloat16))
            kept[f"{name}.{leaf}"] = (dtype, size)
            source.add(f"{stored}.{leaf}", torch.float32, size)
            origins[f"{name}.{leaf}"] = (f"{stored}.{leaf}",)
    if draw.random() < 0.5:
        name, copies, shape = f"{inside}.0.mlp.experts.up", draw.randint(2, 9), (draw.randint(8, 40), 64)
        layers.append(Layer(name, name, "experts", shape, 0, inputs=name, copies=copies))
        modules = [f"{outside}.0.mlp.experts.{number}.{draw.choice(LEAVES)}" for number in range(copies)]
        experts[name] = tuple(
            Piece(module, slice(number * shape[0], (number + 1) * shape[0]), shape)
            for number, module in enumerate(modules)
        )
        for module in modules:
            source.add(f"{module}.weight", torch.bfloat16, shape)
        origins[name] = tuple(f"{module}.weight" for module in modules)
    anatomy = Anatomy("any", (inside,), tuple(layers), kept, (), None, None, 0)
    given: Any = source
    return FolderTarget(given, anatomy, origins, experts, shard)


def allowed(target: FolderTarget, layer: Layer, text: str) -> bool:
    codec = parse(text)
    return codec.accepts(layer.stored_shape) and refuses(target.anatomy, layer, codec, 1) is None


def artifact_bytes(target: FolderTarget, texts: dict[str, str]) -> int:
    tensors = {
        f"{layer.name}.{part.name}": (part.dtype, part.shape)
        for layer in target.anatomy.layers
        for part in parse(texts[layer.name]).parts(layer.stored_shape)
    }
    return compute_layout({**tensors, **target.anatomy.kept}, max_shard_size=target.shard).total_bytes


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_names_and_sizes(seed: int) -> None:
    draw = random.Random(seed)
    target = invented(draw, draw.choice((10**9, 10**6, 50_000, 3000, 1)))
    layers = target.anatomy.layers
    most = target.overhead(artifact_bytes(target, {layer.name: DENSE for layer in layers}))
    for _ in range(20):
        few = draw.sample([*FORMS, DENSE], draw.choice((1, 3, len(FORMS))))
        texts = {}
        for layer in layers:
            able = [text for text in few if allowed(target, layer, text)]
            texts[layer.name] = draw.choice(able or [DENSE])
        assert target.file_bytes(texts) <= artifact_bytes(target, texts) + most, texts
    # A bound that is far too high would waste what a model could use: here it is below a kilobyte a tensor.
    tensors = sum(len(FORMS[text].spec((8, 128))) for text in FORMS) // len(FORMS) * len(layers) + len(
        target.anatomy.kept
    )
    assert most < 1200 * (tensors + 5)
