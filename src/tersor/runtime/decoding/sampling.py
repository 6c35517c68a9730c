"""The next token from logits, and text token by token."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tersor.errors import NotFinite


class Decodes(Protocol):
    """What :func:`write_on` needs of a decoder."""

    @property
    def room(self) -> int: ...

    def feed(self, ids: Sequence[int], /) -> Tensor: ...


_COLD = 1e-3
"""Below this temperature only the likeliest token is ever drawn, and scores may overflow."""


def likeliest(logits: Tensor) -> int:
    """The place of the greatest of ``logits (vocabulary,)``, the first of equals."""
    # numpy takes a tenth of the time that torch does, which is one per cent of a small model's step.
    return int(logits.detach().float().numpy().argmax())


class Chooser:
    """Picks a token: the likeliest at ``temperature`` 0, else one drawn by a generator of its own.

    ``top_k``: of the k likeliest alone (0: all). ``top_p``: of the fewest that together have this probability.
    """

    def __init__(self, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """The id chosen by ``logits (vocabulary,)``. Raises NotFinite where the greatest is not a finite number."""
        best = likeliest(logits)
        if not math.isfinite(logits[best].item()):
            raise NotFinite("The model gave logits that are not finite numbers.")
        if self.temperature < _COLD:
            return best
        scores = logits / self.temperature
        if self.top_k:
            least = scores.topk(min(self.top_k, len(scores))).values[-1]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered, places = scores.sort(descending=True)
            before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)
            before[0] = -1.0  # the likeliest stays, whatever the share
            scores = scores.index_fill(0, places[before >= self.top_p], -torch.inf)
        return int(torch.multinomial(scores.softmax(0), 1, generator=self._generator))


def write_on(
    decoder: Decodes, prompt: Sequence[int], choose: Chooser, *, tokens: int, stops: Collection[int]
) -> Iterator[int]:
    """Feed ``prompt``, then choose and feed up to ``tokens`` tokens, as long as there is room; gives each as it comes.

    The first of ``stops`` that is chosen is given and ends the text. The last token given has not been fed.
    """
    fed = prompt
    for _ in range(tokens):
        if len(fed) > decoder.room and fed is not prompt:
            return
        token = choose(decoder.feed(fed))
        yield token
        if token in stops:
            return
        fed = [token]
