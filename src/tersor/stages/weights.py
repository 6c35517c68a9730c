"""Stage: a look at every weight before any work, so that a damaged model stops the run at once and by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor.anatomy.shards import map_tensor
from tersor.errors import NotFinite
from tersor.parallel import in_order
from tersor.stages.context import Context

STAGE = "weights"
_DONE = "weights.json"


def check_finite(context: Context) -> None:
    """Read every tensor that the artifact will need, once. Raises NotFinite naming the first with NaN or Inf."""
    if context.work.has(_DONE):
        return
    tensors = context.source.tensors
    needed = {fate.name for fate in context.anatomy.tensors if fate.fate in ("encoded", "kept")}
    names = [name for name, info in tensors.items() if any(part.name in needed for part in info.stored)]

    def work(index: int) -> bool:
        return is_finite(map_tensor(tensors[names[index]]))

    for index, finite in enumerate(in_order(work, len(names), context.workers)):
        if not finite:
            info = tensors[names[index]]
            bad = int((~torch.isfinite(map_tensor(info).float())).sum())
            raise NotFinite(
                f"Tensor {info.name} in {info.file} has NaN or Inf in {bad:,} of {math.prod(info.shape):,} places; the "
                f"model is damaged: copy or download it again, or give another one."
            )
        context.progress(STAGE, index + 1, len(names))
    context.work.save(_DONE, {"tensors": len(names)})


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or Inf; ``aminmax`` carries both along and is 30 times as fast as asking each value."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    small = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return all(bool(torch.isfinite(value)) for value in torch.aminmax(small))
