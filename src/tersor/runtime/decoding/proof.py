"""That a decoder computes what its model does: logits of a fixed text from both."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from tersor.errors import UnknownArchitecture
from tersor.runtime.packed import Packed

_LENGTH = 40  # more than one chunk of a prompt
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
    vocabulary = model.get_output_embeddings().out_features
    length = min(_LENGTH, decoder.context)
    ids = [(7919 * i * i + 104729 * i + 31) % vocabulary for i in range(length)]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    if not bool(torch.isfinite(expected).all()):
        raise UnknownArchitecture("the model's own logits are not finite, so that nothing can be compared with them")
    steps = min(_STEPS, length - 1)
    worst = 0.0
    for stop in range(length - steps, length + 1):
        first = 0 if stop == length - steps else stop - 1
        logits, own = decoder.feed(ids[first:stop]), expected[stop - 1]
        if not bool(torch.isfinite(logits).all()):
            raise UnknownArchitecture("a step of ours gave logits that are not finite")
        worst = max(worst, float((logits - own).abs().max() / own.std().clamp_min(1e-30)))
    decoder.rewind()
    bound = _bound(model, halves)
    if not worst <= bound:
        raise UnknownArchitecture(
            f"a step of ours gives logits {worst:.2g} standard deviations from its own, and {bound:g} is the most that "
            f"rounding explains"
        )
    return worst


def _bound(model: Any, halves: bool) -> float:
    if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in model.parameters()):
        return 2e-1
    rounds = halves or any(isinstance(module, Packed) for module in model.modules())
    return 3e-2 if rounds else 2e-3
