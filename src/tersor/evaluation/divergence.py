"""How far a compressed model's predictions are from its reference's, token by token.

Logits come in chunks of tokens and are reduced at once to a few numbers a token (13 bytes), so that the logits of a
whole text are never in memory. Within a chunk everything is float32; over tokens, float64, in the order of the text.
All logarithms are natural.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from tersor.contracts import Quality
from tersor.errors import BadInput, NotFinite

ENTRIES = 1 << 19
"""Logits of each model that are worked on at one time. Small, so that they stay in the cache between passes: ten rows
of a vocabulary of 49 152 take 0.33 ms a row, twenty 1.2 ms."""
EDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Bounds in nats between the classes of token divergence in :attr:`DivergenceDetail.buckets`."""
LARGEST_EXPONENT = 700.0
"""Mean losses above it (a model that is noise) give the perplexity of this one, since more is not a float64."""

LogitChunk: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Reference logits ``(n, vocabulary)``, compressed logits likewise, next tokens ``(n,)`` int64."""


@dataclass(frozen=True, eq=False)
class TokenComparison:
    """What is kept of successive tokens of one sequence, ``(n,)`` each, on the CPU.

    ``kl``: KL(reference ‖ compressed) of the next-token distributions, float32 nats. ``reference_loss`` and ``loss``:
    −log probability that each gave to the token that came, float32. ``agrees``: same most likely token, bool.
    """

    kl: Tensor
    reference_loss: Tensor
    loss: Tensor
    agrees: Tensor

    @property
    def tokens(self) -> int:
        return self.kl.numel()

    def __add__(self, after: TokenComparison) -> TokenComparison:
        """These tokens and the ones that come ``after`` them in the same sequence."""
        return join([self, after])


def join(parts: Sequence[TokenComparison]) -> TokenComparison:
    """Successive stretches of one sequence as one."""
    return TokenComparison(
        torch.cat([part.kl for part in parts]),
        torch.cat([part.reference_loss for part in parts]),
        torch.cat([part.loss for part in parts]),
        torch.cat([part.agrees for part in parts]),
    )


def compare_logits(reference: Tensor, compressed: Tensor, targets: Tensor) -> TokenComparison:
    """Compare next-token logits ``(n, vocabulary)`` of two models; ``targets (n,)`` are the tokens that came.

    The divergence of a token is ``Σ p·x + q − p`` with ``x = log p − log q``: equal to ``Σ p·x``, since both
    distributions sum to one, but with every term ≥ 0, so that the rounding of the two normalisations enters in second
    order only. Identical logits give exactly 0.

    Raises BadInput when shapes differ, NotFinite when logits have NaN or infinities (−inf in both, for tokens that
    neither model can give, is allowed).
    """
    if reference.ndim != 2 or reference.shape != compressed.shape or targets.shape != reference.shape[:1]:
        raise BadInput(
            f"Logits of shape {tuple(reference.shape)} and {tuple(compressed.shape)} cannot be compared on targets of "
            f"shape {tuple(targets.shape)}; expected (n, vocabulary) twice and (n,)."
        )
    rows = max(1, ENTRIES // max(1, reference.shape[1]))
    parts = [
        _compare_rows(reference[at : at + rows], compressed[at : at + rows], targets[at : at + rows])
        for at in range(0, reference.shape[0], rows)
    ]
    return join(parts) if parts else TokenComparison(*(torch.empty(0),) * 3, torch.empty(0, dtype=torch.bool))


def _compare_rows(reference: Tensor, compressed: Tensor, targets: Tensor) -> TokenComparison:
    reference, compressed = reference.float(), compressed.float()
    log_p, log_q = torch.log_softmax(reference, dim=-1), torch.log_softmax(compressed, dim=-1)
    index = targets.to(log_p.device)[:, None]
    losses = [-log.gather(1, index).squeeze(1).cpu() for log in (log_p, log_q)]
    agrees = (reference.argmax(-1) == compressed.argmax(-1)).cpu()
    found = TokenComparison(_divergence(log_p, log_q).cpu(), losses[0], losses[1], agrees)
    if not all(bool(torch.isfinite(values).all()) for values in (found.kl, found.reference_loss, found.loss)):
        raise NotFinite(_reason(reference, compressed))
    return found


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``Σ p·(log p − log q) + q − p`` over the last dimension.

    ``p`` must be the exponential of ``log_p``, not a softmax of its own: only then do the rounding errors of the
    normalisation cancel in first order.
    """
    p, q = log_p.exp(), log_q.exp()
    terms = (log_p - log_q).mul_(p)
    kl = (terms + q).sub_(p).sum(-1)
    if torch.isnan(kl).any():
        # Tokens that a model can never give: 0·∞ is 0 here. Rare, and the mask costs a tenth of the time.
        kl = terms.masked_fill_(p == 0, 0.0).add_(q).sub_(p).sum(-1)
    return kl.clamp_(min=0.0)


