"""The product that a packed module has, made when it is first used, and anew when its stored tensors are others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal
from weakref import ref

import torch
from torch import Tensor

from tersor.codecs import Dense, Integer, LookupTable, MicroFloat, NvFloat, RowFloat, SignedInteger, SmallFloat
from tersor.contracts import Codec, Shape
from tersor.kernels import products, products_composed
from tersor.kernels.products import Product
from tersor.runtime.products.table import product_of

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TENSORS = (Tensor, torch.nn.Parameter)
_DENSE, _QUICK = 48, 256
"""From how many tokens on decoding once and torch's bfloat16 product, where the machine has one, took less time than
ours: weights kept as floats, and codecs decoded in a few nanoseconds a weight. For all others from 1,500 tokens on."""
_QUICKLY_DECODED = (Integer, SignedInteger, LookupTable, SmallFloat, MicroFloat, NvFloat, RowFloat)


class _Switch:
    """One for the process, so that threads which a model is run in find it as it was set."""

    on = True
    bits = 16


@contextmanager
def decoded_only() -> Iterator[None]:
    """While this is open, packed modules use no compiled products: every weight is decoded, tile by tile."""
    before, _Switch.on = _Switch.on, False
    try:
        yield
    finally:
        _Switch.on = before


@contextmanager
def input_bits(bits: Literal[8, 16]) -> Iterator[None]:
    """While this is open, inputs of products with integer codes are rounded to so many bits: 16 unless told otherwise.

    With 8 an input moves by up to 1/254 of the greatest of its token, and large layers take less time.
    """
    before, _Switch.bits = _Switch.bits, bits
    try:
        yield
    finally:
        _Switch.bits = before


class HeldProduct:
    """The product of a codec's stored tensors, kept for as long as those stay what they are."""

    def __init__(self) -> None:
        # Of each stored tensor: its name, itself, where its numbers lie, and how often they were written to.
        self._state: tuple[tuple[str, ref[Tensor], int, int], ...] | None = None
        self._product: Product | None = None

    def find(
        self, codec: Codec, parts: Mapping[str, Tensor | None], names: tuple[str, ...], shape: Shape
    ) -> Product | None:
        """The product, or None where there is none. ``names``: of the stored tensors among ``parts``.

        Raises ValueError for a damaged stream.
        """
        if not _Switch.on:
            return None
        if self._state is None or not self._unchanged(parts):
            own = {name: part for name in names if (part := parts[name]) is not None}
            state = tuple((name, ref(part), part.data_ptr(), _version(part)) for name, part in own.items())
            self._product, self._state = product_of(codec, own, shape), state
        return self._product

    def _unchanged(self, parts: Mapping[str, Tensor | None]) -> bool:
        """Whether the stored tensors are the same ones, where they were, and as they were: loading fills them in place,
        and moving a module replaces them."""
        assert self._state is not None
        for name, was, at, version in self._state:
            part = parts[name]
            if part is None or was() is not part or part.data_ptr() != at or _version(part) != version:
                return False
        return True


def _version(part: Tensor) -> int:
    return 0 if part.is_inference() else part._version


def takes(codec: Codec, x: Tensor) -> bool:
    """Whether a product is for inputs ``x (tokens, in)``, and faster: they are on the processor, of 16 or 32 bits, no
    stand-ins for numbers, and not so many that decoding the weight once for all of them pays.
    """
    if not products.available or x.device.type != "cpu" or x.dtype not in _FLOATS or type(x) not in _TENSORS:
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if x.dtype != torch.bfloat16 or len(x) < _DENSE or not _multiplies_bfloat16():
        return True
    return type(codec) is not Dense and (len(x) < _QUICK or type(codec) not in _QUICKLY_DECODED)


@lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    return products_composed.multiplies_bfloat16()


def multiplied(product: Product, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x (tokens, in)`` times the weight, plus ``bias (out,)``: computed in float32, in the dtype of ``x``."""
    y = products.multiply(product, x if x.dtype == torch.float32 else x.float(), bits=_Switch.bits)
    if bias is not None:
        y += bias.detach()
    return y if x.dtype == torch.float32 else y.to(x.dtype)
