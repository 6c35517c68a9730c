"""What papers measure against: nearest rounding, GPTQ, AWQ, clipping, HQQ, rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.contracts import Codec, Encoded, Gram, LeafCodec, Shape, Solver
from tersor.recipes.fit import fullest, grouped, integer
from tersor.recipes.recipe import Claim, Paper, Prepared
from tersor.recipes.registry import recipe
from tersor.solvers import CoordinateDescent, ErrorFeedback, FullRange, HalfQuadratic, Nearest

_SAMPLED_ROWS = 256
_EXPONENTS = 11


def uniform(bits: float, shape: Shape) -> str:
    """Symmetric integers with float16 scales: groups of 64 where they fit, else the finest that do."""
    text = f"int{integer(bits)}:g64"
    return fullest([text, *grouped(f"int{integer(bits)}:{{}}", shape[1])], bits, shape)


def _by_rows(bits: float, _shape: Shape) -> str:
    return f"int{integer(bits)}:row"


def shifted(bits: float, shape: Shape) -> str:
    """Integers with a scale and a zero for each group; where not even one zero a row fits, without zeros."""
    head = f"int{integer(bits)}"
    return fullest([*grouped(head + ":{}:asym", shape[1]), f"{head}:row"], bits, shape)


def gptq() -> Solver:
    """Error feedback as published: columns by activation, no least squares at the end."""
    return ErrorFeedback(refit=False)


def refitted(bits: float, shape: Shape) -> str:
    """Integers in the finest groups that fit, with scales of 8 bits where there are such."""
    width = integer(bits)
    return fullest([*grouped(f"int{width}:{{}}:s8", shape[1]), *grouped(f"int{width}:{{}}", shape[1])], bits, shape)


recipe(
    name="rtn",
    paper=Paper("Round to nearest"),
    summary="Every weight to the nearest of an integer grid that reaches its group's largest; no calibration.",
    codec=uniform,
    solver=FullRange,
    calibrated=False,
    differs="The grid is symmetric without a zero (values are odd multiples of half a step).",
)

recipe(
    name="gptq",
    paper=Paper("GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", "2210.17323"),
    summary="Columns rounded one after the other, each error pushed onto the columns still to come.",
    codec=uniform,
    solver=gptq,
    differs=(
        "Scales are chosen before rounding by weighted squared error; the Gram matrices are those of the original "
        "model, where the paper's are of what the blocks before have become."
    ),
    claims=(Claim("Error feedback beats rounding to nearest.", "rtn", (2, 3, 4), 0.9),),
)

recipe(
    name="nearest",
    paper=Paper("Round to nearest with fitted scales"),
    summary="The same grids as rtn and gptq, each scale fitted to the weights and the inputs' energies.",
    codec=uniform,
    solver=Nearest,
    differs="Not a paper's: the baseline of methods that fit scales and do something else too.",
)

recipe(
    name="nearest-rows",
    paper=Paper("Round to nearest, one fitted scale a row"),
    summary="As nearest, with a scale for each row alone: what low-rank corrections are added to.",
    codec=_by_rows,
    solver=Nearest,
    differs="Not a paper's: it takes about 0.2 bits less than others, for claims about what those 0.2 bits do.",
)

recipe(
    name="gptq-rows",
    paper=Paper("GPTQ, one scale a row", "2210.17323"),
    summary="As gptq, with a scale for each row alone: what low-rank corrections are added to.",
    codec=_by_rows,
    solver=gptq,
    differs="As gptq; it takes about 0.2 bits less than others, for claims about what those 0.2 bits do.",
)

recipe(
    name="clipping",
    paper=Paper("OmniQuant: Omnidirectionally Calibrated Quantization for Large Language Models", "2308.13137"),
    summary="Nearest rounding with clipping ranges fitted to the calibration text.",
    codec=shifted,
    solver=Nearest,
    differs=(
        "Ranges are searched against the Gram matrix's diagonal, layer by layer; the paper learns them by gradient "
        "descent on each block's output, together with equivalent transformations."
    ),
    claims=(Claim("Fitted clipping beats rounding to nearest.", "rtn", (2, 3)),),
)

recipe(
    name="hqq",
    paper=Paper("Half-Quadratic Quantization of Large Machine Learning Models (Badri and Shaji, 2023)"),
    summary="Scale and zero of each group minimise an error norm below 1, without calibration.",
    codec=shifted,
    solver=HalfQuadratic,
    calibrated=False,
    differs=(
        "Zeros are whole numbers and the scale is fitted too; errors are measured in units of the scale. The paper "
        "moves a float zero alone."
    ),
    claims=(Claim("Without calibration it beats rounding to nearest.", "rtn", (2, 3, 4)),),
)


def _scaled(weight: Tensor, gram: Gram, codec: Codec) -> Prepared:
    """AWQ's search: column scales ``H_jj^(a/2)``, ``a`` from 0 to 1, judged by the output error of nearest rounding."""
    assert isinstance(codec, LeafCodec)
    energy = gram.matrix.diagonal().clamp(min=1e-12)
    energy = energy / energy.mean()
    step = max(len(weight) // _SAMPLED_ROWS, 1)
    rows = weight[::step].contiguous()
    best, scale = float("inf"), torch.ones(weight.shape[1])
    for index in range(_EXPONENTS):
        wanted = energy.pow(0.5 * index / (_EXPONENTS - 1))
        wanted = wanted / (wanted.max() * wanted.min()).sqrt()
        stored = wanted.clamp(1e-4, 1e4).to(torch.float16).to(torch.float32)
        side = codec.prepare(rows * stored, energy / stored.square())
        codes, _ = codec.round(rows * stored, side, torch.arange(weight.shape[1]))
        error = rows - codec.values(Encoded(codes, side), weight.shape[1]) / stored
        loss = float(((error @ gram.matrix) * error).double().sum())
        if loss < best:
            best, scale = loss, stored
    return scaled_columns(weight, gram, scale)


def scaled_columns(weight: Tensor, gram: Gram, scale: Tensor) -> Prepared:
    """Columns multiplied by ``scale (in,)``, the inputs divided by it; exact but for rounding."""
    matrix = gram.matrix / scale[:, None] / scale[None, :]
    return Prepared(weight * scale, Gram(matrix, gram.tokens), lambda values: values / scale)


def column_scales(shape: Shape) -> int:
    """Bits of one float16 a column."""
    return 16 * shape[1]


recipe(
    name="awq",
    paper=Paper("AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", "2306.00978"),
    summary="Columns with large inputs are scaled up before nearest rounding, and the scale is undone afterwards.",
    codec=shifted,
    solver=Nearest,
    prepare=_scaled,
    side=column_scales,
    differs=(
        "The scales of a layer are its own and stored with it as float16, which is counted; the paper folds them into "
        "the layer before, one set for all layers with the same input."
    ),
    claims=(
        Claim("Activation-aware scaling beats rounding to nearest.", "rtn", (3, 4)),
        Claim("It beats fitted clipping alone, its scales counted.", "clipping", (3, 4)),
    ),
)

recipe(
    name="quip",
    paper=Paper("QuIP: 2-Bit Quantization of Large Language Models With Guarantees", "2307.13304"),
    summary="Weights in a rotated basis, then error feedback onto integers.",
    codec=lambda bits, shape: f"rot({uniform(bits, shape)})",
    solver=gptq,
    differs=(
        "Rows only are rotated, by a randomised Hadamard matrix; the paper rotates both sides by random orthogonal "
        "matrices and uses one scale a matrix."
    ),
    claims=(Claim("At two bits, incoherence makes error feedback work where it fails without.", "gptq", (2,)),),
)

recipe(
    name="feedback-refit",
    paper=Paper("Our default before guidance: coordinate descent from error feedback, scales by least squares"),
    summary="What tersor compress did with plain integers before it weighted tokens.",
    codec=refitted,
    solver=CoordinateDescent,
    differs="Not a paper's.",
    claims=(Claim("Least squares and sweeps improve on error feedback.", "gptq", (2, 3, 4)),),
)
