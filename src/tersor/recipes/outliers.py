"""A few weights kept apart: SqueezeLLM, GWQ and what it compares with, QuantEase with outliers, PB-LLM."""

from __future__ import annotations

from functools import partial

from tersor.contracts import Shape
from tersor.recipes.baselines import gptq
from tersor.recipes.fit import fullest, grouped, integer, largest, with_outliers
from tersor.recipes.recipe import Claim, NothingFits, Paper
from tersor.recipes.registry import recipe
from tersor.solvers import CoordinateDescent, ErrorFeedback, Nearest


def _kept(bits: float, shape: Shape, by: str = "", again: str = "") -> str:
    """At least 0.5 % of outliers, at 16 bits and a place each, and the finest groups that leave room for them."""
    dense = reversed(grouped(f"int{integer(bits)}:{{}}", shape[1]))
    return with_outliers(dense, bits, shape, least=0.5, by=by, again=again)


def _tables(bits: float, shape: Shape) -> str:
    """The widest tables that fit, and outliers for what is left."""
    return with_outliers([fullest(["lut4:row", "lut3:row", "lut2:row"], bits, shape)], bits, shape)


def _partly_binary(bits: float, shape: Shape) -> str:
    """As many weights of each row at 8 bits as fit beside the signs of the others and a bit for each to say which."""
    if bits > 3.5:
        raise NothingFits(f"Partial binarization is for up to 3.5 bits; {bits:.3f} were given.")
    columns = shape[1]

    def both(count: int) -> str:
        share = f"{count / columns:.6f}".rstrip("0")
        return f"weights(int8:row,bin:row):{share}"

    return largest(both, columns - 1, bits, shape) or with_outliers(["int1:row"], bits, shape)


def _signs(bits: float, shape: Shape) -> str:
    """Signs in the finest groups of at least 8 that fit, scales in 8 bits where that makes them finer."""
    if bits > 3.5:
        raise NothingFits(f"Signs with a scale for each group are for up to 3.5 bits; {bits:.3f} were given.")
    return fullest([*grouped("bin:{}:s8", shape[1], 8), *grouped("bin:{}", shape[1], 8)], bits, shape)


recipe(
    name="squeezellm",
    paper=Paper("SqueezeLLM: Dense-and-Sparse Quantization", "2306.07629", "S045"),
    summary="A table for each row by weighted k-means, and the most costly weights kept as they are.",
    codec=_tables,
    solver=lambda: Nearest(fisher=True),
    gradients=True,
    differs=(
        "Gradients of next tokens drawn from the model instead of those of the text. Outliers as many as the budget "
        "leaves room for (none where the tables of a small matrix fill it), by H_jj w² alone."
    ),
    claims=(
        Claim("At 3 bits the distance to the original is at most 0.8 of GPTQ's.", "gptq", (3,), 0.8),
        Claim("Weighted k-means beats unweighted.", "squeezellm-plain", (3,)),
    ),
)

recipe(
    name="squeezellm-plain",
    paper=Paper("SqueezeLLM: Dense-and-Sparse Quantization", "2306.07629", "S045"),
    summary="SqueezeLLM with k-means that knows no weights, and the largest weights kept.",
    codec=_tables,
    solver=Nearest,
    calibrated=False,
    differs="The paper's ablation; as squeezellm otherwise.",
)

recipe(
    name="magnitude-outliers",
    paper=Paper("The largest weights kept in float16, the rest rounded to nearest"),
    summary="The baseline of methods that choose outliers more cleverly.",
    codec=partial(_kept, by=":magnitude"),
    solver=Nearest,
    differs="Not a paper's. What is not kept is fitted to the inputs as in the methods that it is the baseline of.",
)

recipe(
    name="hessian-outliers",
    paper=Paper("The weights that cost a layer most to leave out kept in float16, the rest rounded in groups"),
    summary="Outliers by the diagonal of the layer's Hessian: H_jj w² each.",
    codec=_kept,
    solver=Nearest,
    differs="Not a paper's: what GWQ (2411.00850) compares its gradients with.",
)

