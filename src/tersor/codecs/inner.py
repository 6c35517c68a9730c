"""The tensors of a codec inside another: their names carry a prefix that the inner codec does not know."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
