"""What safetensors files hold, checked against what a model expects before any of it is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from tersor.anatomy.headers import DTYPES
from tersor.contracts import Part
from tersor.engines.replace import local_name
from tersor.errors import BadInput, CorruptArtifact


def check_files(files: Sequence[str], model: PreTrainedModel, parts: Mapping[str, Part], *, whole: bool) -> None:
    """Every tensor of the files against the model with its packed modules in place.

    ``parts``: stored tensors of packed layers by their full name; dtype and shape must match exactly. Of other tensors
    the shape must match. ``whole``: the model is of the class that was compressed, so nothing else may be missing or
    left over either. Raises CorruptArtifact naming file, tensor, what was expected and what was found; BadInput for
    files that are not safetensors.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    seen: set[str] = set()
    for path in files:
        if not path.endswith(".safetensors"):
            raise BadInput(f"{path} is not a safetensors file; tersor reads no other weight files.")
        for name, (dtype, shape) in read_header(path).items():
            local = local_name(name, expected, model.base_model_prefix)
            if local is None:
                if whole and not _matches(name, model._keys_to_ignore_on_load_unexpected):
                    raise CorruptArtifact(f"{path} holds {name!r}, which {type(model).__name__} has no place for.")
                continue
            seen.add(local)
            wanted_dtype = parts[local].dtype if local in parts else None
            _check_one(path, name, found=(dtype, shape), expected=(wanted_dtype, expected[local]))
    ties = model.all_tied_weights_keys
    shared = {name for pair in ties.items() if seen.intersection(pair) for name in pair}
    for name in expected:
        wanted = name in parts or (whole and not _matches(name, model._keys_to_ignore_on_load_missing))
        if wanted and name not in seen and name not in shared:
            raise CorruptArtifact(f"{_where(files)} lacks the tensor {name!r}: the folder is incomplete.")


def read_header(path: str) -> dict[str, tuple[torch.dtype | str, tuple[int, ...]]]:
    """``{tensor: (dtype, shape)}`` of one file. Raises CorruptArtifact when it is truncated or not safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: (DTYPES.get(entry.get_dtype(), entry.get_dtype()), tuple(entry.get_shape()))
                for name, entry in slices.items()
            }
    except SafetensorError as error:
        raise CorruptArtifact(f"{path} is truncated or not a safetensors file ({error}); fetch it again.") from error


def _check_one(
    path: str,
    name: str,
    *,
    found: tuple[torch.dtype | str, tuple[int, ...]],
    expected: tuple[torch.dtype | None, tuple[int, ...]],
) -> None:
    dtype, shape = expected
    if found[1] != shape or dtype not in (None, found[0]):
        wanted = f"{dtype or 'shape'} {shape}"
        raise CorruptArtifact(f"{path}: the tensor {name!r} must be {wanted} and is {found[0]} {found[1]}.")


def _matches(name: str, patterns: Sequence[str] | set[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _where(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else str(Path(files[0]).parent)
