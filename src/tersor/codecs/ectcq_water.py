"""What weights should be coded for, where a rate is too low for all directions of the input to get some of it.

The cheapest representation leaves directions alone whose energy is below a water level ``θ``, and moves all others a
little towards zero (reverse water-filling). Error feedback alone does neither: it codes weights as though
every direction were worth it. Both are had by feeding it other weights under another Gram matrix. For weights of unit
variance, rate and error balance at ``(W − V) (H/θ) (W − V)ᵀ + V Vᵀ``, which is ``(V − V*) (H/θ + I) (V − V*)ᵀ`` and a
constant, with ``V* = W − W θ (H + θ)⁻¹``: hence the Gram matrix ``H + θ``. Numbers that are near their targets on
average have shrunk a second time already, so weights go half of that way, ``W − ½ W θ (H + θ)⁻¹``: the square root of
the filter, as on either side of the channel that achieves the limit (Zamir, Kochman and Erez, arXiv:0707.3461). Levels
of their own for rows of less energy made real layers worse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.contracts import Encode, Gram

_ROUNDS = 4


def level(weight: Tensor, gram: Gram | None, rate: float, encode: Encode) -> tuple[Tensor, Gram | None]:
    """What to encode in the place of ``weight (out, in)``, and its Gram matrix, for ``rate`` bits a weight.

    Nothing changes without a Gram matrix, nor where one cannot be factored.
    """
    if gram is None or not weight.numel() or not float(gram.matrix.diagonal().min()) >= 0:
        return weight, gram
    raised = encode.transformed(gram, f"water:{rate}", lambda: _raised(gram, rate))
    if not raised.damped:
        return weight, gram
    half = encode.transformed(gram, f"water:{rate}:half", lambda: _half(gram, raised))
    return weight @ half.matrix, raised


def _raised(gram: Gram, rate: float) -> Gram:
    """``H + θ`` for the ``θ`` at which weights of unit variance take ``rate`` bits; ``H`` where it has no factor."""
    theta = float(gram.matrix.diagonal().double().mean()) * 4.0**-rate
    if not theta > 0:
        return gram
    for attempt in range(2 * _ROUNDS):
        lower, failed = torch.linalg.cholesky_ex(_plus(gram, theta))
        if int(failed):
            theta *= 4
        elif attempt < _ROUNDS:
            # The mean of log2((λ + θ) / θ) / 2 is the rate.
            theta = 4.0 ** (float(torch.log2(lower.diagonal()).mean()) - rate)
        else:
            return Gram(_plus(gram, theta).float(), gram.tokens, damped=True)
    return gram


def _half(gram: Gram, raised: Gram) -> Gram:
    """``I − ½ θ (H + θ)⁻¹``."""
    theta = float((raised.matrix.diagonal().double() - gram.matrix.diagonal().double()).mean())
    lower = torch.linalg.cholesky_ex(_plus(gram, theta))[0]
    half = torch.cholesky_inverse(lower).mul_(-0.5 * theta)
    half.diagonal().add_(1.0)
    return Gram(half.float(), gram.tokens)


def _plus(gram: Gram, theta: float) -> Tensor:
    """``H + θ`` in float64."""
    matrix = gram.matrix.double()
    matrix.diagonal().add_(theta)
    return matrix
