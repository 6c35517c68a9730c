"""How group scales are stored: float16, bfloat16, or 8-bit codes under one float16 scale per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tersor.contracts import Part, Side

ScaleFormat = Literal["fp16", "bf16", "s8"]

# The least scale each format can hold above zero; a group of zeros gets it, so that no division by zero happens.
_LEAST = {"fp16": 2.0**-24, "bf16": 2.0**-120}
_MOST = {"fp16": 65504.0, "bf16": 3e38}
_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}


def scale_parts(rows: int, groups: int, form: ScaleFormat) -> tuple[Part, ...]:
    """The tensors that ``rows x groups`` scales are stored in."""
    if form == "s8":
        return (Part("scale", torch.uint8, (rows, groups)), Part("super", torch.float16, (rows, 1)))
    return (Part("scale", _DTYPE[form], (rows, groups)),)


def storable(scale: Tensor, form: ScaleFormat, top: Tensor | None = None) -> dict[str, Tensor]:
    """Positive scales ``(rows, groups)`` to the nearest ones that can be stored, as side information.

    The result has ``scale`` (float32, what decoding will see) and, for ``s8``, ``super (rows, 1)``. ``top`` keeps an
    already chosen ``super``; scales above what it reaches are clipped.
    """
    if form == "s8":
        if top is None:
            wanted = (scale.amax(1, keepdim=True) / 255.0).clamp(2.0**-24, 65504.0)
            top = wanted.to(torch.float16).to(torch.float32)
            # Rounding down could put the largest scale out of reach of code 255 by half a step, which is harmless.
        codes = torch.round(scale / top).clamp_(1, 255)
        return {"scale": codes * top, "super": top}
    return {"scale": scale.clamp(_LEAST[form], _MOST[form]).to(_DTYPE[form]).to(torch.float32)}


def pack_scales(side: Side, form: ScaleFormat) -> dict[str, Tensor]:
    """Side information from :func:`storable` to stored tensors; exact."""
    if form == "s8":
        top = side["super"]
        return {"scale": torch.round(side["scale"] / top).to(torch.uint8), "super": top.to(torch.float16)}
    return {"scale": side["scale"].to(_DTYPE[form])}


def unpack_scales(tensors: Mapping[str, Tensor], form: ScaleFormat) -> dict[str, Tensor]:
    """The inverse of :func:`pack_scales`."""
    scale = tensors["scale"].to(torch.float32)
    if form == "s8":
        top = tensors["super"].to(torch.float32)
        return {"scale": scale * top, "super": top}
    return {"scale": scale}
