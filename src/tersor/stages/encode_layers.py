"""Layers into codes: chunks of rows of fixed size, and those of several layers side by side.

A layer has a few chunks, often fewer than there are workers, and the last of them takes as long as the first. So the
chunks of one layer after the other make one queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from tersor.codecs.inner import under
from tersor.contracts import Codec, CompositeCodec, DirectCodec, Gram, Layer, LeafCodec, Stretch
from tersor.errors import NotFinite
from tersor.parallel import in_turn
from tersor.solvers import Encoder, chunk_of
from tersor.stages.weights import is_finite
from tersor.statistics.outputs import output_energy

_FORESEEN = 4096
"""Inputs of a Gram matrix up to which it is factored while others are in use: that takes twice its own memory, and half
of that stays until it is needed."""
_AT_ONCE = 1 << 24
"""Weights of a layer that is encoded as a whole up to which several of them are at the same time."""
_LARGE = Lock()


@dataclass(frozen=True)
class Ready:
    """An encoder, and the Gram matrix to encode a layer's rows with. ``note``: why there is none, or empty."""

    encoder: Encoder
    gram: Gram | None
    note: str = ""


@dataclass(frozen=True)
class Order:
    """A layer to encode. ``weight()`` gives it, ``(copies, out, in)``; ``ready``: for each copy."""

    layer: Layer
    codec: Codec
    weight: Callable[[], Tensor]
    ready: list[Ready]


@dataclass(frozen=True)
class Coded:
    """An encoded layer: ``weight (copies · out, in)`` as the source has it, and the tensors that are stored for it.

    ``record``: what was measured on the way. ``gram``: of the layer's input, where there is one for all of it.
    """

    weight: Tensor
    parts: dict[str, Tensor]
    record: dict[str, Any]
    gram: Gram | None


@dataclass(frozen=True)
class _Begun:
    """A layer of which some pieces are there. ``errors``: of each of them, as :func:`errors_of` has them."""

    order: Order
    weight: Tensor
    parts: dict[str, Tensor]
    errors: list[list[float]] = field(default_factory=list)

    def coded(self) -> Coded:
        layer, ready = self.order.layer, self.order.ready
        notes = {one.note for one in ready if one.note}
        if not isinstance(self.order.codec, DirectCodec):
            # The encoder is shared: others that read the same input may already be at work with it.
            notes |= {f"{layer.name}: {note}" for one in ready for note in one.encoder.notes}
        totals = [sum(column) for column in zip(*self.errors, strict=True)] or [0.0] * 4
        record = {**summary(totals), "notes": sorted(notes)}
        return Coded(self.weight, self.parts, record, ready[0].gram if layer.copies == 1 else None)


@dataclass(frozen=True)
class _Piece:
    """Some rows of a layer. ``work``: gives their tensors and errors; ``store``: puts the tensors where they belong.

    Without either it says that no more pieces of the layer come.
    """

    begun: _Begun
    work: Callable[[], tuple[dict[str, Tensor], list[float]]] | None = None
    store: Callable[[dict[str, Tensor]], None] | None = None

    def __call__(self) -> tuple[dict[str, Tensor], list[float]]:
        return self.work() if self.work is not None else ({}, [])


def encode_layers(groups: Iterable[Sequence[Order]], workers: int) -> Iterator[tuple[Layer, Coded]]:
    """Encode layers, in order. Each group is of layers that read the same input, and so share what is ``ready``.

    Factoring a Gram matrix is the work of one thread, and takes the longer the wider it is: while a group is encoded, a
    thread beside the workers does it for the next if that is to be in a leaf codec. ``groups`` are asked for one ahead,
    and let go of when they are encoded. Bytes do not depend on ``workers``.
    """
    with ThreadPoolExecutor(1) as behind:
        pieces = (piece for group in _ahead(groups, behind, workers) for order in group for piece in _pieces(order))
        try:
            for piece, (tensors, errors) in in_turn(pieces, _Piece.__call__, workers):
                if piece.store is None:
                    yield piece.begun.order.layer, piece.begun.coded()
                else:
                    piece.store(tensors)
                    piece.begun.errors.append(errors)
        finally:
            behind.shutdown(wait=False, cancel_futures=True)


def _ahead(groups: Iterable[Sequence[Order]], behind: ThreadPoolExecutor, workers: int) -> Iterator[Sequence[Order]]:
    """The groups. From the beginning of each the next one's Gram matrix is factored, if it is one and not too wide."""
    coming = iter(groups)
    following = next(coming, None)
    while following is not None:
        group, following = following, next(coming, None)
        if workers > 1 and following is not None and len(following[0].ready) == 1:
            ready = following[0].ready[0]
            if ready.gram is not None and len(ready.gram.matrix) <= _FORESEEN:
                behind.submit(ready.encoder.foresee, following[0].codec, ready.gram)
        yield group


