"""Before an engine's file is handed over, all that it holds is compared with the artifact, kept tensors too."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_runs
from tersor import api
from tersor.anatomy import WeightLoader, analyse, open_source, skeleton
from tersor.artifact import open_artifact
from tersor.codecs import parse
from tersor.delivery import ENGINES, write_file
from tersor.errors import VerificationFailed

for package in ("compressed_tensors", "onnx", "gguf"):
    pytest.importorskip(package)

SETTINGS: dict[str, Any] = {**tiny_runs.SETTINGS, "size": "120%", "candidates": ("bf16",)}

OPTIONS = {"gemma2": {"query_pre_attn_scalar": 32}}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name to the folder with an artifact whose layers are all in bf16, which every engine runs."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny_runs.wide_model(folder, family, **OPTIONS.get(family, {}))
            text = tiny_runs.text(folder / "text.txt")
            api.compress(model, folder / "artifact", text=text, cache_dir=folder / "cache", **SETTINGS)
            made[family] = folder
        return made[family] / "artifact"

    return make


@dataclass
class Faulty:
    """A target that writes one kept parameter otherwise, if one is named."""

    target: Any
    wrong: str = ""

    def write(self, codecs: Any, path: Path, read: Callable[[str], Tensor | Mapping[str, Tensor]]) -> None:
        def changed(name: str) -> Tensor | Mapping[str, Tensor]:
            found = read(name)
            return found.flip(0) if name == self.wrong and isinstance(found, Tensor) else found

        self.target.write(codecs, path, changed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


@pytest.mark.parametrize(
    ("family", "engine"),
    # What Gemma's norms hold is written with one added to it, GPT-2's matrices the other way round.
    [*(("llama", name) for name in sorted(ENGINES)), ("gemma2", "llama.cpp"), ("gpt2", "compressed-tensors")],
)
def test_a_kept_tensor_that_differs_is_found(
    family: str, engine: str, artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = artifact(family)
    source = open_source(open_artifact(folder).manifest.source.origin)
    anatomy = analyse(source, skeleton(source))
    target = ENGINES[engine].open(source, anatomy, folder.parent / "cache")
    output = tmp_path / f"x{ENGINES[engine].suffix}"
    assert write_file(folder, output, Faulty(target)) > 0
    shutil.rmtree(output) if output.is_dir() else output.unlink()
    for name in (min(anatomy.kept), max(anatomy.kept)):
        with pytest.raises(
            VerificationFailed, match=rf"x\S* does not hold {name.replace('.', '[.]')} as it was written"
        ):
            write_file(folder, output, Faulty(target, name))
        assert not list(tmp_path.iterdir())


def test_a_folder_is_made_of_what_is_read_alone(tmp_path: Path) -> None:
    """GPT-2 stores its matrices the other way round; a folder must not take them from the source for that."""
    source = open_source(tiny_runs.wide_model(tmp_path, "gpt2"))
    anatomy = analyse(source, skeleton(source))
    target = ENGINES["compressed-tensors"].open(source, anatomy)
    loader = WeightLoader(source, skeleton(source))
    layers = {layer.name: layer for layer in anatomy.layers}
    assert "conv1d" in {layer.kind for layer in layers.values()}

    def read(name: str) -> Tensor | Mapping[str, Tensor]:
        if name not in layers:
            return loader.load([name])[name].neg()
        weight = loader.load([layers[name].parameter])[layers[name].parameter].neg()
        return {"weight": weight.T.contiguous() if layers[name].transposed else weight}

    target.write({name: parse("bf16") for name in layers}, tmp_path / "x", read)
    stored = target.stored(tmp_path / "x")
    for name, layer in layers.items():
        assert torch.equal(stored.tensors(layer, parse("bf16"))["weight"], read(name)["weight"])  # type: ignore[index]
    assert all(stored.holds(name, read(name)) for name in anatomy.kept)  # type: ignore[arg-type]
