"""Embeddings of tokens, of which those of packed tables are remembered for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.runtime.packed import Packed

REMEMBERED = 4 << 20
"""Bytes of decoded rows that are kept. A row takes 50 us, or half a millisecond where no compiled code reads it, and
half of the tokens of a text have been in it not long before.
"""


class Embeddings:
    """Rows of a model's embedding as its module gives them, float32."""

    def __init__(self, module: Any, width: int) -> None:
        self._module: nn.Module = module
        self._packed = isinstance(module, Packed)
        self._most = max(REMEMBERED // (4 * width), 1)
        self._rows: OrderedDict[int, Tensor] = OrderedDict()

    def put(self, ids: Sequence[int], into: Tensor) -> None:
        """Write the rows of ``ids`` into ``into (n, width)``. Raises IndexError for an id that there is not."""
        if not self._packed:
            into.copy_(self._module(torch.tensor(ids)))
            return
        new = sorted({token for token in ids if token not in self._rows})
        if new:
            found = self._module(torch.tensor(new)).float()
            self._rows.update((token, row.clone()) for token, row in zip(new, found, strict=True))
        for place, token in enumerate(ids):
            into[place] = self._rows[token]
            self._rows.move_to_end(token)
        while len(self._rows) > self._most:
            self._rows.popitem(last=False)
