"""A quantized weight and a low-rank correction: ZeroQuant-V2's LoRC, EoRA, LQ-LoRA."""

from __future__ import annotations

from tersor.contracts import Shape
from tersor.recipes.fit import grouped, integer, with_low_rank
from tersor.recipes.recipe import Claim, Paper
from tersor.recipes.registry import recipe
from tersor.solvers import Nearest

_FACTORS = "int8:row"
"""Codec of the factors: 8 bits, as LoRC has them, and EoRA and LQ-LoRA where they count bytes; twice the rank fits."""


def _dense(bits: float, shape: Shape) -> list[str]:
    """Coarse groups: their room goes to the factors."""
    return grouped(f"int{integer(bits)}:{{}}", shape[1], least=192)


recipe(
    name="zeroquant-v2",
    paper=Paper(
        "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation",
        "2303.08302",
        "S087",
    ),
    summary="Nearest rounding, and the best low-rank approximation of its error (LoRC).",
    codec=lambda bits, shape: with_low_rank(_dense(bits, shape), bits, shape, factors=_FACTORS, plain=True),
    solver=Nearest,
    differs=(
        "The rank is what the budget allows (3 to 12 here), paid for by coarser groups; factors are 8-bit integers "
        "with a scale for each component, and the right one is fitted once more to the left one as stored."
    ),
    claims=(Claim("Low-rank compensation beats rounding alone.", "rtn", (3, 4)),),
)

recipe(
    name="eora",
    paper=Paper(
        "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
        "2410.21271",
        "S109",
    ),
    summary="The same with the low-rank part that is best for the layer's output.",
    codec=lambda bits, shape: with_low_rank(_dense(bits, shape), bits, shape, factors=_FACTORS),
    solver=Nearest,
    differs="No pruning; the rank is what the budget allows, with factors in 8 bits.",
    claims=(
        Claim("Beats the plain singular value decomposition at equal rank.", "zeroquant-v2", (3, 4)),
        Claim("The output error is below that of the plain decomposition.", "zeroquant-v2", (3, 4), metric="output"),
    ),
)

recipe(
    name="lq-lora",
    paper=Paper(
        "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
        "2311.12023",
        "S101",
    ),
    summary="Codes and factors in turn.",
    codec=lambda bits, shape: with_low_rank(_dense(bits, shape), bits, shape, factors=_FACTORS, again=":again3"),
    solver=Nearest,
    differs=(
        "The decomposition only, weighted by the Gram matrix instead of Fisher means; integers in place of NF, no "
        "program that assigns bits, no tuning. Factors are 8-bit integers in every round."
    ),
    claims=(Claim("Alternating beats one pass on the same quantizer.", "eora", (2, 3)),),
)
