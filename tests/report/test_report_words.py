"""The sentences of the report."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.contracts import Quality
from tersor.report import ReportData
from tersor.report.words import (
    change_text,
    count_text,
    measured_text,
    number_text,
    percent_text,
    prediction,
    size_text,
    time_text,
    tone,
    verdict,
)


def with_kl(data: ReportData, kl: float, error: float = 0.001) -> ReportData:
    return replace(data, quality=Quality(kl, error, 25.0, 20.0, 0.9, 100, "a text"))


def test_verdict(full: ReportData, least: ReportData) -> None:
    assert verdict(full) == (
        "At 25.0% of its original size, the model differs noticeably from the original: it agrees on the next token "
        "81.3% of the time, and its perplexity rises by 21.2%."
    )
    assert verdict(least) == "At 30.0% of its original size; its quality has not been measured."
    assert "over its budget" in verdict(replace(full, budget=full.file_bytes - 1))
    assert "over its budget" not in verdict(replace(full, budget=full.file_bytes))
    assert "the model is broken" in verdict(with_kl(full, math.nan))
    assert "12 times the original's" in verdict(replace(full, quality=Quality(0.1, 0.0, 240.0, 20.0, 0.9, 1, "x")))
    assert "falls by 5.0%" in verdict(replace(full, quality=Quality(0.1, 0.0, 19.0, 20.0, 0.9, 1, "x")))


@pytest.mark.parametrize(
    ("kl", "expected"), [(0.0, "good"), (0.02, "good"), (0.3, "fair"), (0.7, "poor"), (9.0, "bad"), (math.nan, "bad")]
)
def test_tone(least: ReportData, kl: float, expected: str) -> None:
    assert tone(with_kl(least, kl)) == expected
    assert tone(least) == "unknown"


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (0.1019, "agrees with the measurement"),
        (0.08, "20% below"),
        (0.13, "30% above"),
        (0.4, "a factor 4.0 above"),
        (0.02, "a factor 5.0 below"),
        (math.inf, "cannot be compared"),
    ],
)
def test_prediction(least: ReportData, predicted: float, expected: str) -> None:
    assert expected in prediction(replace(with_kl(least, 0.1), predicted=predicted))


def test_prediction_needs_both(least: ReportData) -> None:
    assert prediction(least) == prediction(with_kl(least, 0.1)) == prediction(replace(least, predicted=0.1)) == ""


@given(st.floats(), st.floats())
def test_any_number_can_be_said(one: float, two: float) -> None:
    for text in (number_text(one), measured_text(one, two), percent_text(one), change_text(one, two)):
        assert text


@given(st.integers(0, 10**18))
def test_sizes_are_short(value: int) -> None:
    assert len(size_text(value)) <= 12
    assert len(count_text(value)) <= 14
    assert time_text(float(value % 10**6))