def _pieces(order: Order) -> Iterator[_Piece]:
    layer, codec, ready = order.layer, order.codec, order.ready
    weight = order.weight()
    if not is_finite(weight):
        raise NotFinite(f"The weights of {layer.name} have NaN or Inf; the source model is damaged.")
    parts = {part.name: torch.empty(part.shape, dtype=part.dtype) for part in codec.parts(layer.stored_shape)}
    begun = _Begun(order, weight.reshape(layer.stored_shape), parts)
    for stretch in codec.stretches(layer.stored_shape[0]):
        own = under(parts, stretch.prefix)
        shape = (stretch.stop - stretch.start, layer.shape[1])
        direct = isinstance(stretch.codec, DirectCodec) and not any(part.shared for part in stretch.codec.parts(shape))
        composed = isinstance(stretch.codec, CompositeCodec) and stretch.codec.by_rows
        if direct or composed or isinstance(stretch.codec, LeafCodec):
            yield from _by_rows(begun, stretch, own)
        else:
            rows = begun.weight[stretch.start : stretch.stop]
            yield _Piece(begun, partial(_encode_whole, rows, stretch.codec, ready), partial(_store_whole, own))
    yield _Piece(begun)


def _by_rows(begun: _Begun, stretch: Stretch, parts: dict[str, Tensor]) -> Iterator[_Piece]:
    """One stretch in chunks of rows of fixed size, each an independent piece of work."""
    flat, ready, out = begun.weight, begun.order.ready, begun.order.layer.shape[0]
    rows = stretch.stop - stretch.start
    shared = {part.name for part in stretch.codec.parts((rows, flat.shape[1])) if part.shared}
    codec = stretch.codec
    if isinstance(codec, LeafCodec | CompositeCodec):
        codec = codec.learn(flat[stretch.start : stretch.stop], _mean_gram(ready))
    step, tile = chunk_of(stretch.codec, rows), stretch.codec.tile(rows)

    def work(start: int, stop: int) -> tuple[dict[str, Tensor], list[float]]:
        one = ready[start // out]
        weight = flat[start:stop].float().contiguous()
        tensors, values = one.encoder.rows(weight, codec, one.gram)
        return tensors, errors_of(weight, values, one.gram)

    def store(start: int, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name in shared:
                parts[name].copy_(tensor)
            else:
                first = (start - stretch.start) // (1 if len(parts[name]) == rows else tile)
                parts[name][first : first + len(tensor)] = tensor

    for first, stop in _within_copies(stretch.start, stretch.stop, out):
        for start in range(first, stop, step):
            yield _Piece(begun, partial(work, start, min(start + step, stop)), partial(store, start))


def _encode_whole(rows: Tensor, codec: Codec, ready: list[Ready]) -> tuple[dict[str, Tensor], list[float]]:
    """A stretch whose codec takes all its ``rows`` at once; copies share their mean Gram matrix."""
    with _LARGE if rows.numel() > _AT_ONCE else nullcontext():
        weight = rows.float().contiguous()
        gram = _mean_gram(ready)
        tensors, values = ready[0].encoder(weight, codec, gram)
        return tensors, errors_of(weight, values, gram)


def _store_whole(parts: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        parts[name].copy_(tensor)


def _mean_gram(ready: list[Ready]) -> Gram | None:
    """One Gram matrix for all copies of a layer, each counting by its tokens."""
    grams = [one.gram for one in ready if one.gram is not None]
    if len(grams) < 2:
        return grams[0] if grams else None
    tokens = sum(gram.tokens for gram in grams)
    matrix = torch.zeros_like(grams[0].matrix)
    for gram in grams:
        matrix += gram.matrix * (gram.tokens / max(tokens, 1))
    reaches = [gram.reach for gram in grams if gram.reach is not None]
    return Gram(matrix, tokens, reach=max(reaches, default=None))


def _within_copies(start: int, stop: int, out: int) -> list[tuple[int, int]]:
    """Rows ``start`` to ``stop`` cut where one copy of ``out`` rows ends and the next begins."""
    cuts = [start, *range((start // out + 1) * out, stop, out), stop]
    return list(pairwise(cuts))


def errors_of(weight: Tensor, values: Tensor, gram: Gram | None) -> list[float]:
    """``‖E‖²``, ``‖W‖²``, ``tr(E H Eᵀ)``, ``tr(W H Wᵀ)`` of some rows."""
    error = weight - values
    sums = [float(error.double().square().sum()), float(weight.double().square().sum())]
    if gram is None:
        return [*sums, 0.0, 0.0]
    return [*sums, *(output_energy(m, gram.matrix) for m in (error, weight))]


def summary(totals: Sequence[float]) -> dict[str, Any]:
    """What a record says of a layer's errors, from the sums that :func:`errors_of` gives."""
    return {
        "relative_error": math.sqrt(totals[0] / totals[1]) if totals[1] > 0 else 0.0,
        "output_error": totals[2] / totals[3] if totals[3] > 0 else None,
    }
