"""Report data to JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.contracts import Quality
from tersor.errors import BadInput
from tersor.report import ReportData, Stage

numbers = st.floats(allow_nan=False)


def test_round_trip_keeps_everything(full: ReportData, least: ReportData) -> None:
    for data in (full, least):
        again = ReportData.from_json(data.to_json())
        assert again == data
        assert again.to_json() == data.to_json()


@given(numbers, numbers, st.text(st.characters(codec="utf-8")), st.integers(0, 2**63))
def test_round_trip_of_any_values(kl: float, seconds: float, text: str, size: int) -> None:
    quality = Quality(kl, 0.1, math.inf, 2.0, 0.5, 10, text)
    data = ReportData(text, "x", 1, 2, size, 3, 4, (), (), quality=quality, stages=(Stage(text, seconds),), plan=text)
    assert ReportData.from_json(data.to_json()) == data


def test_numbers_that_json_lacks_survive(least: ReportData) -> None:
    data = replace(least, quality=Quality(math.nan, math.inf, -math.inf, 1.0, 0.0, 1, "x"))
    text = data.to_json()
    json.loads(text, parse_constant=pytest.fail)
    quality = ReportData.from_json(text).quality
    assert quality is not None
    assert math.isnan(quality.kl)
    assert quality.kl_error == math.inf
    assert quality.perplexity == -math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["layers"][3].pop("codec"), "report.layers[3].codec is missing"),
        (
            lambda d: d["layers"][3].update(nbytes="many"),
            "layers[3].nbytes must be a whole number, found 'many'",
        ),
        (lambda d: d["layers"][3].update(nbytes=True), "report.layers[3].nbytes must be a whole number, found True"),
        (lambda d: d["layers"][0]["layer"].update(shape=[1, 2, 3]), "shape must be a list of 2"),
        (lambda d: d["tensors"][0].update(fate="lost"), "report.tensors[0].fate must be one of"),
        (lambda d: d.update(colour="red"), "report.colour is not a field"),
        (lambda d: d.update(versions=[1]), "report.versions must be an object"),
        (lambda d: d.update(samples={}), "report.samples must be a list"),
        (lambda d: d["quality"].update(kl="small"), "report.quality.kl must be a number"),
        (lambda d: d.update(format=2), "have format 2, and this version of tersor reads format 1"),
    ],
)
def test_wrong_data_are_named(full: ReportData, change, message: str) -> None:
    plain = json.loads(full.to_json())
    change(plain)
    with pytest.raises(BadInput) as caught:
        ReportData.from_json(json.dumps(plain))
    assert message in str(caught.value)


def test_text_that_is_no_json() -> None:
    with pytest.raises(BadInput, match="not valid JSON"):
        ReportData.from_json("{")
    with pytest.raises(BadInput, match="format"):
        ReportData.from_json("[]")
