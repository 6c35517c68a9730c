"""Plain torch versions of :mod:`tersor.kernels.products_composed`: their specification.

A product is described by its weight ``(rows, columns)`` float32. ``x`` is ``(tokens, columns)`` float32, results are
``(tokens, rows)``; sums are in float64, from which those of the compiled products differ by their rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.kernels.givens import turn
from tersor.kernels.hadamard import rotate


def dense(weight: Tensor, x: Tensor) -> Tensor:
    """Of a weight kept as floats."""
    return (x.double() @ weight.double().T).float()


def sparse(values: Tensor, places: Tensor, starts: Tensor, x: Tensor) -> Tensor:
    """Of a few weights among zeros; those of the same place add up."""
    weight = torch.zeros(len(starts) - 1, x.shape[1])
    row = torch.repeat_interleave(torch.arange(len(weight)), starts.long().diff())
    here = slice(int(starts[0]), int(starts[-1]))
    weight.index_put_((row, places.to(torch.int32)[here].long()), values[here].float(), accumulate=True)
    return dense(weight, x)


def rotated(inner: Tensor, x: Tensor, seed: int = 0) -> Tensor:
    """Of the weight ``inner Qᵀ``, with the rotation applied to the inputs."""
    return dense(inner, rotate(x, seed))


def turned(inner: Tensor, x: Tensor, angles: Tensor) -> Tensor:
    """Of the weight ``inner Qᵀ``, with plane rotations of the inputs."""
    return dense(inner, turn(x, angles))


def scaled(inner: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Of the weight whose columns are multiplied by ``factor (columns,)``."""
    return dense(inner, x * factor)


def stacked(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Of weights that lie one below the other."""
    return torch.cat([dense(weight, x) for weight in weights], 1)


def total(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Of a sum of weights: outputs added up in order."""
    return side_by_side(weights, [torch.arange(x.shape[1])] * len(weights), x)


def side_by_side(weights: Sequence[Tensor], inputs: Sequence[Tensor], x: Tensor) -> Tensor:
    """Of weights of some of the inputs each: outputs added up in order."""
    result = torch.zeros(len(x), len(weights[0]))
    for weight, own in zip(weights, inputs, strict=True):
        result = result + dense(weight, x[:, own.long()])
    return result


def chain(first: Tensor, second: Tensor, x: Tensor) -> Tensor:
    """Of the weight ``second first``."""
    return dense(second, dense(first, x))
