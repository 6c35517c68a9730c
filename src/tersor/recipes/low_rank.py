"""A quantized weight and a low-rank correction: ZeroQuant-V2's LoRC, EoRA, LQ-LoRA."""

from __future__ import annotations

from functools import partial

from tersor.contracts import Shape
from tersor.recipes.baselines import gptq
from tersor.recipes.fit import grouped, integer, with_low_rank
from tersor.recipes.recipe import Claim, Paper
from tersor.recipes.registry import recipe
from tersor.solvers import Nearest

_FACTORS = "int8:row"
"""Codec of the factors: 8 bits, as LoRC has them, and EoRA and LQ-LoRA where they count bytes; twice the rank fits."""


def _dense(bits: float, shape: Shape) -> list[str]:
    """Coarse groups: their room goes to the factors."""
    return grouped(f"int{integer(bits)}:{{}}", shape[1], least=192)


def _corrected(bits: float, shape: Shape, *, plain: bool = False, again: str = "") -> str:
    return with_low_rank(_dense(bits, shape), bits, shape, factors=_FACTORS, plain=plain, again=again)


def _pruned(bits: float, shape: Shape, *, plain: bool = False) -> str:
    """Half the weights at 4 bits, and the rank that fits."""
    return with_low_rank(["sparse2of4(int4:row)"], bits, shape, factors=_FACTORS, plain=plain)


_LORC = Paper(
    "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation",
    "2303.08302",
    "S087",
)
_EORA = Paper(
    "EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
    "2410.21271",
    "S109",
)
_LQ_LORA = Paper(
    "LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
    "2311.12023",
    "S101",
)

recipe(
    name="zeroquant-v2",
    paper=_LORC,
    summary="Nearest rounding, and the best low-rank approximation of its error (LoRC).",
    codec=partial(_corrected, plain=True),
    solver=Nearest,
    differs=(
        "The rank is what the budget allows (3 to 12 here), paid for by coarser groups; factors are 8-bit integers "
        "with a scale for each component, and the right one is fitted once more to the left one as stored."
    ),
    claims=(
        Claim("Low-rank compensation of at most 0.3 bits lowers the divergence.", "nearest-rows", (3, 4), extra=0.3),
        Claim("Low-rank compensation beats rounding alone at equal bytes.", "nearest", (3, 4)),
    ),
)

recipe(
    name="gptq-lorc",
    paper=_LORC,
    summary="Error feedback, and the best low-rank approximation of its error.",
    codec=partial(_corrected, plain=True),
    solver=gptq,
    differs="As zeroquant-v2.",
    claims=(
        Claim("Low-rank compensation of at most 0.3 bits lowers the divergence.", "gptq-rows", (3, 4), extra=0.3),
        Claim("Low-rank compensation improves on error feedback at equal bytes.", "gptq", (3, 4)),
    ),
)

recipe(
    name="eora",
    paper=_EORA,
    summary="As zeroquant-v2, with the low-rank part that is best for the layer's output.",
    codec=_corrected,
    solver=Nearest,
    differs="No pruning (see eora-2of4); the rank is what the budget allows, with factors in 8 bits.",
    claims=(Claim("Beats the plain singular value decomposition at equal rank.", "zeroquant-v2", (3, 4)),),
)

recipe(
    name="eora-2of4",
    paper=_EORA,
    summary="Two of every four weights at 4 bits, and the low-rank part that is best for the layer's output.",
    codec=_pruned,
    solver=Nearest,
    needs=("sparse2of4(int4:row)",),
    differs=(
        "The weights that stay are refitted by least squares before; the rank is what the budget allows (about 40 of "
        "576 at 4 bits, 32 in the paper's layers), with factors in 8 bits."
    ),
    claims=(Claim("It beats the plain decomposition of equal rank on pruned weights.", "lorc-2of4", (4,)),),
)

recipe(
    name="lorc-2of4",
    paper=_LORC,
    summary="Two of every four weights at 4 bits, and the best low-rank approximation of what they leave.",
    codec=partial(_pruned, plain=True),
    solver=Nearest,
    needs=("sparse2of4(int4:row)",),
    differs="The baseline of eora-2of4, otherwise as that.",
)

recipe(
    name="lq-lora",
    paper=_LQ_LORA,
    summary="Codes and factors in turn.",
    codec=partial(_corrected, again=":again3"),
    solver=Nearest,
    differs=(
        "The decomposition only, weighted by the Gram matrix instead of Fisher means; integers in place of NF, no "
        "program that assigns bits, no tuning. Factors are 8-bit integers in every round."
    ),
    claims=(
        Claim("Alternating beats one pass on the same quantizer.", "eora", (2, 3)),
        Claim("Weighting the decomposition lowers the divergence.", "lq-lora-plain", (3,)),
    ),
)

recipe(
    name="lq-lora-plain",
    paper=_LQ_LORA,
    summary="LQ-LoRA with a low-rank part that knows no weights.",
    codec=partial(_corrected, plain=True, again=":again3"),
    solver=Nearest,
    differs="The paper's ablation; as lq-lora otherwise.",
)
