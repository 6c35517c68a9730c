"""What an earlier run found out about an artifact, so that a later one starts without transformers' model code.

A file in the user's cache folder holds the blueprint of the model's step, what its configurations say about writing,
and which class its tokenizer is of; of step and tokenizer also what they gave for a fixed text, which a later run has
to reproduce. It is of one artifact, byte for byte, and of the versions of the packages at work.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from tersor.anatomy import cache_folder
from tersor.artifact import Artifact
from tersor.runtime.decoding.blueprint import Blueprint
from tersor.version import __version__

_FORMAT = 1
_SAMPLE = "Der 1. Versuch:\tdef f(x): return x**2 # naïve 漢字 🙂\n"


def place(artifact: Artifact) -> Path:
    """Where what is known of an artifact is kept, if anything is."""
    files = {name: record.sha256 for name, record in sorted(artifact.manifest.files.items())}
    # Not every artifact has this one, and whoever adds it later means it.
    settings = artifact.folder / "generation_config.json"
    files["generation_config.json"] = hashlib.sha256(settings.read_bytes()).hexdigest() if settings.is_file() else ""
    key = [_FORMAT, __version__, torch.__version__, transformers.__version__, files]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    return cache_folder() / "steps" / f"{digest}.safetensors"


def load(artifact: Artifact) -> Blueprint | None:
    """What is known of an artifact. None for one that brings code, which only transformers can judge."""
    if "auto_map" in artifact.config:
        return None
    try:
        return Blueprint.load(place(artifact))
    except RuntimeError:  # no home folder
        return None


def describe_tokenizer(tokenizer: Any) -> dict[str, Any] | None:
    """How to get the same tokenizer by its class, without transformers' search for it; None where that is no way."""
    name = type(tokenizer).__name__
    return {"class": name, "does": _does(tokenizer)} if getattr(transformers, name, None) is type(tokenizer) else None


def open_tokenizer(folder: Path, described: Any) -> Any | None:
    """The tokenizer that was described; None where it does not do the same now."""
    if not isinstance(described, dict):
        return None
    kind: Any = getattr(transformers, str(described.get("class")), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedTokenizerBase):
        return None
    try:
        tokenizer = cast(Any, kind).from_pretrained(folder)
    except (OSError, ValueError):
        return None
    return tokenizer if _does(tokenizer) == described.get("does") else None


def _does(tokenizer: Any) -> list[Any]:
    """What tells tokenizers of one folder apart, as JSON has it."""
    ids = list(tokenizer(_SAMPLE)["input_ids"])
    plain = list(tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"])
    text = tokenizer.decode(plain, skip_special_tokens=True)
    template = tokenizer.chat_template
    return [ids, plain, text, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, template]
