"""Times of a token by weights, rows and products."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tersor.contracts import Anatomy, Layer
from tersor.engines.contract import Pace, layer_time, token_time
from tersor.engines.llama_cpp.engine import ENGINE
from tersor.errors import BadInput


def layer(name: str, rows: int, columns: int, copies: int = 1) -> Layer:
    return Layer(name, f"{name}.weight", "linear", (rows, columns), 0, name, copies)


def model(*layers: Layer, embedding: str | None = None, head: str | None = None) -> Anatomy:
    return Anatomy("llama", (), layers, {}, (), embedding, head, 0)


def test_weights_rows_and_products_each_take_their_time():
    pace = Pace(weight=20.0, row=7.0, product=3.0)
    assert pace.time(layer("a", 1000, 500)) == pytest.approx(10.0 + 7.0 + 3.0)
    assert pace.time(layer("a", 250, 2000)) == pytest.approx(10.0 + 1.75 + 3.0)
    assert pace.time(layer("experts", 250, 500, copies=4)) == pytest.approx(10.0 + 7.0 + 12.0)


def test_one_row_of_an_embedding_is_no_product():
    engine = replace(ENGINE, pace={"q4_0": Pace(10.0, 0.0, 1.0), "q8_0": Pace(30.0, 5.0, 0.0)})
    table, down, head = layer("table", 1000, 64), layer("down", 64, 1000), layer("head", 1000, 64)
    texts = {"table": "q8_0", "down": "q4_0", "head": "q8_0"}
    apart = model(table, down, head, embedding="table", head="head")
    assert layer_time(engine, apart, table, "q8_0") == 0
    assert token_time(engine, apart, texts) == pytest.approx(0.64 + 1 + 1.92 + 5)
    tied = model(table, down, embedding="table", head="table")
    assert token_time(engine, tied, texts) == pytest.approx(0.64 + 1 + 1.92 + 5)


def test_an_engine_without_times_says_so():
    with pytest.raises(BadInput, match=r"How fast llama\.cpp is with each codec is not known here"):
        token_time(replace(ENGINE, pace=None), model(layer("a", 8, 8)), {"a": "q4_0"})


def test_every_type_that_llama_cpp_is_given_has_a_time():
    assert ENGINE.pace is not None
    for text in (*ENGINE.candidates("normal"), "iq2_xs", "tq1_0", "tq2_0", "fp16"):
        assert ENGINE.pace[text].time(layer("a", 4096, 4096)) > 0
