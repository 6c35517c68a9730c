"""What a layer's outputs amount to, from the Gram matrix of its inputs."""

from __future__ import annotations

from torch import Tensor

_STRIP = 256
"""Columns of a Gram matrix that are multiplied at one time where half of it is enough."""


def output_energy(rows: Tensor, matrix: Tensor) -> float:
    """``tr(M H Mᵀ)`` of ``rows (n, in)`` float32: the mean squared norm of what they put out.

    ``matrix (in, in)`` float32 is symmetric, so that what lies below its diagonal counts with what lies above.

    >>> import torch
    >>> output_energy(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.5], [0.5, 1.0]]))
    9.0
    """
    total = 0.0
    for start in range(0, len(matrix), _STRIP):
        stop = min(start + _STRIP, len(matrix))
        product = rows[:, start:stop] @ matrix[start:stop, start:]
        inside = (product[:, : stop - start] * rows[:, start:stop]).double().sum()
        beyond = (product[:, stop - start :] * rows[:, stop:]).double().sum()
        total += float(inside) + 2 * float(beyond)
    return total
