"""How llama.cpp rounds what it multiplies by a weight: to 8 bits, in blocks, by a rule of each of its types."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.contracts import Rounding

_SHORT = frozenset({"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"})
"""Types whose own blocks have 32 weights. All other quantized types have 256."""
_MOST = 127.0


def rounding(text: str) -> Rounding:
    """What becomes of inputs ``(..., in)`` of a layer of that type, as its program for processors computes products."""
    if text in ("bf16", "fp16"):
        return _as_bf16 if text == "bf16" else _as_fp16
    return _by_32 if text in _SHORT else _by_256


def _by_32(x: Tensor) -> Tensor:
    """Codes from -127 to 127; the scale of a block, in fp16, is what its greatest magnitude asks for."""
    parts = x.float().reshape(*x.shape[:-1], -1, 32)
    most = parts.abs().amax(-1, keepdim=True)
    codes = torch.round(parts * torch.where(most > 0, _MOST / most, 0.0))
    return torch.reshape(codes * (most / _MOST).half(), x.shape).to(x.dtype)


def _by_256(x: Tensor) -> Tensor:
    """Likewise, with a scale in float32. The input of greatest magnitude is -127."""
    parts = x.float().reshape(*x.shape[:-1], -1, 256)
    most = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    inverse = torch.where(most != 0, -_MOST / most, 0.0)
    codes = torch.round(parts * inverse).clamp(max=_MOST)
    return torch.reshape(codes * torch.where(most != 0, 1 / inverse, 0.0), x.shape).to(x.dtype)


def _as_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def _as_fp16(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(x.dtype)


__all__ = ["rounding"]
