"""The compiled product of a linear layer, on the weight where it lies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersor.kernels import products_composed
from tersor.kernels.products import Product
from tersor.runtime.packed import Packed, TiedLinear

_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def compiled_product(linear: nn.Module) -> Product | None:
    """A product with the layer's weight, or None where there is none for how it is stored."""
    packed = linear.source if isinstance(linear, TiedLinear) else linear
    if isinstance(packed, Packed):
        return packed.product()
    weight = linear.weight
    return products_composed.dense(weight) if isinstance(weight, Tensor) and weight.dtype in _TYPES else None
