"""What a recipe is: a paper's method as a choice of parts, and what the paper says it is good for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from tersor.codecs import parse
from tersor.contracts import Codec, Gram, Shape, Solver
from tersor.errors import BadInput, TersorError
from tersor.recovery import BlockTuning


class NothingFits(TersorError):
    """A recipe's family of codecs has no member that takes a layer within so many bits."""


@dataclass(frozen=True)
class Paper:
    """Where a method comes from. ``arxiv``: its number, or empty. ``seed``: its key in the project's list, or empty."""

    title: str
    arxiv: str = ""
    seed: str = ""


@dataclass(frozen=True)
class Claim:
    """What a paper says, as something that can turn out false.

    At each of ``bits``, the recipe's ``metric`` is below ``ratio`` times that of the recipe ``baseline``, at equal
    bytes. ``kl``: divergence of the whole model; ``output``: mean relative error of the layers' outputs.
    ``extra``: bits per weight that the recipe may take beyond its baseline's, for papers that add something to it.
    """

    sentence: str
    baseline: str
    bits: tuple[float, ...]
    ratio: float = 1.0
    metric: Literal["kl", "output", "perplexity"] = "kl"
    extra: float = 0.0

    def __post_init__(self) -> None:
        if self.ratio <= 0 or self.extra < 0 or not self.bits:
            raise BadInput(
                f"The claim {self.sentence!r} needs a ratio above 0, at least one number of bits, and no less than 0 "
                f"extra ones."
            )

    @property
    def against(self) -> str:
        """The baseline, and what is compared with it where that is not the divergence at equal bytes."""
        what = {"kl": "", "output": ", output error", "perplexity": ", perplexity"}[self.metric]
        return self.baseline + what + (f", {self.extra:g} bits fewer" if self.extra else "")


@dataclass(frozen=True)
class Prepared:
    """A layer as it is to be encoded: ``weight (out, in)`` and its Gram matrix; ``restore`` undoes it on the values."""

    weight: Tensor
    gram: Gram | None
    restore: Callable[[Tensor], Tensor]


def _no_side(_shape: Shape) -> int:
    return 0


@dataclass(frozen=True)
class Recipe:
    """A method that a survey can run.

    ``codec(bits, shape)``: the text of a codec that takes at most ``bits`` per weight of a layer ``(out, in)``,
    everything counted, as close to it as the family allows; raises :class:`NothingFits`. ``solver``: makes the solver.
    ``calibrated``: whether it may see the Gram matrix. ``refine(weight, codec)``: for weights whose codec depends on
    their values, one that takes no more bits. ``prepare(weight, gram, codec)``: changes a layer before coding;
    ``side(shape)``: the bits that undoing it takes in the file. ``plan(bits, shapes, loss)``: a codec's text for each
    layer by name, for methods that share ``bits`` per weight out among layers; ``loss(name, text)`` is the divergence,
    in nats a token, that a codec in one layer is expected to cost the model, ``shapes`` has copies stacked.
    ``plan_solver``: makes a solver that stands in for the recipe's own, which may be slow, for these.
    ``plan_loss(weight, codec)``: what counts as the loss instead, for methods that look at the weights alone.
    ``tune``: what is done to each block once its layers are encoded. ``gradients``: whether Gram matrices come with
    the loss's gradient by each weight. ``guided``: whether in its Gram matrices each token counts by the loss's
    gradient at what reads the input. ``needs``: codec texts without which the recipe does not exist. ``differs``: how
    this is not what the paper did.
    """

    name: str
    paper: Paper
    summary: str
    codec: Callable[[float, Shape], str]
    solver: Callable[[], Solver]
    differs: str
    claims: tuple[Claim, ...] = ()
    calibrated: bool = True
    refine: Callable[[Tensor, Codec], Codec] | None = None
    prepare: Callable[[Tensor, Gram, Codec], Prepared] | None = None
    side: Callable[[Shape], int] = _no_side
    plan: Callable[[float, Mapping[str, Shape], Callable[[str, str], float]], Mapping[str, str]] | None = None
    plan_solver: Callable[[], Solver] | None = None
    plan_loss: Callable[[Tensor, Codec], float] | None = None
    tune: BlockTuning | None = None
    gradients: bool = False
    guided: bool = False
    needs: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.name or not all(letter.isalnum() or letter in "-." for letter in self.name):
            raise BadInput(f"A recipe cannot be called {self.name!r}; use letters, digits, - and '.'.")
        if self.name == "index":
            raise BadInput("A recipe cannot be called 'index': that is the page that lists all; choose another name.")
        if self.prepare is not None and not self.calibrated:
            raise BadInput(f"Recipe {self.name} prepares weights with a Gram matrix, so it must be calibrated.")
        if (self.gradients or self.guided) and not self.calibrated:
            raise BadInput(f"Recipe {self.name} sees gradients, so it must be calibrated.")
        if self.prepare is not None and self.tune is not None:
            raise BadInput(f"Recipe {self.name} prepares weights and tunes blocks; tuning knows no prepared weights.")

    def codec_for(self, bits: float, shape: Shape) -> Codec:
        """The codec for a layer of ``shape`` and at most ``bits`` per weight, what ``prepare`` costs included.

        Raises :class:`NothingFits`, also for a codec that the recipe gave and that is too large.
        """
        weights = shape[0] * shape[1]
        left = bits - self.side(shape) / weights
        codec = parse(self.codec(left, shape))
        limit = math.floor(bits * weights + 1e-6)
        if self.bits(codec, shape) > limit:
            raise NothingFits(
                f"Recipe {self.name} chose {codec} for a layer of {shape[0]} x {shape[1]}: {self.bits(codec, shape):,} "
                f"bits, more than the {limit:,} it was given."
            )
        return codec

    def codecs_told(self) -> str:
        """What the layers' codecs may be other than :meth:`codec_for` says, in words; empty where they are those."""
        if self.plan is not None:
            return "before the plan shares the bits out among layers"
        return "before each layer's own is chosen" if self.refine is not None else ""

    def bits(self, codec: Codec, shape: Shape) -> int:
        """All bits that a layer takes in the file."""
        return codec.bits(shape) + self.side(shape)
