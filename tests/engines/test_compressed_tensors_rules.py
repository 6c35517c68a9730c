"""Splitting layers over processors: by what a layer does, not by its name; and by what its layout needs, no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tersor.anatomy import analyse, open_source, skeleton
from tersor.codecs import parse
from tersor.contracts import Anatomy, Layer
from tersor.engines.compressed_tensors.engine import ENGINE
from tersor.engines.compressed_tensors.rules import refuses
from tersor.pipeline import examine
from tersor.stages.options import Options


def layer_of(anatomy: Anatomy, name: str, shape: tuple[int, int]) -> Layer:
    return replace(next(layer for layer in anatomy.layers if layer.name.endswith(name)), shape=shape)


def test_gpt_j_s_last_layer_is_split_along_its_inputs(tiny: Callable[..., Path]) -> None:
    _, _, anatomy = examine(tiny("gptj"), Options(None, engine="compressed-tensors", tensor_parallel=4))
    codec = parse("sint4:g128:bf16")
    for name in ("mlp.fc_out", "attn.out_proj"):
        said = refuses(anatomy, layer_of(anatomy, name, (64, 256)), codec, 4)
        assert said == "its 256 inputs split over 4 processors leave 64 each, which groups of 128 do not divide"
    assert refuses(anatomy, layer_of(anatomy, "mlp.fc_in", (64, 256)), codec, 4) is None


def test_names_count_only_where_nothing_was_seen(tiny: Callable[..., Path]) -> None:
    source = open_source(tiny("llama"))
    anatomy = analyse(source, skeleton(source))
    codec = parse("sint4:g128:bf16")
    layer = layer_of(anatomy, "o_proj", (64, 256))
    assert layer.writes is None
    assert refuses(anatomy, layer, codec, 4) is not None
    assert refuses(anatomy, replace(layer, writes=False), codec, 4) is None
    other = replace(layer, name="model.layers.0.mixer.last")
    assert refuses(anatomy, other, codec, 4) is None
    assert refuses(anatomy, replace(other, writes=True), codec, 4) is not None


@pytest.mark.parametrize("text", ["sint8:row:bf16:a8", "fp8:e4m3:row:bf16"])
def test_codes_that_are_not_packed_need_no_whole_words(text: str, tiny: Callable[..., Path]) -> None:
    source = open_source(tiny("llama"))
    anatomy = analyse(source, skeleton(source))
    layer = layer_of(anatomy, "o_proj", (60, 130))
    assert refuses(anatomy, layer, parse(text), 1) is None
    assert refuses(anatomy, layer, parse(text), 2) is None
    assert refuses(anatomy, layer, parse("sint8:row:bf16"), 1) == "words of 4 codes do not divide its 130 inputs"


def test_planning_knows_which_codecs_round_inputs() -> None:
    assert ENGINE.rounds(parse("sint8:row:bf16:a8")) is not None
    assert ENGINE.rounds(parse("fp8:e4m3:row:bf16")) is not None
    assert ENGINE.rounds(parse("sint8:row:bf16:a8s")) is None  # by a scale that is not known yet
    assert ENGINE.rounds(parse("sint4:g128:bf16")) is None
