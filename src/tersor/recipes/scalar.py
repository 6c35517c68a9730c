"""Scalar grids: FineQuant, QuantEase, decoupleQ, small floats."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tersor.codecs import Integer, SmallFloat, parse
from tersor.contracts import Codec, Encoded, Shape, Solver
from tersor.recipes.baselines import gptq, uniform
from tersor.recipes.fit import fullest, grouped, integer, with_low_rank
from tersor.recipes.recipe import Claim, NothingFits, Paper
from tersor.recipes.registry import recipe
from tersor.recovery import BlockTuning
from tersor.solvers import Alternating, CoordinateDescent, ErrorFeedback, FullRange, Nearest

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


def _mean_range(weight: Tensor, codec: Codec) -> float:
    """What a codec's groups span on average: their largest magnitude."""
    assert isinstance(codec, Integer)
    return float(weight.abs().reshape(len(weight), -1, codec.group or weight.shape[1]).amax(2).mean())


def _halved(bits: float, shapes: Mapping[str, Shape], mean_range: Callable[[str, str], float]) -> dict[str, str]:
    """Groups halved in each layer while that narrows their ranges to ``alpha`` or less, for the largest that fits."""
    texts, steps = {}, {}
    for name, shape in shapes.items():
        texts[name] = [str(Integer(integer(bits), size)) for size in _halvings(shape[1])]
        ranges = [mean_range(name, text) for text in texts[name]]
        # A halving is reached through all before it.
        narrowed = (fine / max(coarse, 1e-30) for coarse, fine in pairwise(ranges))
        steps[name] = list(accumulate(narrowed, max))

    def chosen(alpha: float) -> dict[str, str]:
        return {name: texts[name][bisect_right(steps[name], alpha)] for name in shapes}

    def fits(alpha: float) -> bool:
        return sum(parse(text).bits(shapes[name]) for name, text in chosen(alpha).items()) <= limit

    limit = bits * sum(rows * columns for rows, columns in shapes.values())
    bounds = [-1.0, *sorted({step for found in steps.values() for step in found})]
    most = bisect_right(bounds, False, key=lambda alpha: not fits(alpha))
    if not most:
        raise NothingFits(f"Integers of {integer(bits)} bits with a scale a row take more than {bits:.3f} bits each.")
    return chosen(bounds[most - 1])


recipe(
    name="finequant",
    paper=Paper(
        "FineQuant: Unlocking Efficiency with Fine-Grained Weight-Only Quantization for LLMs", "2308.09723", "S035"
    ),
    summary="Each matrix starts with a scale per row and halves its groups while that narrows their ranges enough.",
    codec=_fine,
    solver=FullRange,
    calibrated=False,
    plan=_halved,
    plan_loss=_mean_range,
    differs=(
        "How much halving must narrow the mean range by, alpha in the paper, is what the budget allows, the same for "
        "all matrices. Integers only, 4 and 8 bits in the paper."
    ),
    claims=(Claim("Group sizes chosen per matrix are no worse than uniform groups.", "rtn", (4,)),),
)

recipe(
    name="quantease",
    paper=Paper("QuantEase: Optimization-based Quantization for Language Models", "2309.01885", "S183"),
    summary="Coordinate descent on the layer's output error, on GPTQ's grid.",
    codec=uniform,
    solver=lambda: CoordinateDescent(25, ErrorFeedback(refit=False), begin="weights", relaxed=True),
    differs="Blocks of 128 columns are gone through at a time; a group of 64 has a scale, a row in the paper.",
    claims=(
        Claim("No worse than GPTQ on the same grid.", "gptq", (3, 4)),
        Claim("The layers' output error is below GPTQ's.", "gptq", (3, 4), metric="output"),
    ),
)

_DECOUPLEQ = Paper(
    "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into Integer and Floating "
    "Points",
    "2404.12759",
    "S195",
)

recipe(
    name="decoupleq",
    paper=_DECOUPLEQ,
    summary="Codes and scales in turn: least squares for one, a box-constrained integer problem for the other.",
    codec=uniform,
    solver=Alternating,
    differs="Symmetric grids, so no zero is fitted; starts from error feedback; blocks are tuned in decoupleq-tuned.",
    claims=(Claim("At two bits the model is closer than GPTQ's.", "gptq", (2,)),),
)

