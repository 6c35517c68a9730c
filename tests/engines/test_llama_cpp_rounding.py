"""How llama.cpp rounds inputs, against the program itself, and what planning makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from tersor.codecs import parse
from tersor.contracts import Gram
from tersor.engines.llama_cpp.engine import ENGINE
from tersor.engines.llama_cpp.rounding import rounding
from tersor.pipeline import light_context
from tersor.stages.curves import load_records, measure_curves
from tersor.stages.options import Budget, Options
from tersor.stages.sensitivity import measure_sensitivity
from tersor.stages.work import Work
from tersor.statistics.collect import input_errors
from tersor.statistics.sensitivity import Objective


def some_inputs(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Rows of very different sizes with a few large entries, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    x[:, torch.randint(width, (3,), generator=generator)] *= 40
    return x * torch.randn(tokens, 1, generator=generator).exp()


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_blocks_of_32_are_those_of_its_8_bit_type(seed: int, blocks: int) -> None:
    x = some_inputs(3, 32 * blocks, seed)
    q8 = GGMLQuantizationType.Q8_0
    wanted = torch.from_numpy(dequantize(quantize(x.numpy(), q8), q8))
    found = rounding("q5_1")(x)
    # Where an input lies in the middle between two codes, the two round it by rules of their own.
    step = (x.reshape(3, -1, 32).abs().amax(-1, keepdim=True) / 127).expand(-1, -1, 32).reshape(x.shape)
    assert bool(((found - wanted).abs() <= 1.01 * step).all())
    assert float((found != wanted).float().mean()) < 0.02


@pytest.mark.parametrize(("text", "block"), [("q4_0", 32), ("q6_k", 256), ("iq3_s", 256)])
def test_an_error_is_at_most_half_a_step_of_its_block(text: str, block: int) -> None:
    x = some_inputs(7, 512, 1)
    x[2] = 0
    x[3, :block] = 0
    found = rounding(text)(x)
    step = (x.reshape(7, -1, block).abs().amax(-1, keepdim=True) / 127).expand(-1, -1, block).reshape(x.shape)
    assert bool(((found - x).abs() <= 0.5 * step + 0.001 * x.abs()).all())
    assert bool((found[2] == 0).all())
    assert 0.2 < float((found - x).square().sum() / (step.square() / 12).sum()) < 1.1


def test_floats_are_rounded_to_their_type() -> None:
    x = some_inputs(2, 32, 2)
    assert torch.equal(rounding("bf16")(x), x.bfloat16().float())
    assert torch.equal(rounding("fp16")(x), x.half().float())
    assert rounding("q4_0")(x.bfloat16()).dtype == torch.bfloat16


def test_the_price_is_what_rounded_inputs_add_to_the_output() -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight, energy = some_inputs(4000, 64, 4), torch.randn(20, 64, generator=generator), torch.rand(4000)
    rows = torch.rand(20, generator=generator)
    roundings = {"q4_0": rounding("q4_0"), "q8_0": rounding("q8_0"), "bf16": rounding("bf16")}
    errors = input_errors(x, roundings, energy)
    assert errors["q4_0"] is errors["q8_0"]  # the same is not computed twice
    noise = {text: one / energy.sum() for text, one in errors.items()}
    objective = Objective(rows, Gram(x.T @ x / len(x), len(x), noise=noise))
    for text, rounded in roundings.items():
        added = (rounded(x) - x) @ weight.T
        wanted = float((rows * (energy @ added.square()) / energy.sum()).sum())
        assert objective.rounding(weight, text) == pytest.approx(wanted, rel=0.1)
    assert objective.rounding(weight, "int4:g32") == 0


@pytest.mark.parametrize("sensitivity", ["fisher", "flat"])
def test_planning_for_it_counts_what_its_rounding_costs(
    sensitivity: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    texts = ("q4_0", "q8_0", "bf16")
    folder = tiny("llama-tied", hidden_size=64, intermediate_size=96)
    records = []
    for engine in ("transformers", ENGINE.name):
        options = Options(
            Budget("bpw", 6.0), candidates=texts, engine=engine, dtype="float32", sensitivity=sensitivity, workers=1
        )
        context = replace(light_context(folder, options), work=Work(tmp_path / engine))
        context.work.begin({})
        ids = torch.randint(3, 100, (12, 24), generator=torch.Generator().manual_seed(5))
        if sensitivity == "fisher":
            measure_sensitivity(context, ids)
        measure_curves(context, ids)
        records.append({name: one["points"] for name, one in load_records(context).items()})
    without, found = records
    products = [name for name in found if "embed" not in name] + ["model.embed_tokens"]
    assert set(products) == set(found)
    for name in products:
        more = {text: found[name][text] - without[name][text] for text in texts}
        assert more["q4_0"] == pytest.approx(more["q8_0"], rel=1e-3)
        assert more["q8_0"] > more["bf16"] >= 0
        # Eight bits for inputs and eight for weights lose about as much; an embedding's lookup loses nothing.
        assert 0.1 < more["q8_0"] / without[name]["q8_0"] < 10


def test_codecs_that_round_alike_share_a_function() -> None:
    """So that nothing is computed twice."""
    assert ENGINE.rounds(parse("q4_k")) is ENGINE.rounds(parse("iq2_s"))
    assert ENGINE.rounds(parse("q4_0")) is ENGINE.rounds(parse("q8_0"))