recipe(
    name="gwq",
    paper=Paper("GWQ: Gradient-Aware Weight Quantization for Large Language Models", "2411.00850", "S031"),
    summary="The weights that the loss is steepest in kept in float16, the rest rounded in groups.",
    codec=partial(_kept, by=":gradient"),
    solver=Nearest,
    gradients=True,
    differs=(
        "The root mean square of the gradient over sequences, with next tokens drawn from the model instead of those "
        "of the text. At least 0.5 % of outliers, so that groups stay, 1 % in the paper."
    ),
    claims=(
        Claim("Outliers chosen by gradient beat as many chosen by magnitude.", "magnitude-outliers", (3, 4)),
        Claim("They beat as many chosen by the Hessian's diagonal.", "hessian-outliers", (3, 4)),
    ),
)

recipe(
    name="gptq-outliers",
    paper=Paper("The largest weights kept in float16, the rest by error feedback"),
    summary="The baseline of methods that optimise outliers and codes together.",
    codec=partial(_kept, by=":magnitude"),
    solver=gptq,
    differs="Not a paper's.",
)

recipe(
    name="quantease-outliers",
    paper=Paper("QuantEase: Optimization-based Quantization for Language Models", "2309.01885", "S183"),
    summary="Outliers and codes in turn, codes by coordinate descent.",
    codec=partial(_kept, again=":again2"),
    solver=lambda: CoordinateDescent(sweeps=3, start=ErrorFeedback(refit=False)),
    differs=(
        "Outliers are chosen by H_jj e² of what the codes leave, twice more after the first pass; the paper uses "
        "iterative hard thresholding."
    ),
    claims=(Claim("Beats outliers chosen by magnitude with error feedback.", "gptq-outliers", (3, 4)),),
)

recipe(
    name="binary",
    paper=Paper("Signs times a scale for each group, with error feedback"),
    summary="The sign of every weight, with a scale for each of the finest groups that fit.",
    codec=_signs,
    solver=ErrorFeedback,
    needs=("bin:row",),
    differs=(
        "Not a paper's: the baseline of methods that keep a few weights in more bits. Groups have at least 8 weights; "
        "of 2.25 bits that leaves about 0.2 unused, which verdicts correct by 6.02 dB a bit."
    ),
)

recipe(
    name="binary-rows",
    paper=Paper("Signs times a scale for each row, with error feedback"),
    summary="The sign of every weight and one scale a row: pure binarization.",
    codec=lambda _bits, _shape: "bin:row",
    solver=ErrorFeedback,
    needs=("bin:row",),
    differs="Not a paper's: the baseline that PB-LLM names. It takes about 1 bit however many are given.",
)

recipe(
    name="pb-llm",
    paper=Paper("PB-LLM: Partially Binarized Large Language Models", "2310.00034", "S061"),
    summary="A few salient weights of each row in 8 bits, the signs of all others with a scale; error feedback.",
    codec=_partly_binary,
    solver=ErrorFeedback,
    needs=("weights(int8:row,bin:row):0.05",),
    differs=(
        "As many salient weights as fit beside the mask of 1 bit a weight: 3 % at 2.25 bits and 17 % at 3.25, 10 to "
        "30 % in the paper. They are the same share of each row, chosen by H_jj w². Errors are fed back over both "
        "kinds at once, column by column; no training. Up to 2 bits, where signs and mask alone do not fit, salient "
        "weights are float16 with an index."
    ),
    claims=(
        Claim("Beats rounding to nearest at equal bits.", "rtn", (2, 3)),
        Claim("A few weights at 8 bits beat signs alone in finer groups.", "binary", (2, 3)),
        Claim("Perplexity is a tenth of that of signs alone.", "binary-rows", (3,), 0.1, "perplexity", extra=2.25),
    ),
)
