"""llama.cpp as an engine: the codecs it runs, what a file of it takes, writing one, and reading one back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tersor.anatomy import Source
from tersor.anatomy.packed.gguf import open_reader
from tersor.contracts import Anatomy, Codec, Layer, Rounding
from tersor.engines.contract import Engine, Read, written_alike
from tersor.engines.llama_cpp.library import LlamaCpp, LoadedModel, find_library
from tersor.engines.llama_cpp.names import Piece, architecture, gguf, kept_value, pieces
from tersor.engines.llama_cpp.pace import PACE
from tersor.engines.llama_cpp.rounding import rounding
from tersor.engines.llama_cpp.tokenizer import read_vocabulary
from tersor.engines.llama_cpp.write import Recipe, file_bytes, write
from tersor.errors import BadInput, CorruptArtifact, EngineFailed

NAME = "llama.cpp"
_TYPES = {
    **{name: name.upper() for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "q8_0")},
    **{name: name.upper() for name in ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")},
    **{name: name.upper() for name in ("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0", "tq2_0")},
    "bf16": "BF16",
    "fp16": "F16",
}
"""Codec texts, and the GGML types that they are."""
_QUICK = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1", "q8_0", "bf16")
_GRIDS = ("iq2_xxs", "iq2_s", "iq3_xxs", "iq3_s")
"""Types with grids of vectors: the best below four bits, and ten times as slow to encode."""
_SLACK = 96
"""Bytes by which what one tensor takes in a GGUF and in an artifact may differ, beyond what all tensors differ by."""


def candidates(effort: str) -> tuple[str, ...]:
    """Codecs to choose from; those whose blocks do not divide a layer's width are passed over there."""
    return _QUICK if effort == "fast" else (*_GRIDS, *_QUICK)


def check_candidates(texts: Sequence[str]) -> None:
    """Raise BadInput for a codec that llama.cpp cannot run."""
    for text in texts:
        if text not in _TYPES:
            raise BadInput(f"llama.cpp cannot run {text}; for it, choose among {', '.join(_TYPES)}.")


def open_recipe(anatomy: Anatomy, config: PretrainedConfig, folder: Path, name: str) -> Recipe:
    """What a GGUF of this model is made of. ``folder`` has its tokenizer. Raises BadInput for what cannot be written.

    Everything that llama.cpp would refuse or compute otherwise is found here, before any work.
    """
    architecture(config)  # refuses what cannot be written, before a missing tokenizer does
    width = next((layer.shape[0] for layer in anatomy.layers if layer.name == anatomy.embedding), config.vocab_size)
    recipe = Recipe(anatomy, config, read_vocabulary(folder, width), name)
    size_with(recipe, {layer.name: "bf16" for layer in anatomy.layers})
    return recipe


def size_with(recipe: Recipe, texts: Mapping[str, str]) -> int:
    """Exact bytes of the GGUF with these codecs by layer."""
    with tempfile.TemporaryDirectory() as scratch:
        return file_bytes(recipe, {name: _TYPES[text] for name, text in texts.items()}, Path(scratch))


def overhead(recipe: Recipe, dense_bytes: int) -> int:
    """By how much a GGUF is larger, at most, than an artifact with the same codecs.

    ``dense_bytes``: of the artifact with everything in bf16. May be negative.
    """
    tensors = sum(len(made) for made in pieces(recipe.anatomy, recipe.config).values())
    dense = size_with(recipe, {layer.name: "bf16" for layer in recipe.anatomy.layers})
    return dense - dense_bytes + _SLACK * tensors


def export(recipe: Recipe, codecs: Mapping[str, Codec], path: Path, read: Read) -> None:
    """Write a GGUF. ``read(layer or parameter)``: a layer's stored tensors by part, or a kept parameter's value."""
    texts = {name: str(codec) for name, codec in codecs.items()}
    check_candidates(list(texts.values()))

    def content(name: str) -> Tensor:
        found = read(name)
        if isinstance(found, Tensor):
            return found
        (tensor,) = found.values()
        rows = tensor.contiguous()
        return rows if rows.dtype == torch.uint8 else rows.view(torch.uint8)

    write(recipe, {name: _TYPES[text] for name, text in texts.items()}, path, content)


