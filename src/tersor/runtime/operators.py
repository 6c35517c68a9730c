"""Packed modules as torch's custom operators, so that ``torch.compile`` sees a model through without a break.

Operators take tensors and numbers alone: a packed module has a number, under which its operators find it. Each has a
fake version that says what comes out, and gradients for inputs and biases, which decode the weight anew.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tersor.runtime.packed import Packed

_PACKED: WeakValueDictionary[int, Packed] = WeakValueDictionary()
_NUMBERS = itertools.count(1)


def enter(packed: Packed) -> int:
    """A number for this module, under which operators find it for as long as it lives."""
    number = next(_NUMBERS)
    _PACKED[number] = packed
    return number


_LINEAR = "(Tensor x, Tensor? bias, int handle) -> Tensor"


@torch.library.custom_op("tersor::packed_linear", mutates_args=(), schema=_LINEAR)
def packed_linear(x: Tensor, bias: Tensor | None, handle: int) -> Tensor:
    """``x (..., in)`` times a packed module's weight, plus ``bias``: see :func:`tersor.runtime.packed.product`."""
    packed = _PACKED[handle]
    return packed.times(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], packed.stored_shape[0])


@torch.library.custom_op("tersor::packed_rows", mutates_args=(), schema="(Tensor ids, int handle) -> Tensor")
def packed_rows(ids: Tensor, handle: int) -> Tensor:
    """Rows ``ids (...)`` of a packed module's weight: see :meth:`tersor.runtime.packed.Packed.look_up`."""
    return _PACKED[handle].look_up(ids)


@torch.library.custom_op("tersor::packed_linear_back", mutates_args=(), schema="(Tensor grad, int handle) -> Tensor")
def packed_linear_back(grad: Tensor, handle: int) -> Tensor:
    """``grad (..., out)`` times the weight itself: ``(..., in)``."""
    packed = _PACKED[handle]
    flat = grad.reshape(-1, grad.shape[-1])
    return packed.times_transposed(flat).view(*grad.shape[:-1], packed.stored_shape[1])


@packed_linear.register_fake
def _(x: Tensor, _bias: Tensor | None, handle: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], _PACKED[handle].stored_shape[0]))


@packed_rows.register_fake
def _(ids: Tensor, handle: int) -> Tensor:
    packed = _PACKED[handle]
    return ids.new_empty((*ids.shape, packed.stored_shape[1]), dtype=packed.dtype)


@packed_linear_back.register_fake
def _(grad: Tensor, handle: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], _PACKED[handle].stored_shape[1]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor | None, int], output: Tensor) -> None:  # noqa: ARG001 (it is given by name)
    ctx.handle = inputs[2]


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    for_x = packed_linear_back(grad, ctx.handle) if ctx.needs_input_grad[0] else None
    for_bias = grad.sum(tuple(range(grad.ndim - 1))) if ctx.needs_input_grad[1] else None
    return for_x, for_bias, None


packed_linear.register_autograd(_back, setup_context=_keep)
