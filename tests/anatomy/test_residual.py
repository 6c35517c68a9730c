"""Which layers write into the residual stream, found from what a block computes and not from names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tersor.anatomy import analyse, mark_writers, open_source, skeleton
from tersor.contracts import Anatomy

WRITERS: dict[str, set[str]] = {
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
    "gemma2": {"self_attn.o_proj", "mlp.down_proj"},  # normed once more before they are added
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "gptj": {"attn.out_proj", "mlp.fc_out"},  # both added at once
    "neox": {"attention.dense", "mlp.dense_4h_to_h"},
    "falcon": {"self_attention.dense", "mlp.dense_4h_to_h"},  # added in place
    "bloom": {"self_attention.dense", "mlp.dense_4h_to_h"},
    "opt": {"self_attn.out_proj", "fc2"},
    "deepseek": {"self_attn.o_proj", "mlp.down_proj", "mlp.shared_experts.down_proj"},  # not what reads a low rank
}


def marked(folder: Path, change: Callable[[nn.Module], object] = lambda _: None) -> Anatomy:
    source = open_source(folder)
    model = skeleton(source)
    anatomy = analyse(source, model)
    change(model)
    return mark_writers(model, anatomy)


def writers(anatomy: Anatomy) -> set[str]:
    return {re.sub(r"^.*?\.\d+\.", "", layer.name) for layer in anatomy.layers if layer.writes}


@pytest.mark.parametrize("family", sorted(WRITERS))
def test_writers_of_a_family(family: str, tiny: Callable[..., Path]) -> None:
    anatomy = marked(tiny(family))
    assert writers(anatomy) == WRITERS[family]
    for layer in anatomy.layers:
        known = layer.block is not None and layer.kind != "experts"
        assert (layer.writes is not None) == known, layer.name


def test_a_norm_after_the_sum_hides_nothing(tiny: Callable[..., Path]) -> None:
    assert writers(marked(tiny("opt", do_layer_norm_before=False))) == WRITERS["opt"]


def test_nothing_is_said_of_blocks_that_cannot_be_run(tiny: Callable[..., Path]) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("not without values")

    class Broken(nn.Module):
        forward = broken

    def change(model: Any) -> None:
        model.model.layers[1].mlp.act_fn = Broken()

    anatomy = marked(tiny("llama"), change)
    said = {layer.block: layer.writes is not None for layer in anatomy.layers if layer.block is not None}
    assert said == {0: True, 1: False, 2: False}
    plain = replace(anatomy, layers=tuple(replace(layer, writes=None) for layer in anatomy.layers))
    source = open_source(tiny("llama"))
    assert plain == analyse(source, skeleton(source))
