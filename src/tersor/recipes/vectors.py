"""Codes for several weights at once, and other codecs; each recipe is there when its codec is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tersor.contracts import Shape
from tersor.recipes.fit import fullest, grouped, groups
from tersor.recipes.recipe import Claim, NothingFits, Paper
from tersor.recipes.registry import readable, recipe
from tersor.solvers import ErrorFeedback, Nearest


def trellis(bits: float, shape: Shape) -> str:
    """A rotated trellis of as many whole bits as fit."""
    return fullest([f"rot(trellis{width}:L12)" for width in (1, 2, 3, 4)], bits, shape)


def _lattice(bits: float, shape: Shape) -> str:
    return fullest(["rot(e8p:row)", "rot(sum(e8p:row,e8p:row))", "rot(sum(e8p:row,int1:row))"], bits, shape)


def _codebooks(bits: float, shape: Shape, stages: Sequence[int] = range(2, 5)) -> str:
    texts = [f"vq{index}x{width}" for width in (2, 3, 4, 6) for index in range(4, 13)]
    texts += [f"vq{index}x{width}:r{n}" for width in (4, 6, 8) for index in range(6, 11) for n in stages]
    return fullest([text for text in texts if readable(text)], bits, shape)


def _ternary(bits: float, shape: Shape) -> str:
    if bits > 3:
        raise NothingFits(f"Ternary weights are for up to 3 bits; {bits:.3f} were given.")
    return fullest(grouped("ternary:{}", shape[1]), bits, shape)


def _pyramid(bits: float, shape: Shape) -> str:
    spans = [size for size in groups(shape[1], 8) if size <= 64]
    texts = [f"pvq{width}:n{size}" for width in range(1, 7) for size in spans]
    return f"rot({fullest([text for text in texts if readable(text)], bits, shape)})"


def _planes(bits: float, shape: Shape) -> str:
    heads = ("bin", "bin2", "bin3", "bin4")
    return fullest([text for head in heads for text in grouped(head + ":{}", shape[1])], bits, shape)


def _dual(bits: float, shape: Shape) -> str:
    if bits > 3:
        raise NothingFits(f"Dual binary weights have 2 bits; {bits:.3f} were given.")
    return fullest(grouped("fdb:{}", shape[1]), bits, shape)


def entropy_coded(bits: float, shape: Shape) -> str:
    """An entropy-coded trellis at the highest rate that fits."""
    return fullest([f"ectcq{hundredth / 100:g}" for hundredth in range(50, 801)], bits, shape)


recipe(
    name="qtip",
    paper=Paper("QTIP: Quantization with Trellises and Incoherence Processing", "2406.11235"),
    summary="A bit-shift trellis in a rotated basis, with error feedback.",
    codec=trellis,
    solver=ErrorFeedback,
    needs=("rot(trellis2:L12)",),
    differs="A window of 12 bits and a small table instead of 16 bits and a computed code; rows alone are rotated.",
    claims=(
        Claim("Trellises beat the lattice codebook at equal bits.", "quip-sharp", (2, 4)),
        Claim("Trellises beat integers with error feedback.", "gptq", (2, 3, 4), 0.8),
    ),
)

recipe(
    name="quip-sharp",
    paper=Paper("QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks", "2402.04396"),
    summary="The E8P lattice codebook in a rotated basis, with error feedback.",
    codec=_lattice,
    solver=ErrorFeedback,
    needs=("rot(e8p:row)",),
    differs="Rows alone are rotated; no fine-tuning; 3 bits add a sign where the paper adds a 1-bit lattice.",
    claims=(Claim("The lattice beats rotated integers.", "quip", (2, 3, 4)),),
)

_VPTQ = Paper("VPTQ: Extreme Low-bit Vector Post-Training Quantization for Large Language Models", "2409.17066", "S178")

recipe(
    name="vptq",
    paper=_VPTQ,
    summary="Vectors of weights from a codebook found by weighted k-means, with error feedback and residual stages.",
    codec=_codebooks,
    solver=ErrorFeedback,
    needs=("vq8x4",),
    differs="Vectors lie along the inputs instead of the outputs; no codebook for outlier columns, no tuning.",
    claims=(
        Claim("At two bits it beats GPTQ, codebooks counted.", "gptq", (2,)),
        Claim("Error feedback lowers the divergence.", "vptq-nearest", (2,)),
        Claim("Weighted k-means and error feedback beat unweighted vector quantization.", "vq", (2,)),
        Claim("Residual stages lower it.", "vptq-single", (2,)),
    ),
)

recipe(
    name="vptq-nearest",
    paper=_VPTQ,
    summary="The codebooks of vptq without error feedback.",
    codec=_codebooks,
    solver=Nearest,
    needs=("vq8x4",),
    differs="The paper's ablation; as vptq otherwise.",
    claims=(Claim("Codebooks weighted by the Hessian's diagonal beat unweighted ones.", "vq", (2,)),),
)

recipe(
    name="vptq-single",
    paper=_VPTQ,
    summary="VPTQ with one codebook, no residual stages.",
    codec=partial(_codebooks, stages=()),
    solver=ErrorFeedback,
    needs=("vq8x4",),
    differs="The paper's ablation; as vptq otherwise.",
)

recipe(
    name="vq",
    paper=Paper("Vector quantization by k-means, without weights"),
    summary="Vectors of weights from a codebook found by k-means, rounded to nearest.",
    codec=_codebooks,
    solver=Nearest,
    calibrated=False,
    needs=("vq8x4",),
    differs="Not a paper's: the baseline of vptq.",
)

recipe(
    name="ternary",
    paper=Paper("The Era of 1-bit LLMs (its number format, without its training)", "2402.17764"),
    summary="Three values a group, five weights to a byte.",
    codec=_ternary,
    solver=ErrorFeedback,
    needs=("ternary:row",),
    differs="Rounded after training; the paper trains with it.",
)

recipe(
    name="ectcq",
    paper=Paper("Entropy-coded trellis-coded quantization (Fischer and Wang, 1992), with error feedback"),
    summary="A trellis whose codes are entropy coded: any rate, near the limit.",
    codec=entropy_coded,
    solver=ErrorFeedback,
    needs=("ectcq2",),
    differs="Not a paper's on language models.",
    claims=(Claim("Entropy-coded trellises beat integers with error feedback.", "gptq", (2, 3, 4), 0.6),),
)

recipe(
    name="pvq",
    paper=Paper("Pyramid Vector Quantization for LLMs", "2410.16926", "S151"),
    summary="Shape and gain in a rotated basis; shapes are numbered, no codebook is stored; error feedback.",
    codec=_pyramid,
    solver=ErrorFeedback,
    needs=("pvq3:n16",),
    differs="Rows alone are rotated; a gain is 8 bits for each vector. The paper fits gains to their distribution.",
    claims=(Claim("At about 3.25 bits it beats GPTQ.", "gptq", (3,)),),
)

recipe(
    name="residual-binary",
    paper=Paper("BiLLM: Pushing the Limit of Post-Training Quantization for LLMs (its residual planes)", "2402.04291"),
    summary="A sum of sign planes, each with a scale for each group; error feedback.",
    codec=_planes,
    solver=ErrorFeedback,
    needs=("bin2:g64",),
    differs="All weights get the same number of planes; no salient columns, no split by magnitude.",
    claims=(Claim("Beats partial binarization at equal bytes.", "pb-llm", (2,)),),
)

recipe(
    name="db-llm",
    paper=Paper("DB-LLM: Accurate Dual-Binarization for Efficient LLMs", "2402.11960", "S057"),
    summary="Two planes of {0, 1} with scales of their own; error feedback.",
    codec=_dual,
    solver=ErrorFeedback,
    needs=("fdb:g64",),
    differs="Scales by least squares; no distillation. Groups are coarser than 64, of which two scales would not fit.",
    claims=(Claim("Two learned planes beat the fixed 2-bit grid, its scales refitted too.", "feedback-refit", (2,)),),
)