def _reason(reference: Tensor, compressed: Tensor) -> str:
    """Why some result is not finite."""
    for logits, which in ((reference, "reference"), (compressed, "compressed")):
        bad = torch.isnan(logits) | (logits == math.inf)
        if bad.any():
            return (
                f"The {which} model's logits have NaN or +inf for {int(bad.any(-1).sum())} of {len(logits)} tokens; "
                f"its predictions cannot be compared."
            )
    return (
        "A divergence or loss is infinite: a model gives probability 0 to a token that came or that the reference "
        "thinks possible; check its logits for −inf."
    )


def compare_sequence(chunks: Iterable[LogitChunk]) -> TokenComparison:
    """One sequence whose logits come in chunks of successive tokens. Raises what :func:`compare_logits` does."""
    parts = [compare_logits(reference, compressed, targets) for reference, compressed, targets in chunks]
    if not parts:
        raise BadInput("A sequence without tokens cannot be compared; give at least one chunk of logits.")
    return join(parts)


@dataclass(frozen=True)
class Bucket:
    """Tokens whose divergence is in ``[low, high)`` nats, without upper bound when ``high`` is None.

    ``share_of_tokens``, ``share_of_kl``: their part of all tokens, and of the total divergence.
    """

    low: float
    high: float | None
    tokens: int
    share_of_tokens: float
    share_of_kl: float


@dataclass(frozen=True)
class DivergenceDetail:
    """What :class:`~tersor.contracts.Quality` has no room for; nats per token.

    ``median``, ``p99``, ``largest``: of token divergences. ``loss_difference`` and ``loss_difference_error``: mean of
    compressed minus reference loss, and its standard error. ``top1_error``: standard error of the agreement.
    ``sequences``: mean divergence of each sequence, in order.
    """

    median: float
    p99: float
    largest: float
    loss_difference: float
    loss_difference_error: float
    top1_error: float
    buckets: tuple[Bucket, ...]
    sequences: tuple[float, ...]


