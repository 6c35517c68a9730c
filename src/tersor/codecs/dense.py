"""Weights kept as bfloat16 or float16: the codec for what is not worth compressing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.codecs.text import Words, reads
from tersor.contracts import DirectCodec, Gram, Part, Shape
from tersor.errors import BadInput

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Dense(DirectCodec):
    """``form`` is ``bf16`` or ``fp16``. Values outside float16's range are clipped to it."""

    form: str = "bf16"

    def __post_init__(self) -> None:
        if self.form not in _DTYPES:
            raise BadInput(f"Codec {self.form} does not exist: kept weights are bf16 or fp16.")

    def __str__(self) -> str:
        return self.form

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        return (Part("weight", _DTYPES[self.form], shape),)

    def encode(self, weight: Tensor, gram: Gram | None = None) -> dict[str, Tensor]:
        if self.form == "fp16":
            weight = weight.clamp(-65504.0, 65504.0)
        return {"weight": weight.to(_DTYPES[self.form])}

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return tensors["weight"].to(torch.float32)


@reads(r"bf16|fp16", form="bf16, fp16", heads=("bf16", "fp16"))
def _read(words: Words) -> Dense:
    if words.options:
        raise words.refuse(f"kept weights have no options; write {words.head[0]}.")
    return Dense(words.head[0])