class Stored:
    """A GGUF file read back: which codec each layer is in, and what it stores. Raises CorruptArtifact, BadInput."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        gguf()  # refuses where the package is not installed
        self._path, self._recipe = path, recipe
        self.nbytes = path.stat().st_size
        self._found = {tensor.name: tensor for tensor in open_reader(path).tensors}
        self._places = pieces(recipe.anatomy, recipe.config)
        known = {value: text for text, value in _TYPES.items()}
        self.texts: dict[str, str] = {}
        for layer in recipe.anatomy.layers:
            kinds = {self._tensor(piece).tensor_type.name for piece in self._places[layer.name]}
            if len(kinds) > 1 or not kinds <= set(known):
                raise BadInput(
                    f"{path} holds {layer.name} as {' and '.join(sorted(kinds))}; tersor reads {', '.join(known)}, one "
                    f"type for all of a layer."
                )
            self.texts[layer.name] = known[kinds.pop()]

    def _tensor(self, piece: Piece) -> Any:
        found = self._found.get(piece.name)
        if found is None:
            raise CorruptArtifact(
                f"{self._path} lacks the tensor {piece.name!r}: it is of another model, or incomplete."
            )
        shape = tuple(int(size) for size in reversed(found.shape))  # the innermost comes first there
        if shape != piece.shape:
            raise CorruptArtifact(
                f"{self._path} holds the tensor {piece.name!r} with the shape {shape}, expected {piece.shape}: it is "
                "of another model."
            )
        return found

    def tensors(self, layer: Layer, codec: Codec) -> dict[str, Tensor]:
        """A layer's stored tensors, rows in the order that the model has them."""
        (part,) = codec.parts(layer.stored_shape)
        raw = torch.empty(layer.stored_shape[0], part.nbytes // layer.stored_shape[0], dtype=torch.uint8)
        for piece in self._places[layer.name]:
            data = torch.from_numpy(self._tensor(piece).data.view("uint8").copy()).reshape(-1, raw.shape[1])
            if piece.rows is None:
                raw.copy_(data)
            else:
                raw[piece.rows] = data
        return {part.name: raw if part.dtype == torch.uint8 else raw.view(part.dtype)}

    said = ""

    def inputs(self, _layer: Layer, codec: Codec) -> Rounding:
        """How inputs of a layer are rounded, by its type."""
        return rounding(str(codec))

    def kept(self, name: str) -> Tensor:
        """A kept parameter's value, float32, as the model has it."""
        (piece,) = self._places[name]
        found = torch.from_numpy(self._tensor(piece).data.astype("float32"))
        value = torch.empty_like(found.reshape(piece.shape))
        value[piece.rows if piece.rows is not None else slice(None)] = found.reshape(piece.shape)
        added = kept_value(name, torch.zeros(1), self._recipe.config)
        return value - added

    def holds(self, name: str, value: Tensor) -> bool:
        """Whether a kept parameter is ``value``, as it is written: what was added cannot be taken off exactly."""
        (piece,) = self._places[name]
        wanted = kept_value(name, value, self._recipe.config)
        found = torch.from_numpy(self._tensor(piece).data.copy()).reshape(piece.shape)
        return written_alike(found, (wanted if piece.rows is None else wanted[piece.rows]).reshape(piece.shape))


@dataclass(frozen=True)
class GgufTarget:
    """A model as a GGUF; see :class:`~tersor.engines.contract.Target`."""

    recipe: Recipe

    @property
    def anatomy(self) -> Anatomy:
        return self.recipe.anatomy

    def file_bytes(self, texts: Mapping[str, str]) -> int:
        return size_with(self.recipe, texts)

    def overhead(self, dense_bytes: int) -> int:
        return overhead(self.recipe, dense_bytes)

    def write(self, codecs: Mapping[str, Codec], path: Path, read: Read) -> None:
        export(self.recipe, codecs, path, read)

    def stored(self, path: Path) -> Stored:
        return Stored(path, self.recipe)


def _open(source: Source, anatomy: Anatomy, _cache_dir: Path | None = None) -> GgufTarget:
    name = Path(source.origin).stem or anatomy.model_type
    return GgufTarget(open_recipe(anatomy, source.config, source.path, name))


def _recognises(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


@contextmanager
def _run(path: Path, length: int, threads: int) -> Iterator[LoadedModel]:
    library = find_library()
    if library is None:
        raise EngineFailed(f"{path} is {ENGINE.unproven}.")
    with LlamaCpp(library).load(path, length=length, threads=threads) as running:
        yield running


ENGINE = Engine(
    name=NAME,
    suffix=".gguf",
    package="xllamacpp",
    candidates=candidates,
    check=check_candidates,
    open=_open,
    recognises=_recognises,
    installed=lambda: find_library() is not None,
    run=_run,
    pace=PACE,
    rounds=lambda codec: rounding(str(codec)),
)
