"""Rounding and scales learned by gradients: AdaRound, AdaQuant, AutoRound, small floats, a tuned trellis."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tersor.contracts import Shape, Solver
from tersor.recipes.baselines import gptq, uniform
from tersor.recipes.fit import least_loss
from tersor.recipes.recipe import Claim, Paper
from tersor.recipes.registry import recipe
from tersor.recipes.scalar import best_float, small_float
from tersor.recipes.vectors import trellis
from tersor.recovery import BlockTuning
from tersor.solvers import ErrorFeedback, LearnedPerturbation, LearnedRounding

_WIDTHS = (2, 3, 4, 5)
_SIDE = 0.25
"""Bits per weight for scales in groups of 64."""


def integer_programme(bits: float, shapes: Mapping[str, Shape], loss: Callable[[str, str], float]) -> dict[str, str]:
    """Integers of 2 to 5 bits for each layer with the least sum of losses, at most ``bits`` per weight in all."""
    forms = {
        name: sorted({uniform(width + _SIDE, shape) for width in _WIDTHS} | {f"int{width}:row" for width in _WIDTHS})
        for name, shape in shapes.items()
    }
    return least_loss(forms, bits, shapes, loss)


def _rounding() -> Solver:
    return LearnedRounding(mixed=True)


def _perturbation() -> Solver:
    return LearnedPerturbation(mixed=True)


recipe(
    name="adaround",
    paper=Paper("Up or Down? Adaptive Rounding for Post-Training Quantization", "2004.10568"),
    summary="Each weight goes up or down, softly at first, by gradient descent on its layer's output error.",
    codec=uniform,
    solver=_rounding,
    differs=(
        "The exact gradient under the Gram matrix instead of random batches, so 100 steps instead of 10,000; a scale "
        "for each group, by least squares in the end; no account of the activation function."
    ),
    claims=(
        Claim("Learned rounding beats rounding to nearest.", "rtn", (2, 3, 4)),
        Claim("Its output error is below that of fitted nearest rounding.", "clipping", (3, 4), metric="output"),
    ),
)

_ADAQUANT = Paper(
    "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming",
    "2006.10518",
    "S082",
)

recipe(
    name="adaquant-even",
    paper=_ADAQUANT,
    summary="A learned perturbation of each weight before rounding, and fitted scales; the same bits for all layers.",
    codec=uniform,
    solver=_perturbation,
    differs="Weights only; the exact gradient under the Gram matrix; scales by least squares; no tuning of norms.",
    claims=(
        Claim("More freedom than up or down lowers the loss.", "adaround", (2, 3, 4)),
        Claim("A learned perturbation beats rounding to nearest.", "rtn", (2, 3, 4)),
    ),
)

recipe(
    name="adaquant",
    paper=_ADAQUANT,
    summary="AdaQuant with 2 to 5 bits for each layer by an integer programme.",
    codec=uniform,
    solver=_perturbation,
    plan=integer_programme,
    plan_solver=lambda: ErrorFeedback(refit=False),
    differs=(
        "What a layer adds to the network's loss is expected from gradients at its outputs and its output error by "
        "error feedback, on some rows; the paper measures it, one layer at a time. Rows without groups are allowed, "
        "for 2 bits would leave no choice otherwise."
    ),
    claims=(Claim("Bits by integer programme beat the same bits everywhere.", "adaquant-even", (2, 3, 4)),),
)

recipe(
    name="autoround",
    paper=Paper(
        "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs (AutoRound)", "2309.05516"
    ),
    summary="Rounding offsets and scales of a block by signed gradients of the block's output error.",
    codec=uniform,
    solver=gptq,
    tune=BlockTuning(steps=48, checks=1, sample=16_384, mixed=True),
    differs=(
        "It begins with error feedback's codes instead of the nearest ones, and takes 48 steps of 1,024 tokens instead "
        "of 200 of 16,384; one multiplier a group for a symmetric grid; kept where it helps on all sequences."
    ),
    claims=(
        Claim("Block-wise learned rounding beats error feedback at 2 bits.", "gptq", (2,)),
        Claim("It beats rounding to nearest.", "rtn", (2, 3, 4)),
        Claim("It beats layer-wise learned rounding.", "adaround", (2, 3, 4)),
    ),
)

recipe(
    name="fp-learned",
    paper=Paper(
        "Low-Bitwidth Floating Point Quantization for Efficient High-Quality Diffusion Models", "2408.06995", "S085"
    ),
    summary="FP4 whose split of exponent and mantissa is searched for each matrix, with learned rounding.",
    codec=small_float,
    solver=_rounding,
    refine=best_float,
    differs="Language models; weights only; free scales of groups instead of a bias for each tensor.",
    claims=(
        Claim("Learned rounding of small floats beats nearest rounding.", "llm-fp4", (4,)),
        Claim("Small floats beat integers with the same calibration.", "adaround", (4,)),
    ),
)

recipe(
    name="qtip-tuned",
    paper=Paper("QTIP: Quantization with Trellises and Incoherence Processing (its fine-tuning)", "2406.11235"),
    summary="A rotated trellis whose row scales are tuned against each block's output.",
    codec=trellis,
    solver=ErrorFeedback,
    needs=("rot(trellis2:L12)",),
    tune=BlockTuning(steps=16, rate=0.03, mixed=True),
    differs=(
        "Row scales alone, after the whole block is encoded; the paper tunes weights not yet encoded too, and norms. "
        "As in qtip, a window of 12 bits and rows alone rotated."
    ),
    claims=(Claim("Tuned scales lower the divergence.", "qtip", (2,)),),
)
