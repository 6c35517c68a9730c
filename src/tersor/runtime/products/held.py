"""The product that a packed module has, made when it is first used, and anew when its stored tensors are others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from weakref import ref

import torch
from torch import Tensor

from tersor.contracts import Codec, Shape
from tersor.kernels import products
from tersor.kernels.products import Product
from tersor.runtime.products.table import product_of

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TENSORS = (Tensor, torch.nn.Parameter)


class _Switch:
    """One for the process, so that threads which a model is run in find it as it was set."""

    on = True


@contextmanager
def decoded_only() -> Iterator[None]:
    """While this is open, packed modules use no compiled products: every weight is decoded, tile by tile."""
    before, _Switch.on = _Switch.on, False
    try:
        yield
    finally:
        _Switch.on = before


State = tuple[tuple["ref[Tensor]", int, int], ...]
"""Of each stored tensor: itself, where its numbers lie, and how often they were written to."""


def state_of(parts: Mapping[str, Tensor]) -> State:
    """What differs as soon as a stored tensor is moved, replaced, or changed in place."""
    return tuple((ref(part), part.data_ptr(), _version(part)) for part in parts.values())


def unchanged(parts: Mapping[str, Tensor], state: State) -> bool:
    """Whether these are the tensors that the state was taken of, as they were."""
    return len(parts) == len(state) and all(
        was() is part and at == part.data_ptr() and version == _version(part)
        for part, (was, at, version) in zip(parts.values(), state, strict=True)
    )


def _version(part: Tensor) -> int:
    return 0 if part.is_inference() else part._version


class HeldProduct:
    """The product of a codec's stored tensors, kept for as long as those stay what they are."""

    def __init__(self) -> None:
        self._found: tuple[State, Product | None] | None = None

    def find(self, codec: Codec, parts: Mapping[str, Tensor], shape: Shape) -> Product | None:
        """The product, or None where there is none. Raises ValueError for a damaged stream."""
        if not _Switch.on:
            return None
        found = self._found
        if found is None or not unchanged(parts, found[0]):
            found = state_of(parts), product_of(codec, parts, shape)
            self._found = found
        return found[1]


def takes(x: Tensor) -> bool:
    """Whether products are for inputs like these: on the processor, of 16 or 32 bits, and no stand-ins."""
    return x.device.type == "cpu" and x.dtype in _FLOATS and type(x) in _TENSORS


def multiplied(product: Product, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x (tokens, in)`` times the weight, plus ``bias (out,)``: computed in float32, in the dtype of ``x``."""
    y = products.multiply(product, x.detach().float())
    if bias is not None:
        y += bias.detach()
    return y.to(x.dtype)
