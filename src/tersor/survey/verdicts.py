"""Whether what a paper says holds here: two measurements, their errors, and the bytes they took."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tersor.recipes import Claim, Recipe
from tersor.survey.records import Outcome

SLOPE = 2 * math.log(2)
"""Nats by which ln KL falls for one more bit per weight: 6.02 dB, the slope of every good quantizer at high rate."""
SIGMAS = 2.0
_FLOOR = 1e-12

Word = Literal["holds", "fails", "undecided", "untested"]


@dataclass(frozen=True)
class Verdict:
    """A claim at one number of bits.

    ``ratio``: recipe over baseline, at equal bytes; ``low`` and ``high``: two standard errors around it.
    ``correction``: the factor in ``ratio`` that stands for unequal bytes. ``why``: for what was not tested.
    """

    recipe: str
    claim: Claim
    bits: float
    word: Word
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    correction: float | None = None
    why: str = ""


def judge(claim: Claim, recipe: str, bits: float, mine: Outcome | None, theirs: Outcome | None) -> Verdict:
    """The verdict on ``claim`` of ``recipe``, from its outcome and its baseline's at ``bits``.

    Holds when the ratio is below the claim's by more than two standard errors, fails when it is above by as much.
    Output errors are those of one calibration text and have no error of their own; nor have perplexities. Bits that
    the claim grants the recipe beyond its baseline's are not corrected for.
    """
    first, second = _measured(mine, claim.metric), _measured(theirs, claim.metric)
    if mine is None or theirs is None or first is None or second is None:
        name, outcome = (recipe, mine) if first is None else (claim.baseline, theirs)
        what = "was not run" if outcome is None else f"was {outcome.status}"
        return Verdict(recipe, claim, bits, "untested", why=f"{name} {what} at {bits:g} bits")
    more = mine.rate - theirs.rate
    correction = SLOPE * (more - min(max(more, 0.0), claim.extra))
    centre = math.log(max(first, _FLOOR)) - math.log(max(second, _FLOOR)) + correction
    error = log_error(mine, theirs) if claim.metric == "kl" else 0.0
    low, high = centre - SIGMAS * error, centre + SIGMAS * error
    limit = math.log(claim.ratio)
    word: Word = "holds" if high < limit else "fails" if low > limit else "undecided"
    ratio, low, high, factor = (math.exp(min(value, 700.0)) for value in (centre, low, high, correction))
    return Verdict(recipe, claim, bits, word, ratio, low, high, factor)


def _measured(outcome: Outcome | None, metric: str) -> float | None:
    if outcome is None or outcome.status != "measured":
        return None
    return {"kl": outcome.kl, "output": outcome.output_error, "perplexity": outcome.perplexity}[metric]


def log_error(mine: Outcome, theirs: Outcome) -> float:
    """Standard error of ``ln(KL / KL)``.

    Both were measured on the same sequences, and hard ones are hard for both: leaving out one sequence after the other
    (the jackknife) gives the error of the ratio itself. Without sequences, both errors are added in quadrature.
    """
    pairs = list(zip(mine.sequences, theirs.sequences, strict=False))
    if len(mine.sequences) == len(theirs.sequences) and len(pairs) > 1:
        sums = [math.fsum(pair[side] for pair in pairs) for side in (0, 1)]
        logs = [
            math.log(max(sums[0] - first, _FLOOR)) - math.log(max(sums[1] - second, _FLOOR)) for first, second in pairs
        ]
        mean = math.fsum(logs) / len(logs)
        return math.sqrt((len(logs) - 1) / len(logs) * math.fsum((value - mean) ** 2 for value in logs))
    return math.hypot(
        *((outcome.kl_error or 0.0) / max(outcome.kl or 0.0, _FLOOR) for outcome in (mine, theirs)),
    )


def verdicts(recipes: Mapping[str, Recipe], outcomes: Iterable[Outcome]) -> list[Verdict]:
    """Every claim of every recipe at each number of bits that it speaks of, whether or not the survey has it."""
    found = {(outcome.recipe, outcome.bits): outcome for outcome in outcomes}
    return [
        judge(claim, recipe.name, bits, found.get((recipe.name, bits)), found.get((claim.baseline, bits)))
        for recipe in recipes.values()
        for claim in recipe.claims
        for bits in claim.bits
    ]


def front(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those measured outcomes that no other beats in both bytes and KL, by bytes."""
    best: list[Outcome] = []
    measured = [one for one in outcomes if one.status == "measured" and one.kl is not None and one.nbytes is not None]
    for outcome in sorted(measured, key=lambda one: (one.nbytes or 0, one.kl or 0.0)):
        if not best or (outcome.kl or 0.0) < (best[-1].kl or 0.0):
            best.append(outcome)
    return best
