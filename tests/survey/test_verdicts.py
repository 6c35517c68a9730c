"""Verdicts from made-up numbers: all outcomes, unequal bytes, paired errors, missing sides."""

from __future__ import annotations

import math

import pytest

from tersor.errors import BadInput
from tersor.recipes import Claim, Paper, Recipe
from tersor.solvers import Nearest
from tersor.survey import Outcome, front, judge, log_error, verdicts

WEIGHTS = 1000


def outcome(recipe: str, kl: float, error: float = 0.0, *, rate: float = 3.0, **fields: object) -> Outcome:
    values = {"status": "measured", "nbytes": round(rate * WEIGHTS / 8), "weights": WEIGHTS, "kl": kl}
    values |= {"kl_error": error, "output_error": 0.1, **fields}
    return Outcome("m", "s", recipe, "{}", 3.0, **values)  # type: ignore[arg-type]


def claim(ratio: float = 1.0, **fields: object) -> Claim:
    return Claim("It is better.", "base", (3.0,), ratio, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kl", "error", "ratio", "word"),
    [
        (0.50, 0.01, 1.0, "holds"),
        (0.50, 0.01, 0.4, "fails"),
        (0.95, 0.10, 1.0, "undecided"),
        (1.05, 0.10, 1.0, "undecided"),
        (1.50, 0.01, 1.0, "fails"),
        (0.81, 0.001, 0.8, "undecided"),
    ],
)
def test_a_claim_holds_fails_or_is_undecided(kl: float, error: float, ratio: float, word: str):
    found = judge(claim(ratio), "mine", 3.0, outcome("mine", kl, error), outcome("base", 1.0, 0.01))
    assert found.word == word
    assert found.ratio == pytest.approx(kl)
    assert found.low < found.ratio < found.high
    sigma = math.hypot(error / kl, 0.01)
    assert found.high / found.low == pytest.approx(math.exp(4 * sigma))


def test_unequal_bytes_are_corrected_by_six_decibels_a_bit():
    mine, base = outcome("mine", 0.5, rate=3.5), outcome("base", 0.8, rate=3.0)
    found = judge(claim(), "mine", 3.0, mine, base)
    assert found.correction == pytest.approx(2.0, rel=0.02)
    assert found.ratio == pytest.approx(0.5 / 0.8 * found.correction)
    assert found.word == "fails"
    assert judge(claim(), "base", 3.0, base, mine).ratio == pytest.approx(1 / found.ratio)


def test_common_difficulty_of_sequences_cancels():
    hard = (0.5, 1.0, 2.0, 4.0)
    mine = outcome("mine", 0.9 * 1.875, 0.7, sequences=tuple(0.9 * value for value in hard))
    base = outcome("base", 1.875, 0.8, sequences=hard)
    assert log_error(mine, base) == pytest.approx(0.0, abs=1e-12)
    assert judge(claim(), "mine", 3.0, mine, base).word == "holds"
    noisy = outcome("mine", 1.7, 0.7, sequences=(0.9, 0.5, 2.4, 3.0))
    assert log_error(noisy, base) > 0.05


def test_output_error_is_judged_without_an_error_of_its_own():
    mine, base = outcome("mine", 9.0, output_error=0.09), outcome("base", 1.0, output_error=0.1)
    found = judge(claim(metric="output"), "mine", 3.0, mine, base)
    assert (found.word, found.low) == ("holds", found.high)


@pytest.mark.parametrize("status", ["failed", "skipped", None])
def test_what_was_not_measured_is_not_judged(status: str | None):
    base = None if status is None else outcome("base", 1.0, status=status)
    found = judge(claim(), "mine", 3.0, outcome("mine", 1.0), base)
    assert found.word == "untested"
    assert "base" in found.why
    assert (status or "not run") in found.why


def test_all_claims_whether_or_not_their_bits_were_asked():
    recipe = Recipe("mine", Paper("x"), "x", lambda _bits, _shape: "int3:row", Nearest, "x", (claim(),))
    found = verdicts({"mine": recipe}, [outcome("mine", 0.5), outcome("base", 1.0)])
    assert [(one.recipe, one.bits, one.word) for one in found] == [("mine", 3.0, "holds")]
    assert [(one.bits, one.word, one.why) for one in verdicts({"mine": recipe}, [])] == [
        (3.0, "untested", "mine was not run at 3 bits")
    ]


def test_the_front_has_what_nothing_beats():
    given = [
        outcome("a", 1.0, rate=2),
        outcome("b", 0.9, rate=2),
        outcome("c", 0.95, rate=3),
        outcome("d", 0.1, rate=4),
    ]
    assert [one.recipe for one in front(given)] == ["b", "d"]


def test_a_claim_without_sense_is_refused():
    with pytest.raises(BadInput, match="ratio above 0"):
        claim(0.0)


def test_bits_that_a_claim_grants_are_not_corrected_for():
    mine, base = outcome("mine", 0.9, rate=3.25), outcome("base", 1.0, rate=3.05)
    assert judge(claim(), "mine", 3.0, mine, base).word == "fails"  # 0.2 bits are worth more than a tenth
    granted = judge(claim(extra=0.3), "mine", 3.0, mine, base)
    assert granted.word == "holds"
    assert granted.ratio == pytest.approx(0.9)
    assert granted.correction == 1.0
    assert judge(claim(extra=0.1), "mine", 3.0, mine, base).correction == pytest.approx(4**0.1)
    # Granted bits that are not taken are no reward.
    assert judge(claim(extra=0.3), "mine", 3.0, base, mine).correction == pytest.approx(4**-0.2)
    with pytest.raises(BadInput, match="extra"):
        claim(extra=-0.1)


def test_perplexities_are_compared_as_they_are():
    mine, base = outcome("mine", 1.0, perplexity=20.0), outcome("base", 9.0, perplexity=300.0)
    found = judge(claim(0.1, metric="perplexity"), "mine", 3.0, mine, base)
    assert (found.word, found.low) == ("holds", found.high)
    assert found.claim.against == "base, perplexity"
