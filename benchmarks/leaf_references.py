"""The leaves that ``leaves.py`` measures, and what theory, papers or earlier measurements say of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import gaussian
import numpy as np
from scipy.spatial import cKDTree

from tersor.codecs import (
    BinaryPlanes,
    BitStack,
    Block,
    Codebook,
    Coded,
    EntropyCodedTrellis,
    Integer,
    LookupTable,
    MicroFloat,
    Pyramid,
    SmallFloat,
    Ternary,
    Trellis,
    parse,
)
from tersor.codecs.grouped import GroupedScalar
from tersor.contracts import Codec

TEXTS = (
    *(f"int{bits}:row" for bits in (1, 2, 3, 4)),
    *(f"int{bits}:g64:s8" for bits in (1, 2, 3, 4, 5, 6, 8)),
    *(f"int{bits}:row:asym" for bits in (2, 3, 4)),
    *(f"int{bits}:g32:asym:s8" for bits in (2, 3, 4)),
    *(f"lut{bits}:row" for bits in (2, 3, 4)),
    "fp4:e2m1:row",
    "fp4:e1m2:row",
    "fp4:e2m1:g32:s8",
    "fp6:e2m3:row",
    "fp6:e3m2:g64:s8",
    "fp8:e4m3:row",
    "fp8:e5m2:row",
    "mxfp4:e2m1:g32",
    "mxfp6:e2m3:g32",
    *(f"block{bits}:8x16" for bits in (2, 3, 4)),
    "block8:layer:fp16",
    "bin:row",
    "bin:g64",
    *(f"bin{planes}:row" for planes in (2, 3, 4)),
    "bin2:g64",
    "fdb:row",
    "fdb:g64",
    "ternary:row",
    "ternary:g64",
    *(f"bitstack{stages}:k1" for stages in (1, 2, 3)),
    "vq8x8",
    "vq8x4",
    "vq12x6",
    "vq12x4",
    "vq8x4:r2",
    "e8p:row",
    "pvq1:n48",
    *(f"pvq{bits}:n16" for bits in (1, 2, 3)),
    "pvq2:n24",
    "pvq4:n12",
    *("q2_k", "q3_k", "q4_0", "q4_k", "iq4_nl", "iq2_xxs", "iq2_s", "iq3_xxs", "iq3_s"),
    *(f"trellis{bits}:L{window}" for bits in (1, 2, 3, 4) for window in (8, 10, 12, 14)),
    "coded(int8:row:asym):1",
    *(f"coded(int8:row):{rate}" for rate in (2, 3, 4)),
    *(f"ectcq{rate}:t1" for rate in (1, 2, 3, 4)),
    *(f"ectcq{rate}:t8" for rate in (0.75, 1, 1.5, 2, 2.5, 3, 4)),
    *(f"ectcq{rate}:t64" for rate in (0.75, 1, 1.5, 2, 2.5, 3, 4)),
    "ectcq2:t256",
)

TRELLIS_CEILINGS = {1: 0.267, 2: 0.0690, 3: 0.0182, 4: 0.0052}
"""For a window of 12 bits: what this project has set itself."""
TRELLIS_MEASURED = {(2, 8): 0.0746, (2, 10): 0.0703, (2, 14): 0.0669, (3, 14): 0.0175, (4, 14): 0.0046}
"""Linear windows and small tables: with 8 bits in rings of 256 weights, with 10 and 14 in sequences of 2048."""
GGUF_MEASURED = {"q4_0": 0.00755, "q4_k": 0.00573, "q2_k": 0.0769}


@dataclass(frozen=True)
class Reference:
    """``mse``, or the ``gap`` in bits to Shannon's bound at the rate that is stored. ``ceiling``: no tolerance."""

    source: str
    mse: float = 0.0
    gap: float | None = None
    ceiling: bool = False


def reference(text: str) -> Reference | None:
    """What is known of a leaf."""
    codec = parse(text)
    found = (find(codec, text) for find in _FINDERS)
    return next(filter(None, found), None)


def _of_even_levels(codec: Codec, _: str) -> Reference | None:
    if isinstance(codec, Integer) and codec.asymmetric:
        return Reference("theory: even levels, one is 0", gaussian.even_with_zero(codec.bits_per_code))
    if isinstance(codec, Integer):
        return Reference("theory: even levels", gaussian.even(codec.bits_per_code))
    if isinstance(codec, Block):
        levels = np.arange(2**codec.bits_per_code) - 2.0 ** (codec.bits_per_code - 1)
        return _at_powers(levels) if not codec.float_scale else Reference("theory: its levels", gaussian.scaled(levels))
    return None


