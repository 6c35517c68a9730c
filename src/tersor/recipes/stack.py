"""Stacks of one-bit planes with low-rank magnitudes: BitStack, with and without scaling by the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tersor.codecs import BitStack
from tersor.codecs.sign_magnitude import MOST_STAGES
from tersor.contracts import Shape
from tersor.recipes.fit import largest, least_loss
from tersor.recipes.recipe import Claim, NothingFits, Paper
from tersor.recipes.registry import recipe
from tersor.solvers import CoordinateDescent, Nearest

_PAPER = Paper(
    "BitStack: Fine-Grained Size Control for Compressed Large Language Models in Variable Memory Environments",
    "2410.23918",
    "S097",
)
_RANK, _WIDTH = 16, 4096
"""The paper's rank, and the width of the layers it is for."""


def _stack(bits: float, shape: Shape, *, scaled: bool = True) -> str:
    """Stages first, then rank: a stage takes half to two thirds of the error away, a rank one or two percent.

    Scales are left out where they would cost a stage.
    """
    for stages in range(MOST_STAGES, 0, -1):
        for plain in (False, True) if scaled else (True,):
            found = largest(lambda rank, n=stages, p=plain: str(BitStack(n, rank, p)), min(shape), bits, shape)  # type: ignore[misc]
            if found is not None:
                return found
    raise NothingFits(
        f"One stage of rank 1 takes more than {bits:.3f} bits each in a layer of {shape[0]} x {shape[1]}."
    )


def _sorted(
    bits: float, shapes: Mapping[str, Shape], loss: Callable[[str, str], float], *, plain: bool = False
) -> dict[str, str]:
    """Stages for each layer: of the stacks' blocks, in order, those that take most from the loss for their bytes."""
    stacks = {}
    for name, shape in shapes.items():
        rank = max(round(_RANK * min(shape) / _WIDTH), 1)
        stacks[name] = [str(BitStack(stages, rank, plain)) for stages in range(1, min(int(bits) + 3, MOST_STAGES) + 1)]
    return least_loss(stacks, bits, shapes, loss)


def _sorted_plain(bits: float, shapes: Mapping[str, Shape], loss: Callable[[str, str], float]) -> dict[str, str]:
    return _sorted(bits, shapes, loss, plain=True)


recipe(
    name="bitstack",
    paper=_PAPER,
    summary="Signs and a low-rank approximation of the magnitudes of what is left over; layers sort their stages.",
    codec=_stack,
    solver=Nearest,
    plan=_sorted,
    differs=(
        "What a stage does for the loss is expected from gradients at the layer's outputs; the paper measures the "
        "perplexity with each stack cut. The rank is 16 for 4,096 channels as there, so 2 in layers of 576."
    ),
    claims=(
        Claim("At about 2 bits it is no worse than GPTQ at equal bytes.", "gptq", (2,), 1.0),
        Claim("Scaling by the inputs' norms lowers the divergence.", "bitstack-plain", (2, 3)),
        Claim("Sorting the stages of all layers lowers the divergence.", "bitstack-even", (2, 3)),
    ),
)

recipe(
    name="bitstack-even",
    paper=_PAPER,
    summary="BitStack with the same bits for all layers: what sorting is worth.",
    codec=_stack,
    solver=Nearest,
    differs=(
        "The paper's ablation: each layer has as many stages as its bits hold, and the rank is what is left (1 to 3 "
        "here at 2 bits). Scales are left out of layers where they would cost a stage."
    ),
)

recipe(
    name="bitstack-plain",
    paper=_PAPER,
    summary="BitStack without scaling by the inputs: what that is worth.",
    codec=lambda bits, shape: _stack(bits, shape, scaled=False),
    solver=Nearest,
    plan=_sorted_plain,
    differs="The paper's ablation; as bitstack otherwise.",
)

recipe(
    name="bitstack-feedback",
    paper=_PAPER,
    summary="BitStack with signs chosen one column after the other, each error pushed onto the columns still to come.",
    codec=_stack,
    solver=CoordinateDescent,
    plan=_sorted,
    plan_solver=Nearest,
    differs=(
        "Not the paper's, whose signs are those of what is left over: within each stage, error feedback and sweeps "
        "under the Gram matrix, and left factors by least squares. A stack can be cut as before."
    ),
    claims=(
        Claim("Error feedback within the stages beats the signs of what is left over.", "bitstack", (2, 3)),
        Claim("With it a stack at about 2 bits is no worse than GPTQ at equal bytes.", "gptq", (2,)),
    ),
)