@dataclass
class DivergenceAccumulator:
    """Gathers the comparisons of whole sequences, from any number of workers.

    Results depend only on which comparison has which sequence number, not on the order in which they were added.
    """

    _sequences: dict[int, TokenComparison] = field(default_factory=dict)

    def add(self, comparison: TokenComparison, sequence: int | None = None) -> None:
        """Add one sequence. ``sequence``: its number in the text; default: the one after the highest so far.

        Raises BadInput when that number is there already, or the sequence has no tokens.
        """
        number = max(self._sequences, default=-1) + 1 if sequence is None else sequence
        if number in self._sequences:
            raise BadInput(f"Sequence {number} was compared twice; give each sequence a number of its own.")
        if comparison.tokens == 0:
            raise BadInput(f"Sequence {number} has no tokens to compare; leave it away.")
        self._sequences[number] = comparison

    def merge(self, other: DivergenceAccumulator) -> None:
        """Add the sequences of another accumulator. Raises BadInput when both have a number."""
        for number, comparison in other._ordered():
            self.add(comparison, number)

    def quality(self, text: str) -> Quality:
        """Means over all tokens. ``text``: which text it was. Raises BadInput when nothing was added."""
        kl, kl_error = self._mean("kl")
        loss, _ = self._mean("loss")
        reference_loss, _ = self._mean("reference_loss")
        return Quality(
            kl=kl,
            kl_error=kl_error,
            perplexity=math.exp(min(loss, LARGEST_EXPONENT)),
            reference_perplexity=math.exp(min(reference_loss, LARGEST_EXPONENT)),
            top1=self._mean("agrees")[0],
            tokens=sum(comparison.tokens for _, comparison in self._ordered()),
            text=text,
        )

    def detail(self) -> DivergenceDetail:
        """Distribution over tokens and sequences. Raises BadInput when nothing was added."""
        means = tuple(float(comparison.kl.double().mean()) for _, comparison in self._ordered())
        difference, difference_error = self._mean("loss", minus="reference_loss")
        top1_error = self._mean("agrees")[1]
        kl = torch.cat([comparison.kl for _, comparison in self._ordered()]).double()
        ranked = kl.sort().values
        return DivergenceDetail(
            median=_quantile(ranked, 0.5),
            p99=_quantile(ranked, 0.99),
            largest=float(ranked[-1]),
            loss_difference=difference,
            loss_difference_error=difference_error,
            top1_error=top1_error,
            buckets=tuple(_buckets(kl)),
            sequences=means,
        )

    def _ordered(self) -> list[tuple[int, TokenComparison]]:
        return sorted(self._sequences.items())

    def _mean(self, name: str, minus: str | None = None) -> tuple[float, float]:
        """Mean over tokens of one of the values (or of a difference of two), and its standard error."""
        if not self._sequences:
            raise BadInput("No sequence was compared, so there is nothing to report; give at least one.")
        values = [getattr(comparison, name).double() for _, comparison in self._ordered()]
        if minus is not None:
            values = [
                value - getattr(comparison, minus).double()
                for value, (_, comparison) in zip(values, self._ordered(), strict=True)
            ]
        return mean_and_error(values)


def mean_and_error(sequences: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over the tokens of all ``sequences`` (float64, ``(n_i,)`` each), and its standard error.

    Tokens of a sequence are not independent, so the error comes from the spread of sequence means ``m_i``:
    ``sqrt(S / (S − 1) · Σ (n_i (m_i − m))²) / N``, which for equal lengths is their standard deviation over ``√S``. A
    single sequence has no such spread; its tokens are then taken as independent, which is too optimistic.

    >>> mean_and_error([torch.tensor([1.0, 3.0]), torch.tensor([4.0, 4.0])])
    (3.0, 1.0)
    """
    sums = torch.stack([sequence.sum() for sequence in sequences])
    counts = torch.tensor([sequence.numel() for sequence in sequences], dtype=torch.float64)
    total = float(counts.sum())
    mean = float(sums.sum()) / total
    if len(sequences) == 1:
        only = sequences[0]
        return mean, float(only.std(correction=1)) / math.sqrt(total) if total > 1 else 0.0
    spread = float(((sums - counts * mean) ** 2).sum()) * len(sequences) / (len(sequences) - 1)
    return mean, math.sqrt(spread) / total


def _quantile(ranked: Tensor, share: float) -> float:
    """Linear interpolation in sorted values; torch.quantile refuses more than 16 million."""
    place = share * (ranked.numel() - 1)
    low = math.floor(place)
    high = min(low + 1, ranked.numel() - 1)
    return float(ranked[low] + (ranked[high] - ranked[low]) * (place - low))


def _buckets(kl: Tensor) -> Iterator[Bucket]:
    total = float(kl.sum())
    bounds = (0.0, *EDGES, math.inf)
    for low, high in pairwise(bounds):
        inside = kl[(kl >= low) & (kl < high)]
        part = float(inside.sum()) / total if total > 0 else 0.0
        yield Bucket(low, None if math.isinf(high) else high, inside.numel(), inside.numel() / kl.numel(), part)


def noise_floor(sequences: Iterable[Iterable[tuple[Tensor, Tensor]]]) -> tuple[float, float]:
    """(mean KL, standard error) between the reference and itself in other arithmetic, say float32 and bfloat16.

    Divergences near it say nothing about the compression. ``sequences``: for each, chunks of logits
    ``(n, vocabulary)`` of the two variants. Raises BadInput when there are none.
    """
    accumulator = DivergenceAccumulator()
    for chunks in sequences:
        # The losses on given tokens are not needed here; any token serves.
        accumulator.add(compare_sequence((one, two, one.argmax(-1)) for one, two in chunks))
    floor = accumulator.quality("noise floor")
    return floor.kl, floor.kl_error
