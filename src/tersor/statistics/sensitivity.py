"""How much each layer's error matters: second-order estimates of KL from one backward pass.

To second order the KL of a perturbed model is ``½ δᵀ F δ`` per token, ``F`` the Fisher information of the next-token
distribution. For an error ``E`` of one layer with inputs ``x`` and output gradients ``g`` (of the log-likelihood of
labels *sampled from the model*, which makes it the true Fisher, arXiv:2002.08056 §2) this is ``½ E[(gᵀ E x)²]``; taking
gradients and inputs as independent, and gradients as uncorrelated between rows (K-FAC's assumption with a diagonal
output side, arXiv:1503.05671), it becomes ``½ Σ_r E[g_r²] · e_r H e_rᵀ``: the layer objective with row weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from tersor.contracts import Gram, Layer
from tersor.parallel import in_order
from tersor.statistics.collect import Lookup, OutputMoments, Watch
from tersor.statistics.sampling import draw

ROWS = 4096
"""Rows turned to float32 at a time, so that an embedding is never there twice."""
_HEAD_TOKENS = 256
"""Positions whose logits are there at one time; the loss is a sum over positions, so its gradient comes in pieces."""


@dataclass(frozen=True)
class Objective:
    """The quadratic form that prices a layer's error in nats of KL per token: ``D(E) = Σ_r rows_r · e_r H e_rᵀ``.

    ``rows (out,)`` float32; ``gram`` of the layer's input. Where rows are looked up, as in an embedding, there is a
    second term ``Σ_r lookups_r · Σ_j e_rj² c_j``, ``lookups (out,)`` and ``moment (in,)`` its ``c``.
    """

    rows: Tensor
    gram: Gram
    lookups: Tensor | None = None
    moment: Tensor | None = None

    def distortion(self, error: Tensor, rows: Tensor | None = None) -> Tensor:
        """Price of each row of ``error (n, in)``; ``rows``: which rows these are, default all."""
        weights = self.rows if rows is None else self.rows[rows]
        price = ((error @ self.gram.matrix) * error).sum(1) * weights
        if self.lookups is None or self.moment is None:
            return price
        return price + (error.square() @ self.moment) * (self.lookups if rows is None else self.lookups[rows])

    def rounding(self, weight: Tensor, text: str) -> float:
        """Price of the engine's rounding of what it multiplies by ``weight (out, in)`` in the codec ``text``.

        Errors of inputs are taken as independent of each other and of the weight's: ``Σ_r rows_r Σ_j w_rj² n_j``.
        """
        noise = self.gram.noise.get(text)
        if noise is None:
            return 0.0
        pieces = (slice(start, start + ROWS) for start in range(0, weight.shape[0], ROWS))
        return math.fsum(float(self.rows[at] @ (weight[at].float().square() @ noise)) for at in pieces)

    def stretch(self, start: int, stop: int) -> Objective:
        """The same for rows ``start`` to ``stop`` alone."""
        lookups = None if self.lookups is None else self.lookups[start:stop]
        return Objective(self.rows[start:stop], self.gram, lookups, self.moment)


def backward_block(
    run: Callable[[Tensor], Tensor],
    inputs: Callable[[int], Tensor],
    gradients: Callable[[int], Tensor],
    chunks: int,
    weights: Mapping[Layer, Tensor],
    *,
    workers: int,
    keep: Callable[[int, Tensor], None],
) -> OutputMoments:
    """One block's step of the backward pass: gradients at its output in, gradients at its input out.

    ``inputs(chunk)`` and ``gradients(chunk)`` give the block's stored inputs and the gradient arriving at its outputs,
    ``(B, T, d)``; ``keep(chunk, gradient)`` receives the gradient at its inputs. The block is run again with gradients
    on, so that nothing but block inputs need be stored.
    """

    def work(chunk: int) -> tuple[OutputMoments, Tensor]:
        moments = OutputMoments()
        hidden = inputs(chunk).clone().requires_grad_(True)
        with torch.enable_grad():
            with Watch(weights, moments.see):
                output = run(hidden)
            torch.autograd.backward(output, gradients(chunk).to(output.dtype))
        assert hidden.grad is not None
        return moments, hidden.grad

    total = OutputMoments()
    for chunk, (moments, gradient) in enumerate(in_order(work, chunks, workers)):
        total.add(moments)
        keep(chunk, gradient)
    return total


def weight_energies(
    run: Callable[[Tensor], Tensor],
    inputs: Callable[[int], Tensor],
    gradients: Callable[[int], Tensor],
    chunks: int,
    weights: Mapping[Layer, Tensor],
    *,
    workers: int,
    keep: Callable[[int, Tensor], None],
) -> dict[Layer, Tensor]:
    """A step of the backward pass as in :func:`backward_block`; gives the squared gradient by each single weight.

    Each sequence has a gradient of its own, and their squares are summed: ``Σ_n (∂L_n / ∂w)²``, float32, in the shapes
    of ``weights``. Weights that a sequence does not use have none.
    """
    wanted = list(weights.values())
    before = [weight.requires_grad for weight in wanted]
    for weight in wanted:
        weight.requires_grad_(True)

    def work(chunk: int) -> tuple[list[Tensor], Tensor]:
        sums = [torch.zeros(weight.shape) for weight in wanted]
        states, arriving = inputs(chunk), gradients(chunk)
        left: list[Tensor] = []
        for row in range(len(states)):
            own = states[row : row + 1].clone().requires_grad_(True)
            with torch.enable_grad():
                output = run(own)
                above = arriving[row : row + 1].to(output.dtype)
                leaving, *found = torch.autograd.grad(output, [own, *wanted], above, allow_unused=True)
            left.append(leaving)
            for squares, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    squares.add_(gradient.float().square())
        return sums, torch.cat(left)

    totals = [torch.zeros(weight.shape) for weight in wanted]
    try:
        for chunk, (sums, leaving) in enumerate(in_order(work, chunks, workers)):
            for squares, more in zip(totals, sums, strict=True):
                squares.add_(more)
            keep(chunk, leaving)
    finally:
        for weight, wants in zip(wanted, before, strict=True):
            weight.requires_grad_(wants)
    return dict(zip(weights, totals, strict=True))


def backward_head(
    head: Callable[[Tensor], Tensor],
    inputs: Callable[[int], Tensor],
    chunks: int,
    weights: Mapping[Layer, Tensor],
    *,
    seed: int,
    workers: int,
    keep: Callable[[int, Tensor], None],
) -> OutputMoments:
    """The first step: labels sampled from the model's own distribution, gradient of their summed log-likelihood.

    Labels are drawn per chunk from a generator seeded by ``(seed, chunk)``.
    """

    def work(chunk: int) -> tuple[OutputMoments, Tensor]:
        moments = OutputMoments()
        hidden = inputs(chunk)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + chunk)
        gradient = torch.empty(hidden.shape, dtype=torch.float32)
        for row, start in product(range(hidden.shape[0]), range(0, hidden.shape[1], _HEAD_TOKENS)):
            here = (slice(row, row + 1), slice(start, start + _HEAD_TOKENS))
            piece = hidden[here].clone().requires_grad_(True)
            with torch.enable_grad():
                with Watch(weights, moments.see):
                    logits = head(piece)
                flat = logits.float().reshape(-1, logits.shape[-1])
                labels = draw(flat.detach(), generator)
                torch.nn.functional.cross_entropy(flat, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
            assert piece.grad is not None
            gradient[here] = piece.grad.float()
        return moments, gradient

    total = OutputMoments()
    for chunk, (moments, gradient) in enumerate(in_order(work, chunks, workers)):
        total.add(moments)
        keep(chunk, gradient)
    return total


def embedding_gradient(
    embed: Callable[[Tensor], Tensor], ids: Tensor, gradient: Tensor, weight: Tensor
) -> Tensor | None:
    """Gradient at the rows of ``weight`` that ``embed`` looks up, ``(B, T, e)``, before anything is done to them.

    ``gradient (B, T, d)``: at what ``embed(ids)`` gives, after scaling, positions, projections and norms. None when
    nothing is looked up in ``weight``.
    """
    with torch.enable_grad():
        with Lookup(weight) as lookup:
            hidden = embed(ids)
        if not lookup.rows:
            return None
        # Lookups that lead nowhere, of a model that tries itself out first, have none.
        found = torch.autograd.grad(hidden, lookup.rows, gradient.to(hidden.dtype), allow_unused=True)
    used = [part for part in found if part is not None]
    return torch.stack(used).sum(0) if used else None


def linear_objective(gram: Gram, moments: OutputMoments, layer: Layer, copy: int = 0) -> Objective:
    """The objective of a linear layer (or of one expert) from its Gram matrix and output gradients.

    The price is per token of text, so an expert's errors count by the share of tokens that choose it. A fallback of
    flat row weights is used where no gradient arrived.
    """
    key = (layer.name, copy)
    if key not in moments.sums or moments.tokens[key] == 0:
        return Objective(torch.full((layer.shape[0],), 1e-8), gram)
    return Objective(0.5 * moments.sums[key] / (moments.positions or moments.tokens[key]), gram)


def embedding_objective(
    energies: Tensor, moment: Tensor, *, head_gram: Gram | None = None, head_rows: Tensor | None = None
) -> Objective:
    """The price of errors in an embedding, and in the head too where the two are tied.

    As an embedding, an error in row ``v`` costs ``½ a_v Σ_j e_vj² c_j / c̄``: ``c (in,)`` is the second moment of the
    gradient at the embedding's output, ``c̄`` its mean, and ``a_v`` (``energies``) the part of ``c̄`` that comes from
    positions holding token ``v``. Rare tokens have larger gradients than common ones, so their frequency would not do:
    it understates the rare half of the reference model's vocabulary threefold. As a head it costs
    ``½ g_v · e_v H e_vᵀ``, ``g_v`` the second moment of the logit's gradient, ``E[p_v (1 − p_v)]``.
    """
    unit = moment / moment.mean().clamp(min=1e-30)
    if head_gram is None or head_rows is None:
        return Objective(torch.zeros_like(energies), Gram(torch.diag(moment), 0), 0.5 * energies, unit)
    return Objective(0.5 * head_rows, head_gram, 0.5 * energies, unit)


def embedding_gram(moment: Tensor, *, head_gram: Gram | None = None, head_rows: Tensor | None = None) -> Gram:
    """The matrix that a solver rounds an embedding with: both roles, summed over rows, ``Σg · H + diag(c)``."""
    if head_gram is None or head_rows is None:
        return Gram(torch.diag(moment), 0)
    return Gram(head_rows.sum() * head_gram.matrix + torch.diag(moment), head_gram.tokens)


def token_energies(ids: Tensor, gradient: Tensor, vocabulary: int) -> Tensor:
    """``Σ over positions holding token v of mean_j g_j²``, ``(vocabulary,)`` float64.

    ``ids (B, T)``; ``gradient (B, T, in)`` at the embedding's output.
    """
    energy = gradient.double().square().mean(-1).reshape(-1)
    return torch.zeros(vocabulary, dtype=torch.float64).index_add_(0, ids.reshape(-1), energy)


__all__ = [
    "ROWS",
    "Objective",
    "backward_block",
    "backward_head",
    "embedding_gradient",
    "embedding_gram",
    "embedding_objective",
    "linear_objective",
    "token_energies",
]
