"""Where a model comes from: a folder, a hub id, a GGUF file or a model object, all turned into one kind of folder."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

from tersor.anatomy import cache, packed
from tersor.anatomy.shards import ComputedTensor, TensorInfo, list_tensors, read_header, samples
from tersor.errors import BadInput, CorruptArtifact, UnknownArchitecture

_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "*/*.jinja")
_NOT_SIDE = ("config.json", cache.NOTE, "tersor.json", "plan.json", "requirements.txt", *packed.BESIDE)
_HUB_FILES = ["*.safetensors", *_SIDE_FILES]
_CONFIG_ERRORS = (
    *(ValueError, TypeError, KeyError, AttributeError, ImportError, OSError, ArithmeticError),
    StrictDataclassError,
)
_READ_WHOLE = 1 << 26
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A model folder that has been looked over; nothing of its weights has been read.

    ``path``: folder with config.json and safetensors. ``origin``: what the user gave. ``side_files``: files of the
    folder that belong into an artifact as they are (tokenizer, generation settings, chat template, custom code,
    licence). ``lossy_note``: how the weights were rounded before (``"GPTQ 4-bit g128"``), or None.
    """

    path: Path
    origin: str
    config: PretrainedConfig
    tensors: Mapping[str, TensorInfo]
    side_files: tuple[Path, ...]
    lossy_note: str | None = None
    trust_remote_code: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the weights lie in, in the order of their names."""
        return tuple(sorted({part.file for info in self.tensors.values() for part in info.stored}))

    @property
    def computed(self) -> bool:
        """Whether some weights are dequantized when they are asked for, so that transformers cannot load the folder."""
        return any(isinstance(info, ComputedTensor) for info in self.tensors.values())

    def plain_config(self) -> dict[str, Any]:
        """config.json without what it says of quantization."""
        return packed.without_settings(_read_config(self.path))

    def copy_side_files(self, folder: Path) -> None:
        """Copy the side files into ``folder``, those of a subfolder (further chat templates) into one of that name."""
        for file in self.side_files:
            copy = folder / file.relative_to(self.path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)

    def stamp(self) -> str:
        """SHA-256 (hex) over the weight files' names, sizes and times of change: moved by any edit, and by a copy."""
        seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 (hex) over config.json and each shard's name, size, header and data.

        Of shards larger than 64 MiB (than their part of it, where there are several) only 64 KiB of every 16 MiB are
        read. Cheap, yet any retraining, requantization or reordering of the weights changes it.
        """
        digest = hashlib.sha256()
        parts = [(self.path / "config.json").read_bytes()]
        if self.computed:
            parts += [file.read_bytes() for name in packed.BESIDE if (file := self.path / name).is_file()]
        for file in self.files:
            parts += [file.name.encode(), str(file.stat().st_size).encode(), read_header(file)]
            parts += samples(file, whole=_READ_WHOLE // len(self.files))
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def open_source(
    model: str | Path | nn.Module,
    *,
    cache_dir: Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Open a model: a folder, a .gguf file (or a folder with just one), a hub id, or a transformers model object.

    Hub files go to the hub's own cache; GGUF files and model objects are written once as safetensors into
    ``cache_dir`` (default: ``$XDG_CACHE_HOME/tersor`` or ``~/.cache/tersor``) under the hash of their content.

    Weights packed as GPTQ, AWQ, AutoRound, compressed-tensors or FP8 are dequantized when they are asked for; no copy
    is written.

    Raises BadInput (nothing there, pickled weights, quantized in a way that is not read), CorruptArtifact (truncated or
    malformed files) or UnknownArchitecture (transformers has no class for it).
    """
    if isinstance(model, nn.Module):
        return _inspect(cache.from_module(model, cache_dir), f"{type(model).__name__} object", trust_remote_code)
    path = Path(model).expanduser()
    origin = str(model)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if any(path.glob("*.safetensors")) or not files:
            return _inspect(path, origin, trust_remote_code)
        if len(files) > 1:
            raise BadInput(f"{path} holds {len(files)} .gguf files; give the path of one of them: {files[0]}, ...")
        path = files[0]
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise BadInput(f"{path} is a file but no .gguf; give the folder that holds config.json and the weights.")
        folder, note = cache.from_gguf(path, cache_dir)
        return _inspect(folder, origin, trust_remote_code, note)
    if not _HUB_ID.fullmatch(origin):
        raise BadInput(f"There is no file or folder {path}; expected a model folder, a .gguf file or a hub id.")
    return _inspect(_download(origin, revision), origin, trust_remote_code)


def _inspect(folder: Path, origin: str, trust_remote_code: bool, note: str | None = None) -> Source:
    """Look a local folder over, raising a clear sentence for each thing that cannot be used."""
    stored = list_tensors(folder)
    raw = _read_config(folder)
    tensors, packing = packed.unpack(raw, stored, folder)
    return Source(
        path=folder,
        origin=origin,
        config=_load_config(raw, folder, trust_remote_code),
        tensors=tensors,
        side_files=_side_files(folder),
        lossy_note=note or packing,
        trust_remote_code=trust_remote_code,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise BadInput(f"{folder} has no config.json; give a transformers model folder.")
    try:
        raw = json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptArtifact(f"{file} is not JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise CorruptArtifact(f"{file} does not hold a JSON object.")
    return raw


def _load_config(raw: Mapping[str, Any], folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    kind, custom = raw.get("model_type"), raw.get("auto_map")
    if not kind and not custom:
        raise UnknownArchitecture(f"{folder / 'config.json'} has no model_type, so its architecture is unknown.")
    if kind not in CONFIG_MAPPING and not (custom and trust_remote_code):
        advice = (
            "the folder brings code of its own: look at it, and pass --trust-remote-code if you trust it"
            if custom
            else "upgrade transformers"
        )
        raise UnknownArchitecture(f"transformers knows no model_type {kind!r} (in {folder / 'config.json'}); {advice}.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _CONFIG_ERRORS as error:
        raise UnknownArchitecture(f"transformers cannot use {folder / 'config.json'}: {_first_line(error)}.") from error
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config  # what the dequantized model is not
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (custom and "AutoModelForCausalLM" in custom):
        raise UnknownArchitecture(f"model_type {kind!r} (in {folder / 'config.json'}) is not a decoder language model.")
    return config


def _side_files(folder: Path) -> tuple[Path, ...]:
    found = {file for pattern in _SIDE_FILES for file in folder.glob(pattern) if file.is_file()}
    return tuple(sorted(f for f in found if f.name not in _NOT_SIDE and not f.name.endswith(".index.json")))


def _download(model_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise BadInput(
            f"There is no folder {model_id}, and the model {model_id!r} could not be fetched from the hub "
            f"({_first_line(error)}); check the name, the network and your access."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
