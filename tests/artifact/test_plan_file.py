"""plan.json: round trip, a pleasant look, and one sentence for each thing a person may get wrong."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.artifact import plan_from_json, plan_to_json, validate_plan
from tersor.codecs import parse
from tersor.contracts import Choice, Plan
from tersor.errors import BadInput, NotFinite

PLAN = Plan(
    layers={
        "model.layers.0.self_attn.q_proj": Choice("int4:g64", 1234, 0.0015),
        "model.embed_tokens": Choice("int6:g32:asym:s8", 98765, 1e-7),
        "model.layers.0.mlp.up_proj": Choice("lut3:row", 400, math.nan),
    },
    budget=100_600,
    file_bytes=100_500,
    predicted=0.25,
    options={"seed": 0, "solver": "feedback"},
)


def same(a: Plan, b: Plan) -> bool:
    return repr(a) == repr(b)  # repr, because NaN is not equal to itself


def test_round_trip_keeps_everything_and_the_order() -> None:
    again = plan_from_json(plan_to_json(PLAN))
    assert same(again, PLAN)
    assert list(again.layers) == list(PLAN.layers)
    assert plan_to_json(again) == plan_to_json(PLAN)


@given(
    layers=st.dictionaries(
        st.text(),
        st.builds(Choice, st.text(), st.integers(0, 2**62), st.floats(allow_infinity=False)),
        max_size=5,
    ),
    predicted=st.floats(allow_infinity=False),
)
def test_round_trip_of_any_plan(layers: dict[str, Choice], predicted: float) -> None:
    plan = Plan(layers, 7, 6, predicted, {"é": [1, None]})
    assert same(plan_from_json(plan_to_json(plan)), plan)


def test_one_line_a_layer_with_codecs_in_a_column() -> None:
    lines = [line for line in plan_to_json(PLAN).splitlines() if '"codec"' in line]
    assert len(lines) == 3
    assert len({line.index('"codec"') for line in lines}) == 1
    assert len({line.index('"nbytes"') for line in lines}) == 1
    assert "null" in lines[2]


def test_a_line_may_be_just_the_codec() -> None:
    plan = plan_from_json('{"layers": {"a": "int4:g64", "b": {"codec": "bf16"}}}')
    assert plan.layers == {"a": Choice("int4:g64", 0, 0.0), "b": Choice("bf16", 0, 0.0)}


def test_infinity_is_not_recorded() -> None:
    with pytest.raises(NotFinite, match="distortion of a is inf"):
        plan_to_json(Plan({"a": Choice("bf16", 1, math.inf)}, 1, 1, 0.0))


def test_codecs_of_a_valid_plan_come_in_the_models_order() -> None:
    names = sorted(PLAN.layers)
    codecs = validate_plan(PLAN, names, parse)
    assert list(codecs) == names
    assert {name: str(codec) for name, codec in codecs.items()} == {
        name: choice.codec for name, choice in PLAN.layers.items()
    }


def edited(**layers: object) -> str:
    data = json.loads(plan_to_json(PLAN))
    data["layers"] = {**data["layers"], **layers}
    return json.dumps({**data, "layers": {key: value for key, value in data["layers"].items() if value != "remove"}})


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ({"model.embed_tokens": "int9:g64"}, r"my\.json: layer 'model\.embed_tokens': .*int9"),
        ({"model.embed_token": "int4:g64"}, r"no layer 'model\.embed_token'; did you mean 'model\.embed_tokens'\?"),
        ({"zzz": "int4:g64"}, "no layer 'zzz'; remove the line"),
        ({"model.embed_tokens": "remove"}, r"layer 'model\.embed_tokens' has no codec; add a line"),
    ],
)
def test_edits_that_do_not_fit_the_model(layers: dict[str, str], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        validate_plan(plan_from_json(edited(**layers)), PLAN.layers.keys(), parse, where="my.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"layers": {"a": "bf16",}}', r"my\.json: line 1, column \d+ is not JSON"),
        ('{"layers": {"a": "bf16", "a": "fp16"}}', "'a' is there twice"),
        ("[]", "expected a plan"),
        ("{}", "expected a plan"),
        ('{"layers": []}', "expected 'layers' to map"),
        ('{"layers": {"a": 4}}', "layer 'a' needs a codec"),
        ('{"layers": {"a": {"codex": "bf16"}}}', "layer 'a' needs a codec"),
        ('{"layers": {"a": {"codec": "bf16", "nbyte": 3}}}', "unknown field 'nbyte'"),
        ('{"layers": {"a": {"codec": "bf16", "nbytes": "3"}}}', "nbytes of 'a' to be a whole number"),
        ('{"layers": {"a": {"codec": "bf16", "distortion": NaN}}}', "distortion of 'a' to be a finite number"),
        ('{"layers": {}, "budget": -1}', "budget to be a whole number"),
        ('{"layers": {}, "budget": true}', "budget to be a whole number"),
        ('{"layers": {}, "options": 1}', "'options' to be a JSON object"),
        ('{"layers": {}, "tersor_plan": 2}', "plan format 2 is not known"),
        ('{"layers": ' + "[" * 100_000, "not usable JSON|is not JSON"),
    ],
)
def test_what_is_not_a_plan(text: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as caught:
        plan_from_json(text, where="my.json")
    assert str(caught.value).startswith("my.json: ")
    assert "\n" not in str(caught.value)
