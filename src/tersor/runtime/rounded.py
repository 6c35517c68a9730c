"""A model run block by block as engines run it that round what enters a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tersor.contracts import Anatomy, Layer
from tersor.runtime.residence import Load
from tersor.runtime.stream import BlockStream


class RoundedStream(BlockStream):
    """A :class:`BlockStream` in whose blocks the inputs of layers are rounded before they are multiplied.

    ``rounding(layer)``: what is done to inputs ``(..., in)`` of a linear layer, or None; asked for whenever a block is
    loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        load: Load,
        rounding: Callable[[Layer], Callable[[Tensor], Tensor] | None],
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(model, anatomy, load, dtype=dtype)
        self._anatomy, self._rounding = anatomy, rounding

    @contextmanager
    def block(self, k: int) -> Iterator[nn.Module]:
        with super().block(k) as module:
            handles = []
            for layer in self._anatomy.layers_of(k):
                found = self._rounding(layer) if layer.kind == "linear" else None
                if found is not None:
                    owner = module.get_submodule(layer.name.removeprefix(f"{self._anatomy.blocks[k]}."))
                    handles.append(owner.register_forward_pre_hook(_before(found)))
            try:
                yield module
            finally:
                for handle in handles:
                    handle.remove()


def _before(rounding: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, given: (rounding(given[0]), *given[1:])
