"""Squared gradients by single weights: against autograd's own, sequence by sequence, through the whole model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tersor.pipeline import light_context
from tersor.stages.context import Context, oriented
from tersor.stages.options import Budget, Options
from tersor.stages.weight_gradients import load_weight_gradients, measure_weight_gradients
from tersor.stages.work import Work
from tersor.statistics.sampling import draw

SEED = 4


def context_of(folder: Path, tmp_path: Path, workers: int = 1) -> Context:
    """A run's context in float32 whose chunks hold two sequences."""
    options = Options(Budget("bpw", 4.0), dtype="float32", seed=SEED, workers=workers)
    work = Work(tmp_path / f"run-{workers}.partial")
    work.begin({})
    return replace(light_context(folder, options, cache_dir=tmp_path), work=work, chunk=2)


IDS = torch.randint(3, 100, (5, 16), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_they_are_those_of_autograd(family: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny(family)
    context = context_of(folder, tmp_path)
    measure_weight_gradients(context, IDS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    parameters = dict(model.named_parameters())
    expected = {layer: torch.zeros(parameters[layer.parameter].shape) for layer in context.anatomy.layers}
    for chunk, part in enumerate(IDS.split(context.chunk)):
        generator = torch.Generator().manual_seed(SEED * 1_000_003 + chunk)
        for row in part:
            model.zero_grad()
            logits = model(row[None]).logits[0]
            labels = draw(logits.detach(), generator)
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            for layer in expected:
                gradient = parameters[layer.parameter].grad
                assert gradient is not None
                expected[layer] += gradient.square() / len(IDS)
    for block in range(len(context.anatomy.blocks)):
        found = load_weight_gradients(context, block)
        for layer in context.anatomy.layers_of(block):
            for copy, wanted in enumerate(oriented(expected[layer], layer)):
                # Kept in bfloat16.
                size = 1e-4 * float(wanted.max())
                torch.testing.assert_close(found[f"{layer.name}#{copy}"], wanted, rtol=1e-2, atol=size)


def test_workers_change_nothing_and_nothing_large_is_left(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny("llama")
    found = []
    for workers in (1, 2):
        context = context_of(folder, tmp_path, workers)
        measure_weight_gradients(context, IDS)
        found.append(load_weight_gradients(context, 0))
        assert not list(context.work.folder.rglob("*.hidden*"))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def test_a_killed_pass_goes_on_after_the_last_finished_block(tiny: Callable[..., Path], tmp_path: Path) -> None:
    context = context_of(tiny("llama"), tmp_path)
    blocks = len(context.anatomy.blocks)

    def stop(_stage: str, done: int, _total: int) -> None:
        if done == blocks + 2:
            raise Killed

    with pytest.raises(Killed):
        measure_weight_gradients(replace(context, progress=stop), IDS)
    assert len(list(context.work.folder.glob("gradients/*.safetensors"))) == 1
    measure_weight_gradients(context, IDS)
    whole = context_of(tiny("llama"), tmp_path, workers=2)
    measure_weight_gradients(whole, IDS)
    for block in range(blocks):
        found, wanted = (load_weight_gradients(one, block) for one in (context, whole))
        assert all(torch.equal(value, wanted[name]) for name, value in found.items())
