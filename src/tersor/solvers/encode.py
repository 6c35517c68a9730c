"""A layer's weight to stored tensors, whatever kind of codec it is for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tersor.contracts import Codec, CompositeCodec, DirectCodec, Gram, LeafCodec, Solver
from tersor.errors import NotPositiveDefinite
from tersor.parallel import in_order
from tersor.solvers.nearest import Nearest

ROW_CHUNK = 192
"""Rows encoded as one unit of work. Fixed, so that bytes do not depend on the number of workers; few enough for a small
layer to keep several busy."""


class Encoder:
    """Encodes weights with one solver; factors each Gram matrix once while it is in use.

    ``notes``: what went another way than asked.
    """

    def __init__(self, solver: Solver, *, workers: int = 1) -> None:
        self.solver = solver
        self.workers = workers
        self.notes: list[str] = []
        self._ready: dict[tuple[int, int], tuple[Gram | None, Solver, Any]] = {}
        self._lock = threading.Lock()
        self._transformed: dict[tuple[int, str], tuple[Gram, Gram]] = {}

    def __call__(self, weight: Tensor, codec: Codec, gram: Gram | None) -> tuple[dict[str, Tensor], Tensor]:
        """Stored tensors and decoded values for ``weight (out, in)`` float32; see :class:`tersor.contracts.Encode`."""
        shape = (weight.shape[0], weight.shape[1])
        if not isinstance(codec, LeafCodec):
            return self.rows(weight, codec, gram)
        learned = codec.learn(weight, gram)
        step = chunk_of(codec, shape[0])
        starts = range(0, max(shape[0], 1), step)

        def work(index: int) -> tuple[dict[str, Tensor], Tensor]:
            here = slice(starts[index], starts[index] + step)
            return self.rows(weight[here], learned, _of_rows(gram, here))

        pieces = list(in_order(work, len(starts), self.workers))
        shared = {part.name for part in codec.parts(shape) if part.shared}
        tensors = {
            name: tensor if name in shared else torch.cat([piece[name] for piece, _ in pieces])
            for name, tensor in pieces[0][0].items()
        }
        return tensors, torch.cat([values for _, values in pieces])

    def rows(self, weight: Tensor, codec: Codec, gram: Gram | None) -> tuple[dict[str, Tensor], Tensor]:
        """The same for whole tiles of a layer, on one thread; the codec has learned what it needs of the layer."""
        if isinstance(codec, CompositeCodec):
            return codec.encode(weight, gram, self)
        if isinstance(codec, DirectCodec):
            tensors = codec.encode(weight, gram)
            return tensors, codec.decode(tensors, (weight.shape[0], weight.shape[1]))
        assert isinstance(codec, LeafCodec)
        _, solver, factor = self.prepared(gram, codec.span)
        encoded = solver.solve(weight.float().contiguous(), codec, factor)
        return codec.pack(encoded, (weight.shape[0], weight.shape[1])), codec.values(encoded, weight.shape[1])

    @property
    def damping(self) -> float:
        """The most damping that factoring a Gram matrix took, as a fraction of its mean diagonal."""
        factors = [getattr(factor, "start", factor) for _, _, factor in self._ready.values()]
        return max((float(getattr(factor, "damping", 0.0)) for factor in factors), default=0.0)

    def transformed(self, gram: Gram, key: str, make: Callable[[], Gram]) -> Gram:
        """See :class:`tersor.contracts.Encode`."""
        with self._lock:
            if (id(gram), key) not in self._transformed:
                self._transformed[id(gram), key] = (gram, make())
            return self._transformed[id(gram), key][1]

    def foresee(self, codec: Codec, gram: Gram) -> None:
        """Do in advance what a leaf will ask of its Gram matrix; others say what they need when they are encoded."""
        if isinstance(codec, LeafCodec):
            self.prepared(gram, codec.span)

    def prepared(self, gram: Gram | None, span: int) -> tuple[Gram | None, Solver, Any]:
        """The solver used with a Gram matrix, and what it prepared; nearest rounding when all else fails."""
        key = (id(gram), span)
        with self._lock:
            if key not in self._ready:
                self._ready[key] = self._prepare(gram, span)
            return self._ready[key]

    def _prepare(self, gram: Gram | None, span: int) -> tuple[Gram | None, Solver, Any]:
        if gram is None and self.solver.needs_gram:
            return gram, Nearest(), None
        try:
            return gram, self.solver, self.solver.prepare(gram, span)
        except NotPositiveDefinite as error:
            self.notes.append(f"{error} It was rounded to nearest instead.")
            return gram, Nearest(), gram


def _of_rows(gram: Gram | None, rows: slice) -> Gram | None:
    """``gram`` with what it says of single weights for these rows alone."""
    return gram if gram is None or gram.gradients is None else replace(gram, gradients=gram.gradients[rows])


def chunk_of(codec: Codec, rows: int) -> int:
    """Rows of a layer of ``rows`` that are one unit of work: about ``ROW_CHUNK``, in whole tiles."""
    tile = codec.tile(rows)
    return max(ROW_CHUNK // tile, 1) * tile
