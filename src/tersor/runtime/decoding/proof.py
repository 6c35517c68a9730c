"""That a decoder computes what its model does: logits of a fixed text from both."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tersor.errors import UnknownArchitecture
from tersor.runtime.packed import Packed

LENGTH = 40
"""Tokens of the text, where there is room for them: more than one chunk of a prompt."""
_STEPS = 2


class _Decodes(Protocol):
    context: int

    def feed(self, ids: list[int], /) -> Tensor: ...
    def rewind(self, position: int = 0) -> None: ...


def prove(model: Any, decoder: _Decodes, *, halves: bool = False) -> float:
    """Run a prompt and two more tokens through both; the greatest difference of logits, in their standard deviations.

    ``halves``: the decoder's cache is of float16. The bound is what rounding can do: of sums alone in a model of
    float32 (2e-5 was seen), of inputs to 16 bits where weights are packed (3e-3 was seen), of everything to the model's
    own type in one of 16 bits, where the proof says less. Raises UnknownArchitecture where logits are further apart.
    """
    expected = expected_logits(model, min(LENGTH, decoder.context))
    return compare(decoder, expected, min(LENGTH, decoder.context), bound(model, halves))


def expected_logits(model: Any, length: int) -> Tensor:
    """The model's own logits after the last tokens of the text of ``length``: of those that are fed one by one, and of
    the one before. ``(min(length, 3), vocabulary)`` float32. Raises UnknownArchitecture for any that is not finite.
    """
    ids = _text(model.get_output_embeddings().out_features, length)
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    if not bool(torch.isfinite(logits).all()):
        raise UnknownArchitecture("the model's own logits are not finite, so that nothing can be compared with them")
    return logits[-1 - _STEPS :].clone()


def compare(decoder: _Decodes, expected: Tensor, length: int, most: float) -> float:
    """Feed the text of ``length`` tokens, which the decoder forgets again; the greatest difference of logits.

    ``expected``: what :func:`expected_logits` gave. Raises UnknownArchitecture for a difference above ``most``.
    """
    ids = _text(expected.shape[1], length)
    worst, first = 0.0, 0
    for stop, own in zip(range(length - len(expected) + 1, length + 1), expected, strict=True):
        logits = decoder.feed(ids[first:stop])
        if not bool(torch.isfinite(logits).all()):
            raise UnknownArchitecture("a step of ours gave logits that are not finite")
        worst = max(worst, float((logits - own).abs().max() / own.std().clamp_min(1e-30)))
        first = stop
    decoder.rewind()
    if not worst <= most:
        raise UnknownArchitecture(
            f"a step of ours gives logits {worst:.2g} standard deviations from its own, and {most:g} is the most that "
            f"rounding explains"
        )
    return worst


def _text(vocabulary: int, length: int) -> list[int]:
    return [(7919 * i * i + 104729 * i + 31) % vocabulary for i in range(length)]


def bound(model: Any, halves: bool) -> float:
    """The most that rounding explains; ``halves`` as for :func:`prove`."""
    if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters()):
        return 2e-1
    rounds = halves or any(isinstance(module, Packed) for module in model.modules())
    return 3e-2 if rounds else 2e-3
