"""Scalar grids: FineQuant, QuantEase, decoupleQ, small floats."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from tersor.codecs import Integer, SmallFloat
from tersor.contracts import Codec, Encoded, Shape, Solver
from tersor.recipes.baselines import gptq, uniform
from tersor.recipes.fit import fullest, grouped, integer
from tersor.recipes.recipe import Claim, NothingFits, Paper
from tersor.recipes.registry import recipe
from tersor.solvers import Alternating, CoordinateDescent, ErrorFeedback, FullRange, Nearest

_RANGE_FACTOR = 0.9
"""FineQuant's alpha: a halved group must shrink the mean range below this part to be worth its scales."""

_SAMPLED_ROWS = 128
"""Rows that a split of exponent and mantissa is chosen by."""


def _halvings(columns: int) -> list[int | None]:
    """The whole row, its half, its quarter, … while they divide it."""
    sizes: list[int | None] = [None]
    while columns % 2 == 0 and columns > 16:
        columns //= 2
        sizes.append(columns)
    return sizes


def _fine(bits: float, shape: Shape) -> str:
    return fullest([str(Integer(integer(bits), size)) for size in _halvings(shape[1])], bits, shape)


def _coarsened(weight: Tensor, codec: Codec) -> Codec:
    """The coarsest group after which halving shrinks the mean range too little; never finer than ``codec``'s."""
    assert isinstance(codec, Integer)
    sizes = _halvings(weight.shape[1])
    for size, half in pairwise(sizes[: sizes.index(codec.group) + 1]):
        assert half is not None
        coarse, fine = (
            float(weight.abs().reshape(len(weight), -1, width).amax(2).mean())
            for width in (size or weight.shape[1], half)
        )
        if fine > _RANGE_FACTOR * coarse:
            return replace(codec, group=size)
    return codec


recipe(
    name="finequant",
    paper=Paper(
        "FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs", "2308.09723", "S035"
    ),
    summary="Each matrix starts with a scale per row and halves its groups while that narrows their ranges enough.",
    codec=_fine,
    solver=FullRange,
    refine=_coarsened,
    calibrated=False,
    differs=(
        "Groups get no finer than the budget allows a matrix, and what a coarse one saves goes to no other; it is "
        "credited by the slope. Integers only, 4 and 8 bits in the paper."
    ),
    claims=(Claim("Group sizes chosen per matrix are no more than 1 % worse than uniform groups.", "rtn", (4,), 1.01),),
)

recipe(
    name="quantease",
    paper=Paper("QuantEase: Optimization-based Quantization for Language Models", "2309.01885", "S183"),
    summary="Coordinate descent on the layer's output error, on GPTQ's grid.",
    codec=uniform,
    solver=lambda: CoordinateDescent(sweeps=8, start=ErrorFeedback(refit=False)),
    differs="Starts from error feedback instead of nearest rounding; 8 sweeps, 25 in the paper.",
    claims=(
        Claim("No more than 1 % worse than GPTQ on the same grid.", "gptq", (3, 4), 1.01),
        Claim("Each layer's output error is below GPTQ's.", "gptq", (2, 3, 4), metric="output"),
    ),
)

recipe(
    name="decoupleq",
    paper=Paper(
        "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and "
        "Floating Points",
        "2404.12759",
        "S195",
    ),
    summary="Codes and scales in turn: least squares for one, a box-constrained integer problem for the other.",
    codec=uniform,
    solver=Alternating,
    differs="Symmetric grids, so no zero is fitted; no tuning of blocks afterwards.",
    claims=(
        Claim("At two bits the model is closer than GPTQ's.", "gptq", (2,)),
        Claim("The layers' output error is below GPTQ's.", "gptq", (2, 3, 4), metric="output"),
    ),
)


def small_float(bits: float, shape: Shape) -> str:
    """Floats of 4, 6 or 8 bits with float16 scales: groups of 64 where they fit, else the finest that do."""
    if bits < 4:
        raise NothingFits(f"Small floats have at least 4 bits; {bits:.3f} were given.")
    width = 4 if bits < 6 else 6 if bits < 8 else 8
    form = {4: "fp4:e2m1", 6: "fp6:e2m3", 8: "fp8:e4m3"}[width]
    return fullest([f"{form}:g64", *grouped(f"{form}:{{}}", shape[1])], bits, shape)


def best_float(weight: Tensor, codec: Codec) -> Codec:
    """The split of exponent and mantissa with the least squared error of some rows, scales fitted to each."""
    assert isinstance(codec, SmallFloat)
    weight = weight[:: max(len(weight) // _SAMPLED_ROWS, 1)].contiguous()
    numbers = torch.arange(weight.shape[1])
    losses = {}
    for exponent in range(1, min(5, codec.bits_per_code - 1) + 1):
        other = replace(codec, exponent=exponent)
        side = other.prepare(weight, None)
        codes, _ = other.round(weight, side, numbers)
        losses[exponent] = float((weight - other.values(Encoded(codes, side), weight.shape[1])).double().square().sum())
    return replace(codec, exponent=min(losses, key=lambda exponent: losses[exponent]))


def _rounding() -> Solver:
    return Nearest()


recipe(
    name="zeroquant-fp",
    paper=Paper(
        "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats",
        "2307.09782",
        "S184",
    ),
    summary="FP4 (E2M1) weights in groups, rounded with error feedback.",
    codec=small_float,
    solver=gptq,
    differs="Weights only, free scales, no low-rank correction.",
    claims=(Claim("FP4 weights are no more than 1 % worse than INT4 at equal groups.", "gptq", (4,), 1.01),),
)

recipe(
    name="llm-fp4",
    paper=Paper("LLM-FP4: 4-Bit Floating-Point Quantized Transformers", "2310.16836", "S169"),
    summary="FP4 whose split of exponent and mantissa is searched for each matrix.",
    codec=small_float,
    solver=_rounding,
    refine=best_float,
    differs="Weights only; the search is by weight error, with a scale for each group instead of a real-valued bias.",
    claims=(Claim("Searched FP4 is better than integers.", "rtn", (4,)),),
)


def _power_scaled(bits: float, shape: Shape) -> str:
    if not 4 <= bits < 6:
        raise NothingFits(f"Microscaling recipes here have 4 bits; {bits:.3f} were given.")
    return fullest(grouped("mxfp4:e2m1:{}", shape[1]), bits, shape)


recipe(
    name="zeroquant-fp-m1",
    paper=Paper(
        "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats",
        "2307.09782",
        "S184",
    ),
    summary="FP4 weights whose group scales are powers of two, rounded with error feedback.",
    codec=_power_scaled,
    solver=gptq,
    needs=("mxfp4:e2m1:g32",),
    differs="Weights only; scales are 8-bit exponents, so groups are finer than with float16 scales at equal bytes.",
    claims=(Claim("Power-of-two scales cost little against free ones.", "zeroquant-fp", (4,), 1.1),),
)
