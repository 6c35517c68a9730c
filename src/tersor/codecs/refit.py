"""Least squares for side information that the decoded weight is linear in (scales, table entries), codes fixed."""

from __future__ import annotations

import torch
from torch import Tensor

_ENTRIES = 1 << 20
"""Entries of normal matrices that are factored at one time."""


def least_squares(normal: Tensor, right: Tensor) -> Tensor:
    """Solutions ``(rows, n)`` of ``A s = b`` for each row: ``normal (rows, n, n)``, ``right (rows, n)``.

    A whisper of damping keeps entries that nothing depends on from blowing up; rows that cannot be solved give NaN.
    """
    rows = max(1, _ENTRIES // normal[0].numel()) if len(normal) else 1
    return torch.cat([_solve(*pair) for pair in zip(normal.split(rows), right.split(rows), strict=True)])  # type: ignore[no-untyped-call]


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    damped = normal.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True) + 1e-30)
    solution, failed = torch.linalg.solve_ex(damped, right)
    return torch.where((failed == 0)[:, None], solution, torch.nan)


def quadratic(normal: Tensor, right: Tensor, solution: Tensor) -> Tensor:
    """The objective ``sᵀ A s − 2 bᵀ s`` of each row, ``(rows,)``."""
    return ((solution[:, None] @ normal).squeeze(1) * solution).sum(1) - 2 * (right * solution).sum(1)
