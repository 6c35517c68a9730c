"""Codes and their lengths: entropy-coded integers, the generalized Gaussian prior, blocks with shifts."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tersor.codecs import Coded, SmallFloat
from tersor.contracts import Codec, Encoded, Gram, Shape
from tersor.errors import BadInput
from tersor.recipes.fit import fullest, grouped, integer
from tersor.recipes.recipe import Claim, NothingFits, Paper, Prepared
from tersor.recipes.registry import recipe
from tersor.solvers import ErrorFeedback, Nearest
from tersor.statistics import generalized_gaussian

_PRIOR = Paper(
    "It Takes a Good Model to Train a Good Model: Generalized Gaussian Priors for Optimized LLMs", "2506.00486", "S011"
)
_SPLITS = (2, 3, 4, 5)
_SAMPLE = 1 << 14
_NARROWER = 0.8
"""The shape that weights are moved towards, as a share of their own."""
_LEEWAY = 0.1
"""What moving weights may lose, as a share of what rounding them will."""

_FEWER_BYTES = {bits: 4.0 ** (-0.05 * (bits + 0.25)) for bits in (2.0, 3.0, 4.0)}
"""At each number of bits, the ratio of divergences that 5 % of all bytes are worth at 6.02 dB a bit."""


def coded(bits: float, shape: Shape) -> str:
    """Integers far finer than the budget, one scale a row: the entropy coder's step is the only choice left."""
    hundredths = math.floor(bits * 100 + 1e-6)
    return fullest([f"coded(int8:row):{(hundredths - less) / 100:g}" for less in range(40)], bits, shape)


def floats(exponent: int, bits: float, shape: Shape) -> str:
    """8-bit floats in the finest groups that fit."""
    if bits < 8:
        raise NothingFits(f"8-bit floats take 8 bits and scales; {bits:.3f} were given.")
    return fullest(grouped(f"fp8:e{exponent}m{7 - exponent}:{{}}", shape[1]), bits, shape)


def blocks(bits: float, shape: Shape) -> str:
    """The smallest blocks that fit, as square as can be."""
    sizes = [(side * tall, side * wide) for side in (32, 16, 8, 4, 2) for tall, wide in ((1, 1), (1, 2), (2, 1))]
    texts = [f"block{integer(bits)}:{rows}x{wide}" for rows, wide in sizes if shape[1] % wide == 0]
    return fullest([*texts, f"block{integer(bits)}:layer"], bits, shape)


