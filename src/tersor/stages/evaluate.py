"""Measuring an artifact, or any model folder, against a reference."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from tersor.anatomy import WeightLoader, analyse, cache_folder, open_source, skeleton
from tersor.contracts import Anatomy, Quality
from tersor.errors import BadInput, ShapeMismatch
from tersor.runtime.stream import BlockStream
from tersor.stages.context import Progress
from tersor.stages.estimate import chunk_sequences
from tersor.stages.opened import open_whole
from tersor.stages.options import Options
from tersor.stages.text import prepare_texts
from tersor.stages.verify import Pair, artifact_loader, measure_quality


def evaluate_model(
    path: Path,
    reference: str | Path | nn.Module | None,
    options: Options,
    *,
    progress: Progress,
    cache_dir: Path | None,
) -> Quality:
    """Quality of the artifact or model at ``path`` on the text that ``options`` names.

    Both models are streamed block by block; neither is ever in memory as a whole.
    """
    artifact = open_whole(path, progress) if is_artifact(path) else None
    if artifact is None and not path.exists():
        raise BadInput(f"{path} does not exist; give an artifact made by `tersor compress`, or a model folder.")
    if reference is None:
        if artifact is None:
            raise BadInput(f"{path} is not a tersor artifact, so say what to compare it with: --against MODEL.")
        reference = artifact.manifest.source.origin
    source = open_source(
        reference, cache_dir=cache_dir, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    if artifact is not None and source.fingerprint() != artifact.manifest.source.fingerprint:
        raise BadInput(
            f"{source.origin} is not the model that {path} was made from (fingerprints differ); give that one as "
            f"--against."
        )
    model = skeleton(source)
    anatomy = analyse(source, model)
    workers = options.workers or torch.get_num_threads()
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    loader = WeightLoader(source, model)
    first = BlockStream(model, anatomy, lambda names: loader.load(names, dtype), dtype=dtype)
    if artifact is not None:
        second = BlockStream(model, anatomy, artifact_loader(artifact, anatomy, dtype, workers), dtype=dtype)
    else:
        second = _plain_stream(path, anatomy, dtype, cache_dir)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        texts = prepare_texts(
            source, options, cache=cache_folder(cache_dir), workers=workers, progress=progress, whole=True
        )
        return measure_quality(
            Pair(first, second),
            len(anatomy.blocks),
            texts.calibration.ids,
            chunk=chunk_sequences(options.length),
            workers=workers,
            origin=texts.calibration.origin,
            progress=progress,
        )
    finally:
        torch.set_num_threads(before)
        first.close()
        second.close()


def is_artifact(path: Path) -> bool:
    """Whether a folder says that it is an artifact, in its manifest or, where that is missing, its configuration."""
    if (path / "tersor.json").exists():
        return True
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == "tersor"


def _plain_stream(path: Path, reference: Anatomy, dtype: torch.dtype, cache_dir: Path | None) -> BlockStream:
    """A model folder to compare, which must have the reference's structure."""
    source = open_source(path, cache_dir=cache_dir)
    model = skeleton(source)
    anatomy = analyse(source, model)
    if [(layer.name, layer.stored_shape) for layer in anatomy.layers] != [
        (layer.name, layer.stored_shape) for layer in reference.layers
    ]:
        raise ShapeMismatch(f"{path} does not have the layers of the reference, so their outputs cannot be compared.")
    loader = WeightLoader(source, model)
    return BlockStream(model, anatomy, lambda names: loader.load(names, dtype), dtype=dtype)
