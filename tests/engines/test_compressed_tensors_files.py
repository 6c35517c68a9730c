"""Folders for compressed-tensors as files: what they hold, how large they get, and those of other programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_runs
from tersor.anatomy import WeightLoader, analyse, open_source, skeleton
from tersor.codecs import parse
from tersor.contracts import Codec
from tersor.engines.compressed_tensors.engine import ENGINE, FolderTarget
from tersor.errors import BadInput
from tersor.solvers import Encoder, Nearest

pytest.importorskip("compressed_tensors")


def opened(folder: Path) -> FolderTarget:
    source = open_source(folder)
    target = ENGINE.open(source, analyse(source, skeleton(source)))
    assert isinstance(target, FolderTarget)
    return target


def written(target: FolderTarget, output: Path, text: str) -> Path:
    """A folder with the linears of all blocks in one codec, rounded to nearest."""
    loader = WeightLoader(target.source, skeleton(target.source))
    codecs: dict[str, Codec] = {}
    stored: dict[str, Mapping[str, torch.Tensor]] = {}
    for layer in target.anatomy.layers:
        able = ENGINE.refuses(target.anatomy, layer, parse(text), 1) is None
        codecs[layer.name] = parse(text if able else "bf16")
        weight = loader.load([layer.parameter], torch.float32)[layer.parameter].reshape(layer.stored_shape)
        stored[layer.name] = Encoder(Nearest())(weight, codecs[layer.name], None)[0]
    target.write(codecs, output, lambda name: stored.get(name) or loader.load([name])[name])
    return output


def test_scales_of_another_type_are_no_damage(tmp_path: Path) -> None:
    """llm-compressor writes scales in the type of the model, which may be float16."""
    target = opened(tiny_runs.wide_model(tmp_path))
    file = written(target, tmp_path / "x", "sint4:g64:bf16") / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {name: value.half() if name.endswith("weight_scale") else value for name, value in tensors.items()},
        file,
        {"format": "pt"},
    )
    with pytest.raises(BadInput, match=r"x stores scales as float16 \(.*weight_scale\), which tersor does not read"):
        target.stored(tmp_path / "x")
