"""The integer programme of AdaQuant, and what recipes with learned rounding promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.codecs import parse
from tersor.errors import BadInput
from tersor.recipes import NothingFits, Paper, Recipe, recipes
from tersor.recipes.learned import integer_programme
from tersor.recovery import BlockTuning
from tersor.solvers import Nearest

SHAPES = {"a": (64, 128), "b": (192, 64), "c": (32, 576), "d": (128, 128)}


def losses(weights: dict[str, float]) -> Callable[[str, str], float]:
    def loss(name: str, text: str) -> float:
        return weights[name] * 4.0 ** -float(text[3]) * (1.5 if text.endswith("row") else 1.0)

    return loss


@settings(deadline=None, max_examples=25)
@given(bits=st.floats(2.4, 5.5), weight=st.floats(0.01, 100.0))
def test_the_programme_keeps_its_budget_and_beats_the_same_for_all(bits: float, weight: float) -> None:
    loss = losses({"a": weight, "b": 1.0, "c": 1.0, "d": 1.0 / weight})
    found = integer_programme(bits, SHAPES, loss)
    assert set(found) == set(SHAPES)
    used = sum(parse(text).bits(SHAPES[name]) for name, text in found.items())
    budget = bits * sum(rows * columns for rows, columns in SHAPES.values())
    assert used <= budget
    total = sum(loss(name, text) for name, text in found.items())
    for even in ("int2:row", "int3:row", "int2:g64", "int3:g64", "int4:g64", "int5:g64"):
        if sum(parse(even).bits(shape) for shape in SHAPES.values()) <= int(budget / 8) * 8:
            assert total <= sum(loss(name, even) for name in SHAPES) * 1.001


def test_too_few_bits_are_said_to_be_too_few() -> None:
    with pytest.raises(NothingFits, match="least"):
        integer_programme(1.5, SHAPES, losses(dict.fromkeys(SHAPES, 1.0)))


def test_learned_recipes_are_there_and_say_what_they_tune() -> None:
    known = recipes()
    assert {"adaround", "adaquant", "adaquant-even", "autoround", "fp-learned", "qtip-tuned"} <= set(known)
    assert {name for name, one in known.items() if one.tune is not None} >= {"autoround", "qtip-tuned"}
    assert str(known["qtip-tuned"].codec_for(2.25, (576, 576))) == str(known["qtip"].codec_for(2.25, (576, 576)))
    assert str(known["autoround"].codec_for(2.25, (576, 576))) == "int2:g64"


def test_a_recipe_cannot_both_prepare_weights_and_tune_blocks() -> None:
    with pytest.raises(BadInput, match="prepares weights and tunes"):
        Recipe(
            "x",
            Paper("x"),
            "x.",
            lambda _bits, _shape: "int2:row",
            Nearest,
            "x.",
            prepare=lambda *_: None,  # type: ignore[arg-type, return-value]
            tune=BlockTuning(),
        )
