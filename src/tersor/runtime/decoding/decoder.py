"""A causal language model as a compiled step with a cache of fixed size, for one text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from tersor.errors import BadInput, UnknownArchitecture
from tersor.kernels import step as kernel
from tersor.runtime.decoding.build import Step, write_step
from tersor.runtime.decoding.embedding import Embeddings
from tersor.runtime.decoding.handed import find_handed
from tersor.runtime.decoding.proof import prove
from tersor.runtime.decoding.structure import find_structure

CHUNK = 32
"""Tokens of a prompt that are run at a time: enough that weights are read once for many, few enough for the caches."""


class Decoder:
    """Runs a model of transformers token by token, without Python between its layers.

    Made by :meth:`of`, which fails rather than give a decoder that has not reproduced the model's own logits. Weights
    are used where they lie in the model, which must not be changed or moved meanwhile. Computes in float32; inputs of
    products with packed weights are rounded to 16 bits, or to 8 with ``int8``. One caller at a time.
    """

    def __init__(self, model: Any, step: Step, context: int, *, int8: bool = False) -> None:
        self._embeddings = Embeddings(model.get_input_embeddings(), step.hidden.shape[1])
        self._step = step
        self._position = 0
        self.context = context
        self.int8 = int8
        self.difference = 0.0
        """How far logits were from the model's own in the proof, in standard deviations of these."""

    @classmethod
    def of(cls, model: Any, *, context: int, cache_dtype: torch.dtype = torch.float32, int8: bool = False) -> Decoder:
        """A decoder of texts of up to ``context`` tokens, proved on a fixed text.

        ``model``: a causal language model of transformers on the CPU, plain or packed. ``cache_dtype``: of keys and
        values, float32 or float16. Raises UnknownArchitecture where the model is not understood or gives other logits,
        with the reason as its message; BadInput for a context below 1.
        """
        if context < 1:
            raise BadInput(f"A context of {context} tokens has no room for any.")
        if not kernel.available:
            raise UnknownArchitecture("tersor was installed without a compiler")
        structure = find_structure(model)
        handed = find_handed(structure, model.config.get_text_config(), context)
        step = write_step(structure, handed, tokens=CHUNK, context=context, cache_dtype=cache_dtype)
        decoder = cls(model, step, context)
        decoder.difference = prove(model, decoder, halves=cache_dtype == torch.float16)
        decoder.int8 = int8
        return decoder

    @property
    def position(self) -> int:
        """Tokens that are in the cache."""
        return self._position

    @property
    def room(self) -> int:
        """Tokens that there is still room for."""
        return self.context - self._position

    def rewind(self, position: int = 0) -> None:
        """Forget all tokens from ``position`` on. Raises ValueError where there are fewer."""
        if not 0 <= position <= self._position:
            raise ValueError(f"cannot go back to {position} from {self._position}")
        self._position = position

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> Tensor:
        """Run tokens that follow those before; the logits ``(vocabulary,)`` float32 after the last of them.

        The tensor is the decoder's own and changes with the next call. Raises BadInput where there is no room for
        them, and ValueError for none.
        """
        if not ids:
            raise ValueError("there are no tokens to run")
        if len(ids) > self.room:
            raise BadInput(
                f"The text has become {self._position + len(ids)} tokens long, and there is room for {self.context}."
            )
        step = self._step
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            self._embeddings.put(chunk, step.hidden[: len(chunk)])
            last = start + len(chunk) == len(ids)
            for stretch in step.stretches if last else step.stretches[: step.head]:
                if stretch.host is not None:
                    stretch.host(len(chunk))
                else:
                    step.program.run(
                        stretch.first, stretch.stop, tokens=len(chunk), position=self._position, int8=self.int8
                    )
            self._position += len(chunk)
        return step.logits

    @torch.no_grad()
    def timings(self, token: int) -> dict[str, float]:
        """Seconds that a step with one token takes, by the kind of operation; the token is forgotten again."""
        step, seconds = self._step, dict.fromkeys(["embedding", *self._step.kinds], 0.0)
        start = perf_counter()
        self._embeddings.put([token], step.hidden[:1])
        seconds["embedding"] = perf_counter() - start
        for stretch in step.stretches:
            if stretch.host is not None:
                start = perf_counter()
                stretch.host(1)
                seconds["products"] = seconds.get("products", 0.0) + perf_counter() - start
                continue
            taken = step.program.run(
                stretch.first, stretch.stop, tokens=1, position=self._position, int8=self.int8, timed=True
            )
            for kind, value in zip(step.kinds[stretch.first : stretch.stop], taken, strict=True):
                seconds[kind] += value
        return seconds
