"""A model of transformers whose forward is a compiled step, so that all of ``generate`` works and only runs faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from tersor.errors import NotFinite
from tersor.runtime.decoding import Decoder
from tersor.runtime.decoding.decoder import CHUNK

_PIECE = 4 * CHUNK
"""Tokens of a prompt between two looks at whether to go on."""


class Quick:
    """Stands in for a model's forward, for one text at a time and without transformers' cache.

    ``generate`` is to run with ``use_cache=False``: it then gives the whole text at each token, and what the decoder
    has of it is not run again. ``go_on`` is called now and then and raises to stop.

    Of the text before, whole chunks of its prompt are kept where the next one begins alike. Such a chunk was computed
    as it would be now, number by number, so that a text does not depend on what was asked before it.
    """

    def __init__(self, decoder: Decoder, go_on: Callable[[], None]) -> None:
        self._decoder = decoder
        self._go_on = go_on
        self._ids: list[int] = []
        self._chunked = 0
        self._begins = True

    def begin(self) -> None:
        """What comes next is another request, whatever its text."""
        self._begins = True

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **_options: Any) -> CausalLMOutputWithPast:
        """Logits ``(1, 1, vocabulary)`` float32 after the last of ``input_ids (1, tokens)``. Raises NotFinite."""
        ids = input_ids[0].tolist()
        if self._begins or ids[:-1] != self._ids:
            known = min(_common(self._ids[: self._chunked], ids[:-1]), self._decoder.position) // CHUNK * CHUNK
            self._decoder.rewind(known)
            self._begins, self._chunked = False, len(ids) // CHUNK * CHUNK
        else:
            known = len(ids) - 1
        # Until all of it is in, nothing is known of it: the decoder may stop anywhere.
        self._ids = ids[:known]
        for start in range(known, len(ids), _PIECE):
            self._go_on()
            logits = self._decoder.feed(ids[start : start + _PIECE])
            self._ids = ids[: start + _PIECE]
        if not bool(logits.max().isfinite()):
            self._ids = []  # nothing is taken over from this text
            raise NotFinite("The model gave logits that are not finite numbers.")
        return CausalLMOutputWithPast(logits=logits.clone()[None, None])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)
