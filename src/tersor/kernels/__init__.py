"""Inner loops: compiled where a compiler was there at installation, plain torch otherwise. Same results either way.

``compiled`` says which. The functions take chunks of rows and use one thread; callers run several chunks at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.contracts import ScalarGrid
from tersor.kernels import reference
from tersor.kernels.reference import fit_table, nearest

try:
    from tersor.kernels import _cpu  # type: ignore[attr-defined]
except ImportError:
    _cpu = None

compiled: bool = _cpu is not None

__all__ = ["compiled", "fit_signed", "fit_table", "fit_uniform", "moment", "nearest", "sequential_round"]


def sequential_round(
    target: Tensor, reference_weight: Tensor, mixing: Tensor, grid: ScalarGrid, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`tersor.kernels.reference.sequential_round`."""
    if _cpu is None:
        return reference.sequential_round(target, reference_weight, mixing, grid, columns)
    target = target.contiguous()
    codes = torch.empty(target.shape, dtype=torch.int32)
    values = torch.empty_like(target)
    moved = torch.empty_like(target)
    _cpu.sequential_round(
        target,
        reference_weight.contiguous(),
        mixing.contiguous(),
        columns // grid.group,
        grid.scale.contiguous(),
        None if grid.zero is None else grid.zero.contiguous(),
        None if grid.table is None else grid.table.contiguous(),
        grid.levels,
        codes,
        values,
        moved,
        None if grid.offset is None else grid.offset.contiguous(),
    )
    return codes, values, moved


def fit_uniform(
    weight: Tensor, importance: Tensor, *, levels: int, asymmetric: bool, shrinks: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`tersor.kernels.reference.fit_uniform`."""
    if _cpu is None:
        return reference.fit_uniform(weight, importance, levels=levels, asymmetric=asymmetric, shrinks=shrinks)
    scale = torch.empty(weight.shape[0])
    zero = torch.empty(weight.shape[0])
    _cpu.fit_uniform(
        weight.contiguous(), importance.contiguous(), levels, asymmetric, shrinks.contiguous(), scale, zero
    )
    return scale, zero


def fit_signed(weight: Tensor, importance: Tensor, *, bits: int, reaches: Tensor) -> Tensor:
    """See :func:`tersor.kernels.reference.fit_signed`."""
    if _cpu is None:
        return reference.fit_signed(weight, importance, bits=bits, reaches=reaches)
    scale = torch.empty(weight.shape[0])
    _cpu.fit_signed(weight.contiguous(), importance.contiguous(), bits, reaches.contiguous(), scale)
    return scale


def moment(inputs: Tensor) -> Tensor:
    """See :func:`tersor.kernels.reference.moment`; with products of bfloat16 where the processor has them.

    They are exact in float32, so that only the order of sums differs.
    """
    if inputs.dtype != torch.bfloat16 or _cpu is None or not _cpu.multiplies_bfloat16():
        return reference.moment(inputs)
    sums = torch.empty(inputs.shape[1], inputs.shape[1])
    _cpu.bfloat16_moment(inputs.contiguous().view(torch.uint16).numpy(), sums)
    return sums
