"""Block-wise tuning on a small block: never worse, exact in what it stores, the same for any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from tersor.codecs import parse
from tersor.contracts import Codec, Gram, Solver
from tersor.errors import BadInput
from tersor.recovery import BlockTuning, FloatParts, RoundedGrid, RowGains, Tunable, Tuned, as_tunable, tune_block
from tersor.solvers import Encoder, ErrorFeedback, Nearest

WIDTH, HIDDEN = 64, 128
SHAPES = {"up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}


def run(weights: Mapping[str, Tensor], states: Tensor) -> Tensor:
    return states + torch.tanh(states @ weights["up"].T) @ weights["down"].T


class Block:
    """A block of two layers, a text, and what a codec makes of it."""

    def __init__(self, text: str, solver: Solver) -> None:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(WIDTH, WIDTH, generator=generator) * torch.linspace(1, 0.1, WIDTH)
        self.inputs = torch.randn(8, 64, WIDTH, generator=generator) @ mix / 4
        self.weights = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in SHAPES.items()}
        self.targets = run(self.weights, self.inputs)
        self.codec: Codec = parse(text)
        flat = self.inputs.reshape(-1, WIDTH)
        inner = torch.tanh(flat @ self.weights["up"].T)
        grams = {"up": Gram(flat.T @ flat / len(flat), len(flat)), "down": Gram(inner.T @ inner / len(flat), len(flat))}
        encoder = Encoder(solver)
        self.encoded = {name: encoder(self.weights[name], self.codec, grams[name]) for name in SHAPES}

    def tunables(self) -> dict[str, Tunable]:
        made = {name: as_tunable(self.codec, self.weights[name], self.encoded[name][0]) for name in SHAPES}
        return {name: one for name, one in made.items() if one is not None}

    def decode(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.codec.decode(tensors, SHAPES[name])

    def loss(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> float:
        outputs = run({name: self.decode(name, tensors[name]) for name in SHAPES}, self.inputs)
        return float((outputs - self.targets).square().mean() / self.targets.square().mean())

    def tuned(self, tuning: BlockTuning, workers: int = 1) -> Tuned:
        return tune_block(run, self.tunables(), self.decode, self.inputs, self.targets, tuning, workers=workers)


KINDS: dict[str, tuple[Solver, type[Tunable]]] = {
    "int2:g32": (Nearest(), RoundedGrid),
    "int3:g64:asym": (Nearest(), RoundedGrid),
    "int4:row:bf16": (Nearest(), RoundedGrid),
    "int3:g32:s8": (Nearest(), RowGains),
    "rot(trellis2:L8)": (ErrorFeedback(), RowGains),
    "trellis1:L8": (ErrorFeedback(), RowGains),
    "lut2:row": (Nearest(), FloatParts),
    "vq6x4": (Nearest(), FloatParts),
    "sum(int2:g32,lowrank4)": (Nearest(), FloatParts),
    "rot(int2:row)": (Nearest(), RowGains),
}


@pytest.mark.parametrize("text", KINDS)
def test_tuning_starts_at_the_codecs_own_and_stores_what_it_measured(text: str) -> None:
    solver, kind = KINDS[text]
    block = Block(text, solver)
    for name, one in block.tunables().items():
        assert type(one) is kind
        tensors, values = block.encoded[name]
        assert torch.allclose(one.values(), values, rtol=1e-5, atol=1e-7)
        assert all(torch.equal(one.stored()[part], tensor) for part, tensor in tensors.items())
    before = {name: {part: t.clone() for part, t in tensors.items()} for name, (tensors, _) in block.encoded.items()}
    tuned = block.tuned(BlockTuning(steps=20, batch=256, rate=0.03, checks=4))
    assert tuned.before == pytest.approx(block.loss(before), rel=1e-4)
    assert tuned.after == pytest.approx(block.loss(tuned.tensors), rel=1e-4)
    assert tuned.after < tuned.before
    for name, shape in SHAPES.items():
        declared = {part.name: (part.dtype, part.shape) for part in block.codec.parts(shape)}
        stored = tuned.tensors[name]
        assert {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in stored.items()} == declared
        assert all(torch.equal(block.encoded[name][0][part], tensor) for part, tensor in before[name].items())
    outputs = run({name: block.decode(name, tuned.tensors[name]) for name in SHAPES}, block.inputs)
    assert torch.allclose(tuned.outputs, outputs, atol=1e-5)


def test_rounding_gains_much_on_a_coarse_grid() -> None:
    tuned = Block("int2:g32", Nearest()).tuned(BlockTuning(steps=60, batch=512, rate=0.02))
    assert tuned.after < 0.7 * tuned.before


@pytest.mark.parametrize("text", ["int2:g32", "lut2:row"])
def test_blocks_run_in_bfloat16_tune_as_well(text: str) -> None:
    block = Block(text, Nearest())
    exact, mixed = (block.tuned(BlockTuning(steps=40, batch=512, rate=0.02, mixed=on)) for on in (False, True))
    assert exact.outputs.dtype == mixed.outputs.dtype == torch.float32
    assert mixed.before == pytest.approx(exact.before, rel=1e-3)
    assert mixed.after != exact.after
    assert mixed.before - mixed.after > 0.95 * (exact.before - exact.after)


def test_steps_that_only_harm_are_thrown_away() -> None:
    block = Block("int3:g32", ErrorFeedback())
    tuned = block.tuned(BlockTuning(steps=3, batch=1, rate=5.0))
    assert tuned.after == tuned.before
    assert all(torch.equal(tuned.tensors["up"][part], tensor) for part, tensor in block.encoded["up"][0].items())
    assert block.tuned(BlockTuning(steps=0)).after == tuned.before


@pytest.mark.parametrize("text", ["int2:g32", "rot(trellis2:L8)"])
def test_threads_and_repetition_change_nothing(text: str) -> None:
    block = Block(text, Nearest())
    tuning = BlockTuning(steps=6, batch=256, seed=3)
    first, second = block.tuned(tuning), block.tuned(tuning, workers=3)
    for name in SHAPES:
        for part, tensor in first.tensors[name].items():
            assert torch.equal(tensor, second.tensors[name][part])


def test_groups_of_zeros_and_scales_that_are_no_scales() -> None:
    codec = parse("int3:g32")
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    one = as_tunable(codec, weight, Encoder(Nearest())(weight, codec, None)[0])
    assert one is not None
    for _ in range(40):
        one.descend(torch.ones(6, 64), 0.5)
    decoded = codec.decode(one.stored(), (6, 64))
    assert torch.isfinite(decoded).all()
    assert decoded[2].abs().max() < 1e-5
    # A scale for each row that is not all there is to the row.
    tensors = {"a": torch.ones(6, 1)}

    class Shifted:
        def decode(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
            return tensors["a"].expand(shape) + 1

    assert not RowGains.fits(Shifted(), torch.full((6, 64), 2.0), "a", tensors)  # type: ignore[arg-type]


def test_nothing_to_tune() -> None:
    inputs = torch.randn(2, 3, 4)

    def same(_weights: Mapping[str, Tensor], states: Tensor) -> Tensor:
        return states * 2

    decode: Callable[[str, Mapping[str, Tensor]], Tensor] = lambda _name, _tensors: inputs  # noqa: E731
    tuned = tune_block(same, {}, decode, inputs, inputs * 2, BlockTuning(steps=5))
    assert tuned.after == tuned.before == 0


def test_bad_input_is_refused() -> None:
    block = Block("int4:row", Nearest())
    with pytest.raises(BadInput, match=r"\(8, 64, 64\) towards \(7, 64, 64\)"):
        tune_block(run, block.tunables(), block.decode, block.inputs, block.targets[:7], BlockTuning())
    for bad in ({"steps": -1}, {"batch": 0}, {"rate": 0.0}, {"sample": 0}, {"checks": 0}):
        with pytest.raises(BadInput, match="cannot be used"):
            BlockTuning(**bad)  # type: ignore[arg-type]
