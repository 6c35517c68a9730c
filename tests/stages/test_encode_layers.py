"""Layers encoded side by side: the same bytes for any number of workers, and nothing lost when one cannot be."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from leaf_checks import correlated_gram, gaussian
from tersor.codecs import parse
from tersor.contracts import Gram, Layer
from tersor.errors import NotFinite
from tersor.solvers import Encoder, ErrorFeedback
from tersor.stages import encode_layers as stage
from tersor.stages.encode_layers import Coded, Order, Ready, encode_layers

WIDTH = 64


def a_layer(name: str, rows: int, *, inputs: str, copies: int = 1) -> Layer:
    return Layer(name, f"{name}.weight", "linear", (rows, WIDTH), block=0, inputs=inputs, copies=copies)


def ready(*grams: Gram | None, workers: int = 1) -> list[Ready]:
    return [Ready(Encoder(ErrorFeedback(), workers=workers), gram, "" if gram else "no tokens") for gram in grams]


def orders(workers: int, broken: Tensor | None = None) -> list[list[Order]]:
    """Three inputs: any codecs; experts, one of them never used; and a Gram matrix that cannot be factored."""
    first, second = correlated_gram(WIDTH), correlated_gram(WIDTH, seed=3)
    flawed = Gram(torch.where(torch.eye(WIDTH) > 0, 1.0, -9.0), 10)
    groups = [
        ([("int", 700, "int3:g32"), ("rotated", 300, "rot(int2:row)"), ("whole", 256, "ectcq3"), ("kept", 90, "bf16")],
         ready(first, workers=workers), 1),
        ([("experts", 200, "int4:g32"), ("more", 230, "lut2:row")], ready(second, None, first, workers=workers), 3),
        ([("copied", 40, "bf16"), ("flawed", 400, "int4:row")], ready(flawed, workers=workers), 1),
    ]  # fmt: skip
    found = []
    for at, (layers, one, copies) in enumerate(groups):
        made = []
        for seed, (name, rows, text) in enumerate(layers):
            weight = gaussian(copies * rows, WIDTH, seed=10 * at + seed).reshape(copies, rows, WIDTH)
            if broken is not None and name == "experts":
                weight = broken.expand(weight.shape)
            layer = a_layer(name, rows, inputs=f"in{at}", copies=copies)
            made.append(Order(layer, parse(text), lambda weight=weight: weight, one))
        found.append(made)
    return found


def encoded(workers: int) -> dict[str, Coded]:
    return {layer.name: one for layer, one in encode_layers(orders(workers), workers)}


def test_bytes_and_records_do_not_depend_on_the_number_of_workers() -> None:
    alone = encoded(1)
    assert list(alone) == ["int", "rotated", "whole", "kept", "experts", "more", "copied", "flawed"]
    for workers in (2, 5):
        together = encoded(workers)
        assert list(together) == list(alone)
        for name, one in alone.items():
            assert together[name].record == one.record, name
            assert together[name].parts.keys() == one.parts.keys()
            assert all(torch.equal(together[name].parts[part], tensor) for part, tensor in one.parts.items()), name


def test_every_chunk_is_where_it_belongs() -> None:
    for group in orders(1):
        for order in group:
            layer, coded = order.layer, encoded(3)[order.layer.name]
            weight = order.weight().reshape(layer.stored_shape)
            error = weight - order.codec.decode(coded.parts, layer.stored_shape)
            share = float(error.square().sum() / weight.square().sum())
            assert share == pytest.approx(coded.record["relative_error"] ** 2, rel=1e-4, abs=1e-9)
            assert share < 0.5
            assert (coded.gram is None) == (layer.copies > 1)


def test_notes_are_of_layers_that_asked() -> None:
    for workers in (1, 4):
        found = encoded(workers)
        assert found["copied"].record["notes"] == found["int"].record["notes"] == []
        assert found["experts"].record["notes"] == ["no tokens"]
        assert "rounded to nearest instead" in found["flawed"].record["notes"][0]


@pytest.mark.parametrize("workers", [1, 4])
def test_a_damaged_layer_is_named_and_ends_all_threads(workers: int) -> None:
    before = threading.active_count()
    with pytest.raises(NotFinite, match="experts"):
        list(encode_layers(orders(workers, broken=torch.tensor(torch.nan)), workers))
    assert threading.active_count() == before


def test_who_wants_no_more_waits_for_little() -> None:
    before = threading.active_count()
    found = encode_layers(orders(3), 3)
    assert next(found)[0].name == "int"
    found.close()
    assert threading.active_count() == before


def test_groups_are_asked_for_one_ahead_and_factored_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    threads: list[str] = []
    prepare = Encoder._prepare

    def watched(self: Encoder, gram: Gram | None, span: int) -> object:
        threads.append(threading.current_thread().name)
        return prepare(self, gram, span)

    def groups() -> Iterator[list[Order]]:
        for at in range(5):
            asked.append(at)
            layer = a_layer(f"layer{at}", 2000, inputs=f"in{at}")
            one = ready(correlated_gram(WIDTH, seed=at))
            yield [Order(layer, parse("int4:g32"), lambda: torch.ones(1, 2000, WIDTH), one)]

    monkeypatch.setattr(Encoder, "_prepare", watched)
    found = encode_layers(groups(), 2)
    next(found)
    assert asked[-1] < 4
    list(found)
    assert asked == list(range(5))
    assert len(threads) == 5  # once for each, by whoever came first
    monkeypatch.setattr(stage, "_FORESEEN", WIDTH - 1)
    list(encode_layers(groups(), 2))
    assert len(threads) == 10
