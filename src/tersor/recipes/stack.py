"""Stacks of one-bit planes with low-rank magnitudes: BitStack, with and without scaling by the inputs."""

from __future__ import annotations

from tersor.codecs import BitStack
from tersor.contracts import Shape
from tersor.recipes.fit import largest
from tersor.recipes.recipe import Claim, NothingFits, Paper
from tersor.recipes.registry import recipe
from tersor.solvers import CoordinateDescent, Nearest

_PAPER = Paper(
    "BitStack: Fine-Grained Size Control for Compressed Large Language Models in Variable Memory Environments",
    "2410.23918",
    "S097",
)
_MOST = 8


def _stack(bits: float, shape: Shape, *, scaled: bool) -> str:
    """Stages first, then rank: a stage takes half to two thirds of the error away, a rank one or two percent.

    Scales are left out where they would cost a stage.
    """
    for stages in range(_MOST, 0, -1):
        for plain in (False, True) if scaled else (True,):
            found = largest(lambda rank, n=stages, p=plain: str(BitStack(n, rank, p)), min(shape), bits, shape)  # type: ignore[misc]
            if found is not None:
                return found
    raise NothingFits(
        f"One stage of rank 1 takes more than {bits:.3f} bits each in a layer of {shape[0]} x {shape[1]}."
    )


recipe(
    name="bitstack",
    paper=_PAPER,
    summary="Signs and a low-rank approximation of the magnitudes of what is left over, stage after stage.",
    codec=lambda bits, shape: _stack(bits, shape, scaled=True),
    solver=Nearest,
    differs=(
        "All layers get the same bits, and as many stages as these hold; the paper sorts the blocks of all layers by "
        "what each does for perplexity. The rank is what is left (1 to 3 here at 2 bits, 16 in the paper's layers, "
        "seven times as wide). Scales are stored with each layer, and left out of layers where they would cost a stage."
    ),
    claims=(
        Claim("At about 2 bits it is no worse than GPTQ at equal bytes.", "gptq", (2,), 1.0),
        Claim("Scaling by the inputs' norms lowers the divergence.", "bitstack-plain", (2, 3)),
    ),
)

recipe(
    name="bitstack-plain",
    paper=_PAPER,
    summary="BitStack without scaling by the inputs: what that is worth.",
    codec=lambda bits, shape: _stack(bits, shape, scaled=False),
    solver=Nearest,
    calibrated=False,
    differs="The paper's ablation; as bitstack otherwise.",
)

recipe(
    name="bitstack-feedback",
    paper=_PAPER,
    summary="BitStack with signs chosen one column after the other, each error pushed onto the columns still to come.",
    codec=lambda bits, shape: _stack(bits, shape, scaled=True),
    solver=CoordinateDescent,
    differs=(
        "Not the paper's, whose signs are those of what is left over: within each stage, error feedback and sweeps "
        "under the Gram matrix, and left factors by least squares. A stack can be cut as before."
    ),
    claims=(
        Claim("Error feedback within the stages beats the signs of what is left over.", "bitstack", (2, 3)),
        Claim("With it a stack at about 2 bits is no worse than GPTQ at equal bytes.", "gptq", (2,)),
    ),
)