def _of_levels(codec: Codec, _: str) -> Reference | None:
    if isinstance(codec, LookupTable) and codec.group is not None:
        return None  # tables fitted to a few weights are nearer to them than Lloyd-Max's
    if isinstance(codec, LookupTable | Ternary):
        levels = 3 if isinstance(codec, Ternary) else 2**codec.bits_per_code
        return Reference("theory: Lloyd-Max", gaussian.lloyd_max(levels))
    if isinstance(codec, MicroFloat):
        return _at_powers(codec.table().double().numpy())
    if isinstance(codec, SmallFloat):
        return Reference("theory: its levels", gaussian.scaled(codec.table().double().numpy()))
    if isinstance(codec, BinaryPlanes):
        mse = gaussian.dual_planes() if codec.dual else gaussian.planes(codec.bits_per_code)
        return Reference("theory: sums of planes", mse)
    return None


def _of_groups(codec: Codec, _: str) -> Reference | None:
    """Levels with one scale for each group."""
    if not isinstance(codec, GroupedScalar) or codec.group is None or isinstance(codec, MicroFloat):
        return None
    if isinstance(codec, SmallFloat):
        levels = codec.table().double().numpy()
    elif isinstance(codec, Ternary):
        levels = np.array([-1.0, 0.0, 1.0])
    elif isinstance(codec, Integer | BinaryPlanes) and codec.bits_per_code == 1:
        levels = np.array([-1.0, 1.0])
    elif isinstance(codec, Integer) and not codec.asymmetric:
        levels = np.arange(2**codec.bits_per_code) - (2**codec.bits_per_code - 1) / 2
    else:
        return None
    mse = gaussian.in_groups(tuple(levels.tolist()), codec.group)
    return Reference("brute force: its levels, a scale a group", mse)


def _at_powers(levels: gaussian.Floats) -> Reference:
    """The best power of two as the scale of all."""
    return Reference("theory: its levels, scale 2^n", min(gaussian.nearest(2.0**n * levels) for n in range(-9, 2)))


def _of_trellis(codec: Codec, _: str) -> Reference | None:
    if not isinstance(codec, Trellis):
        return None
    bits, window = codec.bits_per_code, codec.window
    if window == 12:
        return Reference("ceiling set", TRELLIS_CEILINGS[bits], ceiling=True)
    known = TRELLIS_MEASURED.get((bits, window))
    return Reference("measured before, no scales", known) if known else None


def _of_entropy_coded(codec: Codec, _: str) -> Reference | None:
    if not isinstance(codec, EntropyCodedTrellis | Coded):
        return None
    states = 1 if isinstance(codec, Coded) else codec.states
    if states == 1:
        return Reference("theory: even thresholds, entropy coded", gaussian.entropy_coded(codec.milli / 1000))
    if states == 64 and codec.milli == 2000:
        return Reference("ceiling set", 0.0672, ceiling=True)
    if states == 64:
        return Reference("ceiling set: .06 bits", gap=0.06, ceiling=True)
    # Of the numbers alone, .07 to .08 and .031 to .036 bits.
    return Reference("measured before, no side information", gap=0.08 if states == 8 else 0.036)


def _of_vectors(codec: Codec, text: str) -> Reference | None:
    if isinstance(codec, BitStack):
        return Reference("theory: signs, one magnitude a stage", gaussian.greedy_planes(codec.stages))
    if isinstance(codec, Codebook) and codec.stages == 1 and codec.index_bits >= 2 * codec.dim:
        mse = gaussian.space_filling(codec.index_bits / codec.dim, codec.dim)
        return Reference("theory: high rates (Zador)", mse)
    if isinstance(codec, Codebook) and codec.stages == 1:
        return Reference("k-means, other samples", learned(codec.index_bits, codec.dim))
    if isinstance(codec, Pyramid) and codec.dim == 16:
        return Reference("measured before: .57 to .71 bits", gap=0.71)
    known = {"e8p:row": Reference("QuIP# (arXiv:2402.04396)", 0.089)}
    known |= {name: Reference("measured before: a type like it", mse) for name, mse in GGUF_MEASURED.items()}
    return known.get(text)


_FINDERS = (_of_groups, _of_trellis, _of_even_levels, _of_levels, _of_entropy_coded, _of_vectors)


@lru_cache
def learned(bits: int, dimension: int) -> float:
    """Error of a codebook of few entries by plain k-means, on vectors that it was not learned from."""
    generator = np.random.default_rng(1)
    train, test = (generator.standard_normal((count, dimension)) for count in (1 << 16, 1 << 16))
    points = train[: 2**bits].copy()
    for _ in range(12):
        nearest = cKDTree(points).query(train)[1]
        count = np.bincount(nearest, minlength=len(points))
        for axis in range(dimension):
            total = np.bincount(nearest, train[:, axis], minlength=len(points))
            points[:, axis] = np.where(count > 0, total / np.maximum(count, 1), points[:, axis])
    return float((cKDTree(points).query(test)[0] ** 2).mean()) / dimension
