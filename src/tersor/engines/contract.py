"""What an engine is: one object that says which codecs it runs, by what rules, and how a model becomes its file.

Planning, writing and proving know engines only through this, so that all of it is the same for every engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tersor.anatomy import Source
from tersor.contracts import Anatomy, Codec, Layer, Rounding
from tersor.errors import BadInput

Read = Callable[[str], Tensor | Mapping[str, Tensor]]
"""By layer name its stored tensors by part; by parameter name the value of what is kept."""


class Stored(Protocol):
    """An engine's file read back. ``texts``: the codec of every layer. ``nbytes``: of all that the budget counts.

    ``said``: what it asks of the engine's arithmetic, or nothing.
    """

    @property
    def texts(self) -> Mapping[str, str]: ...

    @property
    def nbytes(self) -> int: ...

    def tensors(self, layer: Layer, codec: Codec) -> Mapping[str, Tensor]:
        """A layer's stored tensors, as ``codec`` declares them."""
        ...

    def kept(self, name: str) -> Tensor:
        """A kept parameter's value, as the model has it."""
        ...

    def holds(self, name: str, value: Tensor) -> bool:
        """Whether it holds ``value`` for a kept parameter, bit for bit in the type that the file has it in."""
        ...

    @property
    def said(self) -> str: ...

    def inputs(self, layer: Layer, codec: Codec) -> Rounding | None:
        """How the engine rounds what it multiplies by a layer of this file; None where it does not."""
        ...


class Target(Protocol):
    """One model as a file of one engine. Making it raises BadInput for a model that the engine cannot have."""

    @property
    def anatomy(self) -> Anatomy: ...

    def file_bytes(self, texts: Mapping[str, str]) -> int:
        """Exact bytes of the finished file with these codecs by layer, everything that is stored included."""
        ...

    def overhead(self, dense_bytes: int) -> int:
        """By how many bytes a file is larger, at most, than an artifact with the same codecs; may be negative.

        ``dense_bytes``: of the artifact with everything in bf16.
        """
        ...

    def write(self, codecs: Mapping[str, Codec], path: Path, read: Read) -> None:
        """Write the file (or folder) ``path``, which is not there. Nothing is left of it when that fails."""
        ...

    def stored(self, path: Path) -> Stored:
        """What ``path`` holds. Raises CorruptArtifact for what is damaged, BadInput for codecs we cannot read."""
        ...


class Opener(Protocol):
    """How an engine makes a target of a model."""

    def __call__(self, source: Source, anatomy: Anatomy, cache_dir: Path | None = None, /) -> Target:
        """``cache_dir``: where what takes long to make is kept (default: the user's cache folder)."""
        ...


