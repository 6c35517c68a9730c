"""Models that are not folders yet, written once as safetensors folders, under the hash of their content.

A folder appears whole or not at all: it is written beside its final place and renamed.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tersor.anatomy.folder import cache_folder
from tersor.anatomy.packed import gguf
from tersor.anatomy.shards import samples
from tersor.errors import BadInput, UnknownArchitecture

NOTE = "tersor-source.json"
"""File in a cached folder that keeps what its weight files cannot say."""

_VERSION = b"tersor source 1"
_GGUF_VERSION = b"tersor source 3"
_SHARD = "2GB"
_TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "*.jinja", "*/*.jinja")


def from_gguf(file: Path, cache_dir: Path | None) -> tuple[Path, str | None]:
    """The folder with ``file`` dequantized, and a note that says what it was rounded to, if it was.

    Raises BadInput (a package is missing), CorruptArtifact (no whole GGUF file) or UnknownArchitecture.
    """
    size = str(file.stat().st_size).encode()
    key = _key([_GGUF_VERSION, transformers.__version__.encode(), size, *samples(file, whole=1 << 26)])

    def write(folder: Path) -> None:
        _check_packages(file)
        reader = gguf.open_reader(file)
        gguf.check_types(reader, file)
        note = gguf.lossy_note(reader)
        if not gguf.write_folder(reader, file, folder):
            model = _read_gguf(file)
            if getattr(model.config, "quantization_config", None) is not None:
                del model.config.quantization_config
            model.save_pretrained(folder, max_shard_size=_SHARD)
        _gguf_tokenizer(file).save_pretrained(folder)
        (folder / NOTE).write_text(json.dumps({"note": note}), "utf-8")

    folder = _once(cache_folder(cache_dir), key, write)
    return folder, json.loads((folder / NOTE).read_text("utf-8"))["note"]


def from_module(model: nn.Module, cache_dir: Path | None) -> Path:
    """The folder with a model object's weights, in their own types, tied weights once.

    Raises BadInput when the object is no transformers model, is quantized, or has weights on the meta device.
    """
    if not isinstance(model, PreTrainedModel):
        raise BadInput(
            f"A model object must be a transformers PreTrainedModel, found {type(model).__name__}; "
            "save it as a transformers model folder and give that."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise BadInput(f"The {type(model).__name__} object is quantized already; give the original model instead.")
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise BadInput(
                f"Tensor {name} of the {type(model).__name__} object is on the meta device: it has no values."
            )
    side = _tokenizer_files(model)
    key = _key(_module_bytes(model, side))

    def write(folder: Path) -> None:
        twin = copy.copy(model)  # saving writes into the configuration: into a copy of it
        twin.config, twin.generation_config = copy.deepcopy((model.config, getattr(model, "generation_config", None)))
        twin.save_pretrained(folder, max_shard_size=_SHARD)
        for name, path in side.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name)

    return _once(cache_folder(cache_dir), key, write)


def _key(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def _once(root: Path, key: str, write: Callable[[Path], None]) -> Path:
    """``root/key``, written by ``write`` unless it is there; nothing half-written ever has that name."""
    final = root / key
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{key}.partial-", dir=root))
    try:
        write(partial)
        partial.chmod(0o755)
        try:
            partial.rename(final)
        except OSError:
            if not final.is_dir():  # else: another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _module_bytes(model: PreTrainedModel, side: Mapping[str, Path]) -> Iterator[bytes]:
    yield from (_VERSION, transformers.__version__.encode(), type(model).__name__.encode())
    yield model.config.to_json_string(use_diff=False).encode()
    for name, tensor in sorted(model.state_dict().items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), 1 << 26):
            yield flat[start : start + (1 << 26)].numpy().tobytes()
    for name, path in side.items():
        yield name.encode()
        yield path.read_bytes()


def _tokenizer_files(model: PreTrainedModel) -> dict[str, Path]:
    """Tokenizer files of the local folder a model object was loaded from, if it was, by their path in it."""
    folder = Path(getattr(model, "name_or_path", "") or "/nowhere")
    if not folder.is_dir():
        return {}
    found = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    return {file.relative_to(folder).as_posix(): file for file in found}


def _check_packages(file: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise BadInput(
                f"Reading {file.name} needs the package {package}; install it with: pip install 'tersor[gguf]'."
            )


def _read_gguf(file: Path) -> Any:
    packs: Any = getattr(transformers, "GgufConfig", None)  # versions without it always dequantize
    options = {} if packs is None else {"quantization_config": packs(dequantize=True)}
    # transformers draws a bar of its own while it converts, terminal or not.
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            return AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.bfloat16, **options
            )
    except (ValueError, KeyError, ImportError, NotImplementedError, RuntimeError) as error:
        raise UnknownArchitecture(f"transformers cannot read the GGUF file {file}: {error}") from error


def _gguf_tokenizer(file: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, ImportError, AttributeError) as error:
        raise BadInput(f"The tokenizer inside {file} cannot be converted by transformers: {error}") from error
