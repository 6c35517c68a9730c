"""A model run block by block as engines run it that round what enters a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tersor.contracts import Anatomy, Layer, Rounding
from tersor.runtime.residence import Load
from tersor.runtime.stream import BlockStream


class RoundedStream(BlockStream):
    """A :class:`BlockStream` in which the inputs of layers other than experts are rounded before they are multiplied.

    ``rounding(layer)``: what is done to inputs ``(..., in)`` of a layer's products, or None. Of an embedding it is
    asked where that is the head too, for what the head multiplies.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        load: Load,
        rounding: Callable[[Layer], Rounding | None],
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(model, anatomy, load, dtype=dtype)
        for layer in anatomy.layers:
            owner = self._multiplying(anatomy, layer)
            found = None if owner is None else rounding(layer)
            if owner is not None and found is not None:
                owner.register_forward_pre_hook(_before(found))

    def _multiplying(self, anatomy: Anatomy, layer: Layer) -> nn.Module | None:
        """The module of this stream that multiplies by a layer's weight alone; None where there is none."""
        if layer.block is not None:
            path = layer.name.removeprefix(f"{anatomy.blocks[layer.block]}.")
            return self._blocks[layer.block].get_submodule(path) if layer.kind in {"linear", "conv1d"} else None
        if layer.name != anatomy.head:
            return None
        parameter = layer.tied[0] if layer.tied else layer.parameter
        owner = self._back_model.get_submodule(parameter.rpartition(".")[0])
        return owner if isinstance(owner, nn.Linear) else None


def _before(rounding: Rounding) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, given: (rounding(given[0]), *given[1:])