@lru_cache(maxsize=256)
def split_for(tenths: int, codec: SmallFloat) -> int:
    """The bits of exponent with which ``codec`` loses least on a generalized Gaussian of shape ``tenths / 10``."""
    group = codec.group or 1024
    prior = generalized_gaussian.of_deviation(tenths / 10, 1.0)
    size = prior.magnitudes((torch.arange(_SAMPLE // group * group) + 0.5) / (_SAMPLE // group * group)).float()
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, size.shape, generator=generator) * 2 - 1
    values = (size * sign)[torch.randperm(len(size), generator=generator)].reshape(-1, group)
    losses = []
    for exponent in _SPLITS:
        tried = replace(codec, exponent=exponent, group=group)
        side = tried.prepare(values)
        codes, _ = tried.round(values, side, torch.arange(group))
        losses.append(float((values - tried.values(Encoded(codes, side), group)).square().sum()))
    return _SPLITS[losses.index(min(losses))]


def _suited(weight: Tensor, codec: Codec) -> Codec:
    """The same floats with the split for the shape that a layer's weights have."""
    assert isinstance(codec, SmallFloat)
    try:
        shape = generalized_gaussian.fit(weight).shape
    except BadInput:  # nothing but zeros, which all floats hold
        return codec
    return replace(codec, exponent=split_for(round(shape * 10), codec))


def _reshaped(weight: Tensor, gram: Gram, codec: Codec) -> Prepared:
    """Sorted magnitudes moved towards those of a heavier-tailed prior, as far as the loss allows; signs stay.

    The loss is that of the layer's output, against what an even step at the codec's rate will cost. The Gram matrix
    goes no further, so that weights are then rounded as the baseline's are.
    """
    assert isinstance(codec, Coded)
    try:
        prior = generalized_gaussian.fit(weight)
    except BadInput:
        return Prepared(weight, None, lambda values: values)
    target = generalized_gaussian.of_deviation(max(prior.shape * _NARROWER, 0.2), prior.deviation)
    count = weight.numel()
    rank = torch.empty(count, dtype=torch.int64)
    rank[weight.abs().flatten().argsort(stable=True)] = torch.arange(count)
    wanted = target.magnitudes((torch.arange(count) + 0.5) / count).float()[rank].reshape(weight.shape)
    change = wanted * weight.sign() - weight
    loss = float(((change @ gram.matrix) * change).double().sum())
    step = float(weight.double().square().mean().sqrt()) * 2.0 ** (2.05 - codec.milli / 1000)
    allowed = _LEEWAY * step**2 / 12 * len(weight) * float(gram.matrix.diagonal().double().sum())
    share = min(math.sqrt(allowed / loss), 1.0) if loss > 0 else 1.0
    return Prepared(weight + share * change, None, lambda values: values)


recipe(
    name="coded-rtn",
    paper=Paper("Integers rounded to nearest and entropy coded"),
    summary="One even grid for a layer, codes chosen by error and length, a range coder with frequencies by rows.",
    codec=coded,
    solver=Nearest,
    calibrated=False,
    differs="Not a paper's; EntQuant (2601.22787) codes 8-bit floats in such a way.",
    claims=(Claim("Entropy coding beats fixed lengths at equal bytes.", "rtn", (2, 3, 4), 0.9),),
)

recipe(
    name="coded-gptq",
    paper=Paper("Integers with error feedback, entropy coded"),
    summary="Codes as in coded-rtn, each column's error pushed onto the columns still to come.",
    codec=coded,
    solver=ErrorFeedback,
    differs="Not a paper's; WaterSIC (2603.04956) has steps for columns too.",
    claims=(
        Claim("Error feedback helps entropy-coded integers as it does others.", "coded-rtn", (2, 3, 4), 0.9),
        Claim("Entropy coding beats fixed lengths with error feedback.", "gptq", (2, 3, 4), 0.8),
    ),
)

recipe(
    name="deepshape",
    paper=_PRIOR,
    summary="Weights moved towards a heavier-tailed prior before they are rounded and entropy coded.",
    codec=coded,
    solver=Nearest,
    prepare=_reshaped,
    differs=(
        "The change is bounded by the layer's output error, a tenth of what rounding costs; the paper bounds the "
        "model's loss. Bytes are equal, and the divergence is compared; here codes are also chosen by their length. "
        "The target is a generalized Gaussian of 0.8 times the layer's own exponent."
    ),
    claims=tuple(
        Claim("Shaped weights take 5 % fewer bytes for the same divergence.", "coded-rtn", (bits,), ratio)
        for bits, ratio in _FEWER_BYTES.items()
    ),
)

recipe(
    name="e5m2",
    paper=Paper("FP8 Formats for Deep Learning (E5M2, with scales for groups)", "2209.05433"),
    summary="8-bit floats with five bits of exponent, rounded to nearest.",
    codec=lambda bits, shape: floats(5, bits, shape),
    solver=Nearest,
    calibrated=False,
    differs="A float16 scale for each group; a plain cast has none, which costs it nothing but underflow.",
)

recipe(
    name="e4m3",
    paper=Paper("FP8 Formats for Deep Learning (E4M3, with scales for groups)", "2209.05433"),
    summary="8-bit floats with four bits of exponent, rounded to nearest.",
    codec=lambda bits, shape: floats(4, bits, shape),
    solver=Nearest,
    calibrated=False,
    differs="A float16 scale for each group, as in e5m2.",
)

recipe(
    name="rf8",
    paper=_PRIOR,
    summary="8-bit floats split into exponent and mantissa as suits the shape of a layer's weights.",
    codec=lambda bits, shape: floats(4, bits, shape),
    solver=Nearest,
    calibrated=False,
    refine=_suited,
    differs="The split is the best of four for the fitted generalized Gaussian; nothing is trained with the prior.",
    claims=(
        Claim("The fitted split is nearer to the original than E5M2.", "e5m2", (8,)),
        Claim("It is nearer than one split for all layers.", "e4m3", (8,)),
    ),
)

recipe(
    name="per-tensor",
    paper=Paper("One scale a matrix"),
    summary="Integers with a single float16 scale for a whole layer, rounded to nearest.",
    codec=lambda bits, shape: fullest([f"block{integer(bits)}:layer:fp16"], bits, shape),
    solver=Nearest,
    calibrated=False,
    differs="The scale is searched for least squared error; usually it is that of the largest weight.",
)

recipe(
    name="bct",
    paper=Paper("Blockwise Compression of Transformer-based Models without Retraining", "2304.01483", "S102"),
    summary="Two-dimensional blocks of integers, each with a power of two for a scale, rounded to nearest.",
    codec=blocks,
    solver=Nearest,
    calibrated=False,
    differs="Weights alone are coded; the paper also codes activations, embeddings and tables of functions.",
    claims=(Claim("Blocks with shifts of their own beat one scale a matrix at equal bits.", "per-tensor", (4, 8)),),
)
