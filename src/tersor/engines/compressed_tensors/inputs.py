"""How inputs are rounded where a scheme asks for it, in the arithmetic of the library's quantizers (version 0.20)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from tersor.codecs import SignedInteger, SmallFloat
from tersor.contracts import Codec, Rounding

_LOW, _HIGH = -128.0, 127.0
_LARGEST = 448.0
"""Greatest number of ``float8_e4m3fn``."""


def rounding(codec: Codec, tensors: Callable[[], Mapping[str, Tensor]]) -> Rounding | None:
    """What a layer's inputs become before they are multiplied by its weight; None where nothing is done to them.

    ``tensors()``: the layer's, as ``codec`` declares them.
    """
    if isinstance(codec, SignedInteger) and codec.activations == 8 and codec.static:
        return partial(_by_one_scale, tensors()["input_scale"].float())
    return dynamic(codec)


def dynamic(codec: Codec) -> Rounding | None:
    """The same where scales are chosen as inputs arrive; None where a scale is stored, which no codec says."""
    if isinstance(codec, SignedInteger) and codec.activations == 8:
        return None if codec.static else _by_tokens
    return _as_floats if isinstance(codec, SmallFloat) else None


def _by_one_scale(scale: Tensor, x: Tensor) -> Tensor:
    """``x (..., in)`` as 8-bit integers times ``scale (1,)``."""
    return _codes(x, scale) * scale


def _by_tokens(x: Tensor) -> Tensor:
    """``x (..., in)`` as 8-bit integers, each token with the scale that its greatest magnitude asks for."""
    scale = _scale(x, (_HIGH - _LOW) / 2)
    return _codes(x, scale) * scale


def _as_floats(x: Tensor) -> Tensor:
    """``x (..., in)`` as 8-bit floats, likewise."""
    scale = _scale(x, _LARGEST)
    return (x / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).to(x.dtype) * scale


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).clamp(_LOW, _HIGH).round()


def _scale(x: Tensor, top: float) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / top
    return torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
