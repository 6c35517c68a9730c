"""What codecs look like from outside: a codec's tensors inside another's, and whether a layer is one stream."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tersor.contracts import Codec, Shape


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def streamed(codec: Codec, shape: Shape) -> bool:
    """Whether nothing of what is stored belongs to single rows: any of them takes decoding the whole layer."""
    return all(part.shared for part in codec.parts(shape))
