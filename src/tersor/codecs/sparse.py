"""A few weights kept as they are, the rest zero: the outliers of SqueezeLLM (arXiv:2306.07629, §4.2) and others.

Which ones, over the whole layer: those whose absence costs most, ``H_jj w²`` each; with ``:magnitude`` the largest;
with ``:gradient`` those that the loss is steepest in (GWQ, arXiv:2411.00850), which surveys measure. Stored in
compressed rows: float16 values, 16-bit column numbers, a 32-bit start for each row.

>>> Sparse(1.0).bits((64, 100)) // 8          # 64 entries of 4 bytes, 65 starts
516
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tersor.codecs.text import Words, reads
from tersor.contracts import DirectCodec, Gram, Part, Shape
from tersor.errors import BadInput, ShapeMismatch


@dataclass(frozen=True)
class Sparse(DirectCodec):
    """``percent`` of the layer's weights are kept, at least one."""

    percent: float
    by: Literal["cost", "magnitude", "gradient"] = "cost"

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 50:
            raise BadInput(f"Codec sparse{self.percent:g} does not exist: keep more than 0 and at most 50 percent.")

    def __str__(self) -> str:
        return f"sparse{self.percent:.6g}" + ("" if self.by == "cost" else f":{self.by}")

    def count(self, shape: Shape) -> int:
        """How many weights are kept."""
        return max(round(shape[0] * shape[1] * self.percent / 100), 1)

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        rows, columns = shape
        if columns > 65536:
            raise ShapeMismatch(f"Codec {self} cannot take a layer of {columns} inputs: it numbers at most 65536.")
        count = self.count(shape)
        return (
            Part("values", torch.float16, (count,), shared=True),
            Part("columns", torch.uint16, (count,), shared=True),
            Part("starts", torch.int32, (rows + 1,), shared=True),
        )

    def encode(self, weight: Tensor, gram: Gram | None = None) -> dict[str, Tensor]:
        rows, columns = weight.shape
        cost = self._cost(weight, gram)
        kept = torch.topk(cost.flatten(), self.count((rows, columns)), sorted=False).indices.sort().values
        counts = torch.bincount(kept // columns, minlength=rows)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return {
            "values": weight.flatten()[kept].clamp(-65504.0, 65504.0).to(torch.float16),
            "columns": (kept % columns).to(torch.int32).to(torch.uint16),
            "starts": starts.to(torch.int32),
        }

    def _cost(self, weight: Tensor, gram: Gram | None) -> Tensor:
        """What a weight must have most of to be kept."""
        if self.by == "gradient":
            if gram is None or gram.gradients is None:
                raise BadInput(
                    f"Codec {self} needs the gradient of the loss by every weight, which only surveys measure; write "
                    f"sparse{self.percent:.6g}, which goes by the inputs."
                )
            return gram.gradients
        return weight.square() if gram is None or self.by == "magnitude" else weight.square() * gram.matrix.diagonal()

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return self.decode_rows(tensors, shape, slice(None))

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        starts = tensors["starts"].to(torch.int64)
        device = starts.device
        numbers = torch.arange(shape[0], device=device)[rows]
        first, counts = starts[numbers], starts[numbers + 1] - starts[numbers]
        at = torch.repeat_interleave(torch.arange(len(numbers), device=device), counts)
        within = torch.arange(len(at), device=device) - (counts.cumsum(0) - counts)[at]
        entries = first[at] + within
        result = torch.zeros(len(numbers), shape[1], dtype=torch.float32, device=device)
        columns = tensors["columns"].to(torch.int32)[entries].long()
        result[at, columns] = tensors["values"][entries].to(torch.float32)
        return result


@reads(r"sparse(\d{1,2}(?:\.\d{1,6})?)", form="sparse<percent>[:magnitude|:gradient]", heads=("sparse",))
def _read(words: Words) -> Sparse:
    if words.arguments or words.options not in ((), ("magnitude",), ("gradient",)):
        raise words.refuse("write sparse<percent>, such as sparse0.5 or sparse0.5:magnitude.")
    return Sparse(float(words.head[1]), *words.options)  # type: ignore[arg-type]