recipe(
    name="decoupleq-tuned",
    paper=_DECOUPLEQ,
    summary="Codes and scales of decoupleq in turn, then both tuned against each block's output.",
    codec=uniform,
    solver=Alternating,
    tune=BlockTuning(steps=48, checks=1, mixed=True),
    differs="Symmetric grids; codes may move by a step while scales are tuned, where the paper holds them; no norms.",
    claims=(Claim("Tuning blocks lowers the divergence again.", "decoupleq", (2,)),),
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


_ZEROQUANT_FP = Paper(
    "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats",
    "2307.09782",
    "S184",
)


def _float_rows(bits: float, _shape: Shape) -> str:
    if not 4 <= bits < 6:
        raise NothingFits(f"Floats by rows here have 4 bits; {bits:.3f} were given.")
    return "fp4:e2m1:row"


def _corrected_float(bits: float, shape: Shape) -> str:
    if not 4 <= bits < 6:
        raise NothingFits(f"Corrected floats here have 4 bits; {bits:.3f} were given.")
    return with_low_rank(grouped("fp4:e2m1:{}", shape[1], least=192), bits, shape, factors="int8:row", plain=True)


recipe(
    name="zeroquant-fp",
    paper=_ZEROQUANT_FP,
    summary="FP4 (E2M1) weights in groups, rounded with error feedback.",
    codec=small_float,
    solver=gptq,
    differs="Weights only, free scales.",
    claims=(Claim("FP4 weights are no more than 1 % worse than INT4 at equal groups.", "gptq", (4,), 1.01),),
)

recipe(
    name="zeroquant-fp-rows",
    paper=_ZEROQUANT_FP,
    summary="FP4 (E2M1) weights with one scale a row, rounded with error feedback: what LoRC is added to.",
    codec=_float_rows,
    solver=gptq,
    differs="Weights only; it takes about 0.2 bits less than others, for the claim about what those 0.2 bits do.",
)

recipe(
    name="zeroquant-fp-lorc",
    paper=_ZEROQUANT_FP,
    summary="FP4 in coarser groups than zeroquant-fp, and a low-rank correction of the error for what those save.",
    codec=_corrected_float,
    solver=gptq,
    differs="Weights only, free scales; the rank is what the budget allows, with factors in 8 bits.",
    claims=(
        Claim("Low-rank compensation closes part of the gap for 0.3 bits.", "zeroquant-fp-rows", (4,), extra=0.3),
        Claim("Low-rank compensation closes part of the gap, at equal bytes.", "zeroquant-fp", (4,)),
    ),
)

recipe(
    name="llm-fp4",
    paper=Paper("LLM-FP4: 4-Bit Floating-Point Quantized Transformers", "2310.16836", "S169"),
    summary="FP4 whose split of exponent and mantissa is searched for each matrix.",
    codec=small_float,
    solver=_rounding,
    refine=best_float,
    differs="Weights only; the search is by weight error, with a scale for each group instead of a real-valued bias.",
    claims=(
        Claim("Searched FP4 is better than integers with fitted scales.", "nearest", (4,)),
        Claim("A searched split of exponent and mantissa beats a fixed one.", "fp4", (4,)),
    ),
)

recipe(
    name="fp4",
    paper=Paper("FP4 (E2M1) rounded to nearest"),
    summary="Floats with two bits of exponent and one of mantissa, each group's scale fitted.",
    codec=small_float,
    solver=_rounding,
    differs="Not a paper's: the baseline of llm-fp4.",
)


def _power_scaled(bits: float, shape: Shape) -> str:
    if not 4 <= bits < 6:
        raise NothingFits(f"Microscaling recipes here have 4 bits; {bits:.3f} were given.")
    return fullest(grouped("mxfp4:e2m1:{}", shape[1]), bits, shape)


recipe(
    name="zeroquant-fp-m1",
    paper=_ZEROQUANT_FP,
    summary="FP4 weights whose group scales are powers of two, rounded with error feedback.",
    codec=_power_scaled,
    solver=gptq,
    needs=("mxfp4:e2m1:g32",),
    differs="Weights only; scales are 8-bit exponents, so groups are finer than with float16 scales at equal bytes.",
    claims=(Claim("Power-of-two scales cost little against free ones.", "zeroquant-fp", (4,), 1.1),),
)


def _row_scaled(bits: float, shape: Shape) -> str:
    if not 4 <= bits < 6:
        raise NothingFits(f"Recipes with scales of rows times powers of two here have 4 bits; {bits:.3f} were given.")
    return fullest(grouped("m2fp4:e2m1:{}", shape[1]), bits, shape)


recipe(
    name="zeroquant-fp-m2",
    paper=_ZEROQUANT_FP,
    summary="FP4 weights whose group scales are a row's number times powers of two, rounded with error feedback.",
    codec=_row_scaled,
    solver=gptq,
    needs=("m2fp4:e2m1:g32",),
    differs=(
        "Weights only. A row's number is its largest scale or up to an octave above, whichever loses least, and so is "
        "each group's power. Exponents take 4 bits, so groups are finer than with float16 scales at equal bytes. The "
        "paper loses less than 1 % of perplexity at equal groups; the claim is 1.1 times the divergence at equal bytes."
    ),
    claims=(
        Claim(
            "Scales that are a row's largest times powers of two cost little against free ones.",
            "zeroquant-fp",
            (4,),
            1.1,
        ),
        Claim("It costs less than plain powers of two.", "zeroquant-fp-m1", (4,)),
    ),
)