class Running(Protocol):
    """A model as the engine runs it."""

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits ``(len(ids), tokens)`` float32 after each token of one sequence."""
        ...


def written_alike(found: Tensor, value: Tensor) -> bool:
    """Whether ``found`` is ``value`` in its own type, bit for bit, NaN and signs of zeros included."""
    wanted = value.to(found.dtype)
    bits = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, wanted))
    return found.shape == wanted.shape and torch.equal(*bits)


@dataclass(frozen=True)
class Pace:
    """What products of a vector with matrices in one codec take: a time for each weight, each row and each product.

    ``weight`` in picoseconds, ``row`` in nanoseconds, ``product`` in microseconds. Rows end with a sum over what
    registers hold, and some engines prepare inputs for each product, so that short rows and small matrices take more
    time a weight.
    """

    weight: float
    row: float
    product: float

    def time(self, layer: Layer) -> float:
        """Microseconds for all copies of a layer."""
        rows = layer.stored_shape[0]
        return 1e-6 * layer.parameters * self.weight + 1e-3 * rows * self.row + layer.copies * self.product


@dataclass(frozen=True)
class Engine:
    """An engine. Functions of it are pure unless they say that they write or run something.

    ``suffix``: how its files end; empty where it reads folders. ``package``: what to install to prove a file here.
    ``candidates(effort)``: codec texts to choose from. ``check(texts)``: raises BadInput for a codec that it cannot
    run anywhere. ``refuses(anatomy, layer, codec, ranks)``: why this layer cannot have that codec when split over
    ``ranks`` processors, or None. ``together(layer)``: key of the layers that it fuses, which need one codec.
    ``fallback``: what a layer gets for which no candidate is left; empty where that is an error. ``splits``: whether
    it can split layers over processors. ``at_level(level)``: this engine with files that ask for an accuracy level of
    its arithmetic; None where they cannot. ``warns(layer, codec)``: what is to be said where not all programs that read
    such files load this layer in that codec. ``shuns(layer, codec)``: whether it is to be chosen only where nothing
    else is left, as what proves files here does not load it. ``pace``: how long products take with each codec when a
    token is written, on the machine where they were compared; None where they were not.
    ``rounds(codec)``: how it rounds inputs of a layer in that codec, as far as the codec alone says; one function for
    all codecs with which it does the same. ``open``: see :class:`Opener`.
    ``recognises(path)``: whether a file or folder is one of its. ``installed()``, ``run(path, length, threads)``: the
    real engine, which raises EngineFailed.
    """

    name: str
    suffix: str
    package: str
    candidates: Callable[[str], tuple[str, ...]]
    check: Callable[[Sequence[str]], None]
    open: Opener
    recognises: Callable[[Path], bool]
    installed: Callable[[], bool]
    run: Callable[[Path, int, int], AbstractContextManager[Running]]
    refuses: Callable[[Anatomy, Layer, Codec, int], str | None] = lambda _anatomy, _layer, _codec, _ranks: None
    together: Callable[[Layer], str | None] = lambda _layer: None
    fallback: str = ""
    splits: bool = False
    at_level: Callable[[int], Engine] | None = None
    warns: Callable[[Layer, Codec], str | None] = lambda _layer, _codec: None
    shuns: Callable[[Layer, Codec], bool] = lambda _layer, _codec: False
    pace: Mapping[str, Pace] | None = None
    rounds: Callable[[Codec], Rounding | None] = lambda _codec: None

    @property
    def unproven(self) -> str:
        """What is said where the engine is not installed."""
        return f"not proven here: {self.name} is not installed (pip install {self.package})"


def groups(engine: Engine, anatomy: Anatomy) -> dict[str, list[str]]:
    """Names of the layers that must share a codec, by the key of their group."""
    found: dict[str, list[str]] = {}
    for layer in anatomy.layers:
        key = engine.together(layer)
        if key is not None:
            found.setdefault(f"fused:{key}", []).append(layer.name)
    return found


def token_time(engine: Engine, anatomy: Anatomy, texts: Mapping[str, str]) -> float:
    """Microseconds that all products of one token take by ``engine.pace``, with these codecs by layer.

    Raises BadInput for an engine without such figures.
    """
    return sum(layer_time(engine, anatomy, layer, texts[layer.name]) for layer in anatomy.layers)


def layer_time(engine: Engine, anatomy: Anatomy, layer: Layer, text: str) -> float:
    """Microseconds that one layer takes when a token is written, by ``engine.pace``.

    Of an embedding that is no head only one row is read; experts count as though a token went to all of them.
    """
    if engine.pace is None:
        raise BadInput(f"How fast {engine.name} is with each codec is not known here; give a size instead of --like.")
    looked_up = layer.name == anatomy.embedding != anatomy.head
    return 0.0 if looked_up else engine.pace[text].time(layer)


def warnings(engine: Engine, anatomy: Anatomy, codecs: Mapping[str, Codec]) -> tuple[str, ...]:
    """What is to be said of these codecs by layer: one sentence for each reason."""
    found: dict[str, list[str]] = {}
    for layer in anatomy.layers:
        why = engine.warns(layer, codecs[layer.name])
        if why is not None:
            found.setdefault(f"in {codecs[layer.name]}: {why}", []).append(layer.name)
    return tuple(
        f"{names[0]}{f' and {len(names) - 1} other layers' if len(names) > 1 else ''} {text}."
        for text, names in found.items()
    )


def check_codecs(engine: Engine, anatomy: Anatomy, codecs: Mapping[str, Codec], ranks: int) -> None:
    """Raise BadInput, one sentence, for the first rule of the engine that these codecs by layer break."""
    engine.check(sorted({str(codec) for codec in codecs.values()}))
    for layer in anatomy.layers:
        why = engine.refuses(anatomy, layer, codecs[layer.name], ranks)
        if why is not None:
            raise BadInput(f"{engine.name} cannot run {layer.name} in {codecs[layer.name]}: {why}.")
    for names in groups(engine, anatomy).values():
        texts = {str(codecs[name]): name for name in reversed(names)}
        if len(texts) > 1:
            (first, one), (second, other) = list(texts.items())[:2]
            raise BadInput(
                f"{engine.name} computes {', '.join(names)} as one product, which needs one codec for all; "
                f"found {first} for {one} and {second} for {other}."
            )
