"""A decoder's step as one program: operations on buffers that stay where they are, run in order by one compiled call.

A :class:`Program` is written once, operation by operation, and then run for every token, or for a few tokens of a
prompt at a time. Buffers are float32 tensors ``(rows, width)`` on the CPU with a row for every token; views of columns
of a larger buffer will do, but for inputs of products. :mod:`tersor.kernels.reference_step` is the specification, in
plain torch and with the same methods.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.kernels.products import Product

try:
    from tersor.kernels import _products  # type: ignore[attr-defined]
except ImportError:
    _products = None

available: bool = _products is not None

BLOCK = 16
"""Positions whose keys lie side by side in a cache."""

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def make_cache(heads: int, context: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Room for keys and values of ``context`` positions, as :meth:`Program.attention` keeps them; all zeros.

    Keys are ``(heads, blocks, dim, 16)`` and values ``(heads, blocks, 16, padded)``, of float32 or float16. Memory of
    positions that are never reached is never touched.
    """
    blocks = -(-context // BLOCK)
    # NumPy takes zeros straight from the system, whose pages come into being when they are written; torch writes them.
    # What lies behind the last position is multiplied by weights of 0, and so must be finite.
    kind = np.float16 if dtype == torch.float16 else np.float32
    keys = np.zeros((heads, blocks, dim, BLOCK), dtype=kind)
    values = np.zeros((heads, blocks, BLOCK, -(-dim // BLOCK) * BLOCK), dtype=kind)
    return torch.from_numpy(keys), torch.from_numpy(values)


class Program:
    """Operations that are added once and run often. Raises ValueError for buffers that do not fit together.

    ``tokens``: the most that a step takes. ``context``: positions that there are. One caller at a time.
    """

    def __init__(self, tokens: int, context: int) -> None:
        if _products is None:
            raise RuntimeError("programs were not compiled when tersor was installed")
        self._inner: Any = _products.Program(tokens, context)

    def products(self, x: Tensor, *targets: tuple[Tensor, Product, Tensor | None]) -> None:
        """``y = x Wᵀ + bias`` for each ``(y, product with W, bias or None)``, all of the same ``x (tokens, in)``.

        ``x`` is contiguous; ``y (tokens, out)``. What products take of their inputs is made once where they agree on
        it, and all of them share the threads.
        """
        outputs, products, biases = [], [], []
        for y, product, bias in targets:
            outputs.append(_array(y))
            products.append(product)
            biases.append(None if bias is None else _array(bias))
        self._inner.products(_array(x), outputs, products, biases)

    def norm(
        self, x: Tensor, y: Tensor, weight: Tensor, *, eps: float, bias: Tensor | None = None, centred: bool = False
    ) -> None:
        """Each stretch of ``len(weight)`` columns over its root mean square, times ``weight``.

        ``centred``: its mean is taken away first and ``bias`` added at last. ``y`` may be ``x``.
        """
        self._inner.norm(_array(x), _array(y), _array(weight), None if bias is None else _array(bias), eps, centred)

    def rope(self, x: Tensor, cosine: Tensor, sine: Tensor, *, dim: int, neighbours: bool = False) -> None:
        """Heads of ``dim`` columns rotated in place by their position (arXiv:2104.09864).

        ``cosine``, ``sine``: ``(context, rotary)``, ``rotary <= dim``. Column i is paired with ``i + rotary / 2``, or
        with its neighbour.
        """
        self._inner.rope(_array(x), _array(cosine), _array(sine), dim, neighbours)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        *,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int = 0,
        cap: float = 0.0,
    ) -> None:
        """New keys and values into the cache of :func:`make_cache`; then causal attention of the queries to all so far.

        ``q``, ``y``: ``(tokens, heads · dim)``; consecutive heads share a head of keys where these are fewer
        (arXiv:2305.13245). ``window``: the last positions that are seen, 0 for all. ``cap``: scaled scores become
        ``cap · tanh(score / cap)``, 0 for none.
        """
        self._inner.attention(
            _array(q), _array(k), _array(v), _array(y), _array(keys), _array(values), scale, window, cap
        )

    def gate(self, x: Tensor, up: Tensor, y: Tensor, activation: str) -> None:
        """``y = activation(x) · up``; ``activation`` is one of :data:`ACTIVATIONS`."""
        self._inner.gate(_array(x), _array(up), _array(y), activation)

    def add(self, x: Tensor, y: Tensor) -> None:
        """``y += x``."""
        self._inner.add(_array(x), _array(y))

    def scale(self, x: Tensor, factor: float) -> None:
        """``x *= factor``."""
        self._inner.scale(_array(x), factor)

    def soft_cap(self, x: Tensor, cap: float) -> None:
        """``x = cap · tanh(x / cap)``."""
        self._inner.soft_cap(_array(x), cap)

    def take_last(self, x: Tensor, y: Tensor) -> None:
        """The last token's row of ``x`` into the first of ``y``; operations added from here on are for it alone."""
        self._inner.take_last(_array(x), _array(y))

    @property
    def size(self) -> int:
        """Operations so far."""
        return int(self._inner.size)

    def run(
        self, first: int, stop: int, *, tokens: int, position: int, int8: bool = False, timed: bool = False
    ) -> list[float]:
        """Operations ``first`` to ``stop`` for ``tokens`` tokens, of which the first is at ``position``.

        On torch's number of threads; results are the same bits for any number. ``int8``: inputs of products are rounded
        to 8 bits instead of 16. ``timed``: returns the seconds of each operation, else nothing.
        """
        seconds: list[float] = self._inner.run(first, stop, tokens, position, torch.get_num_threads(), int8, timed)
        return seconds


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()
