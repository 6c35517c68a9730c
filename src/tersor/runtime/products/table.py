"""Which codec's product is made how: a maker for each class of codecs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from tersor.contracts import Codec, Shape
from tersor.kernels import products
from tersor.kernels.products import Product

Parts = Mapping[str, Tensor]
Maker = Callable[[Any, Parts, Shape], Product | None]
_Made = TypeVar("_Made", bound=Maker)
_MAKERS: dict[type[Codec], Maker] = {}


def makes(*kinds: type[Codec]) -> Callable[[_Made], _Made]:
    """The function below makes products of these codecs, themselves and not classes derived from them.

    It is given the codec, its stored tensors by name and the weight's shape, and returns None where there is no product
    for what the codec or the shape is like.
    """

    def enter(maker: _Made) -> _Made:
        _MAKERS.update(dict.fromkeys(kinds, maker))
        return maker

    return enter


@torch.no_grad()
def product_of(codec: Codec, parts: Parts, shape: Shape) -> Product | None:
    """The product of a weight ``shape``, ``(out, in)``, from its codec's stored tensors; None where there is none.

    Stored tensors are used where they lie, and kept alive, as far as a product takes them as they are. Raises
    ValueError for a damaged stream.
    """
    maker = _MAKERS.get(type(codec))
    if maker is None or not products.available or 0 in shape:
        return None
    if any(part.device.type != "cpu" for part in parts.values()):
        return None
    return maker(codec, parts, shape)
