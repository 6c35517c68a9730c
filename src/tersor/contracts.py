"""The nouns of tersor, and the records that its parts exchange. No algorithm lives here.

Conventions, everywhere alike:

* A weight is ``(out, in)``: ``y = x @ weight.T``. Layouts that differ (GPT-2's Conv1D) are turned on the way in.
* The Gram matrix is ``H = mean over tokens of x xᵀ``, ``(in, in)``, float32, no factor 2.
* The distortion of a layer is ``D = Σ_r g_r · e_r H e_rᵀ``: ``e_r`` row ``r`` of ``W − Ŵ``, ``g`` row weights, or 1.
* Rates are exact: ``codec.bits(shape)`` is eight times the bytes that the layer's tensors take in the file.
* Tiles of rows are independent given ``H`` and what the codec learned from the layer as a whole. A tile is one row,
  unless a codec codes several together (:meth:`Codec.tile`). Side information of a leaf codec therefore has rows
  first, and a solver may be run on any whole tiles; the result does not depend on which others are present.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from tersor.errors import ShapeMismatch

Shape = tuple[int, int]
Side = Mapping[str, Tensor]
"""Side information of a leaf: named tensors, rows first, float32, already on the grid of what will be stored."""
Rounding = Callable[[Tensor], Tensor]
"""Inputs ``(..., in)`` of a layer to what an engine multiplies by its weight."""


@dataclass(frozen=True)
class Part:
    """One stored tensor of an encoded layer; in the file it is called ``<layer>.<name>``.

    ``shared``: it belongs to the layer as a whole (a codebook, a basis). All other parts have one entry of their first
    axis for each row, or for each tile of rows.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    shared: bool = False

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size


class Codec(ABC):
    """How a weight is represented: an immutable description that holds no weights.

    Its text form ``str(codec)`` parses back to an equal object with :func:`tersor.codecs.parse`.
    """

    @abstractmethod
    def parts(self, shape: Shape) -> tuple[Part, ...]:
        """The stored tensors for a weight ``(out, in)``. Rows come first in every part that is not shared.

        Raises :class:`~tersor.errors.ShapeMismatch` when the shape cannot be taken.
        """

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """Stored tensors back to a float32 weight ``(out, in)``."""

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        """Some rows ``(n, in)`` of a whole layer ``shape``'s stored tensors. ``rows``: a slice, or numbers ``(n,)``.

        Where a tile is one row, that is decoding the same rows of every part that is not shared. Codecs with larger
        tiles, or parts that have no rows, say how they do it.
        """
        shared = {part.name for part in self.parts(shape) if part.shared}
        tile = {name: tensor if name in shared else tensor[rows] for name, tensor in tensors.items()}
        count = next(len(tensor) for name, tensor in tile.items() if name not in shared)
        return self.decode(tile, (count, shape[1]))

    def tile(self, rows: int) -> int:
        """How many rows of a layer of ``rows`` are coded together; the last tile may be shorter."""
        return 1

    @property
    def sampled(self) -> bool:
        """Whether some rows show what a layer would lose; not so where shared parts would fit a few rows far better."""
        return True

    def stretches(self, rows: int) -> tuple[Stretch, ...]:
        """Stretches of rows that are encoded each by itself: one, unless the codec is made of several."""
        return (Stretch(0, rows, self, ""),)

    def bits(self, shape: Shape) -> int:
        """Exact size in bits of what is stored for a weight ``(out, in)``, side information included."""
        return 8 * sum(part.nbytes for part in self.parts(shape))

    def accepts(self, shape: Shape) -> bool:
        """Whether :meth:`parts` would succeed."""
        try:
            self.parts(shape)
        except ShapeMismatch:
            return False
        return True


@dataclass(frozen=True)
class Stretch:
    """Rows ``start`` to ``stop`` of a layer, in ``codec``; the names of their parts begin with ``prefix``."""

    start: int
    stop: int
    codec: Codec
    prefix: str


@dataclass(frozen=True)
class Encoded:
    """What a solver returns: integer codes and the side information to read them with.

    ``codes``: ``(out, in / span)`` int32 (see :attr:`LeafCodec.code_dtype`), one per span of input columns.
    """

    codes: Tensor
    side: Side


@dataclass(frozen=True)
class ScalarGrid:
    """The values one scalar column can take, for codecs whose rounding is 'nearest value of a sorted list'.

    Uniform, ``value = (code - zero[r, g]) * scale[r, g] - offset[r, g]``, or ``table[r or 0, code] * scale[r, g]``;
    ``g = column // group``. Solvers hand this to a compiled loop; codecs that cannot be put so are asked through
    :meth:`LeafCodec.round` instead. Codes are positions in the list, ``0 .. levels - 1``; no scale is 0, few are below.

    ``scale``, ``zero``, ``offset``: ``(rows, groups)`` float32. ``table``: ``(rows or 1, levels)``, or one a group.
    """

    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    levels: int
    group: int
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.zero is None) == (self.table is None) or (self.zero is None and self.offset is not None):
            raise ValueError("a scalar grid has zeros (uniform), perhaps with offsets, or a table, and not both")


class LeafCodec(Codec):
    """A codec with codes and side information, which any solver can drive.

    A solver needs: :meth:`prepare` (side information before rounding), :meth:`round` (nearest representable values
    of some columns), optionally :meth:`refit` (best side information for fixed codes) and :meth:`values`.
    """

    span: ClassVar[int] = 1
    """Input columns that are rounded together: 1 for scalars and for trellises down a column, 8 for E8."""

    costly: ClassVar[bool] = False
    """Whether rounding is a long search, so that solvers should not round a second time for little."""

    code_dtype: ClassVar[torch.dtype] = torch.int32
    """Of the codes that :meth:`round` returns: int64 where those of a span do not fit 31 bits."""

    def learn(self, weight: Tensor, gram: Gram | None) -> LeafCodec:
        """This codec with everything that depends on a layer as a whole: a codebook, the size of its tiles.

        ``weight (out, in)`` of any float dtype. What solvers drive is the result; it packs the shared parts too, and
        may be run on any whole tiles. Default: nothing to learn.
        """
        return self

    def segment(self, in_features: int) -> int:
        """Columns whose side information depends on no other columns: the group size, or ``in_features``.

        Error feedback prepares each segment anew when it arrives there, from the weights as earlier errors have
        moved them; a codec whose side information spans the whole row is prepared once.
        """
        return in_features

    @abstractmethod
    def prepare(self, weight: Tensor, importance: Tensor | None = None) -> Side:
        """Choose the side information for ``weight (rows, in)`` before any rounding.

        ``importance (in,)``: relative cost of an error in each column. Pure; never changes its arguments.
        """

    def prepare_segment(self, side: Side, weight: Tensor, start: int, importance: Tensor | None = None) -> Side:
        """Side information, the segment at ``start`` chosen anew for ``weight (rows, segment)``; default: the same."""
        return side

    @abstractmethod
    def round(self, target: Tensor, side: Side, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest representable values for ``target (rows, len(columns))``.

        ``columns``: int64 column numbers in the layer, in whole spans. Returns codes ``(rows, len(columns) / span)``
        int32 and values like ``target``. Values already representable are returned unchanged. Pure.
        """

    def round_span(self, target: Tensor, side: Side, columns: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`round` for one span, by least ``|(t − v) root|``, ``root (span, span)``; default: :meth:`round`."""
        return self.round(target, side, columns)

    def round_all(
        self, target: Tensor, side: Side, columns: Tensor, reference: Tensor, mixing: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """What :func:`tersor.solvers.sequential.sequential_round` does, by a compiled loop of its own; None without."""
        return None

    @abstractmethod
    def values(self, encoded: Encoded, in_features: int) -> Tensor:
        """The float32 weight ``(rows, in)`` that these codes and side information stand for."""

    def refit(self, weight: Tensor, encoded: Encoded, gram: Tensor) -> Side:
        """Side information that lowers ``tr(E H Eᵀ)`` for fixed codes; default: unchanged."""
        return encoded.side

    def grid(self, side: Side, in_features: int) -> ScalarGrid | None:
        """The scalar grid, when rounding is nearest-of-a-sorted-list; None otherwise."""
        return None

    @abstractmethod
    def pack(self, encoded: Encoded, shape: Shape) -> dict[str, Tensor]:
        """Codes and side information to the stored tensors that :meth:`parts` declares."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], shape: Shape) -> Encoded:
        """The inverse of :meth:`pack`."""

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return self.values(self.unpack(tensors, shape), shape[1])


@dataclass(frozen=True)
class Gram:
    """Second moment of a layer's inputs: ``matrix (in, in)`` float32, mean over ``tokens`` tokens of ``x xᵀ``.

    ``damped``: a codec damped it as wanted. ``reach``: greatest magnitude of inputs. ``noise``: by codec, mean square
    ``(in,)`` of what an engine rounds off. ``gradients (out, in)``: mean square of the loss's, by single weight."""

    matrix: Tensor
    tokens: int
    damped: bool = False
    reach: float | None = None
    noise: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Tensor | None = None


class Solver(ABC):
    """How codes are chosen. A solver sees a codec only through :class:`LeafCodec`'s operations."""

    needs_gram: ClassVar[bool] = True

    def prepare(self, gram: Gram | None, span: int = 1) -> Any:
        """What depends on the Gram matrix alone; computed once and shared by all layers with the same input.

        ``span``: that of the codecs it will be used with.
        """
        return gram

    @abstractmethod
    def solve(self, weight: Tensor, codec: LeafCodec, prepared: Any) -> Encoded:
        """Codes for ``weight (rows, in)`` float32. ``prepared`` is what :meth:`prepare` gave. Pure."""


class DirectCodec(Codec):
    """A codec that no rounding solver drives: it chooses its own representation (kept floats, low-rank factors)."""

    @abstractmethod
    def encode(self, weight: Tensor, gram: Gram | None = None) -> dict[str, Tensor]:
        """Stored tensors for ``weight (out, in)`` float32. Pure."""


class Encode(Protocol):
    """How a codec made of others has its parts encoded, without knowing the solver."""

    def __call__(self, weight: Tensor, codec: Codec, gram: Gram | None) -> tuple[dict[str, Tensor], Tensor]:
        """Stored tensors for ``weight (out, in)`` float32, and the values that they decode to."""

    def transformed(self, gram: Gram, key: str, make: Callable[[], Gram]) -> Gram:
        """What ``make`` gives for ``gram``, made once for all layers with this Gram matrix; ``key`` says what it is."""


class CompositeCodec(Codec):
    """A codec made of others: a sum, a split, a change of basis. Names of inner parts get a prefix ending in ``_``."""

    @property
    def by_rows(self) -> bool:
        """Whether any whole tiles can be encoded by themselves, after :meth:`learn`; else only a layer as a whole."""
        return False

    def learn(self, weight: Tensor, gram: Gram | None) -> CompositeCodec:
        """As :meth:`LeafCodec.learn`, for codecs that go by rows."""
        return self

    @abstractmethod
    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        """Stored tensors for ``weight (out, in)`` float32, and their values; ``encode`` does so for its parts. Pure."""


LayerKind = Literal["linear", "conv1d", "embedding", "experts"]


@dataclass(frozen=True)
class Layer:
    """A weight matrix that may be encoded.

    ``name``: module path, and the prefix of its tensors in the artifact. ``parameter``: full name of the parameter in
    the instantiated model. ``shape``: ``(out, in)`` of one copy, always in ``y = x Wᵀ`` orientation. ``copies``: number
    of stacked matrices (experts in one parameter), else 1. ``transposed``: the parameter is stored ``(in, out)``.
    ``block``: index of the block it lives in, None outside. ``inputs``: key shared by all layers that read the very
    same input (q/k/v; gate/up), hence share a Gram matrix. ``fused``: key of the group that engines fuse into one
    matrix product, or None. ``tied``: other parameters that are this same tensor (a tied head). ``writes``: whether its
    outputs are added to the residual stream; None where that was not looked for, or not seen.
    """

    name: str
    parameter: str
    kind: LayerKind
    shape: Shape
    block: int | None
    inputs: str
    copies: int = 1
    transposed: bool = False
    fused: str | None = None
    tied: tuple[str, ...] = ()
    writes: bool | None = None

    @property
    def stored_shape(self) -> Shape:
        """``(copies * out, in)``: the shape codecs see when the copies are stacked."""
        return (self.copies * self.shape[0], self.shape[1])

    @property
    def parameters(self) -> int:
        return self.copies * self.shape[0] * self.shape[1]


Fate = Literal["encoded", "kept", "tied", "dropped"]


@dataclass(frozen=True)
class TensorFate:
    """What becomes of one tensor of the source, so that each is accounted for.

    ``name``: as in the source file. ``target``: parameter in the instantiated model, which several may make, or None.
    ``reason``: one phrase, mandatory for everything but plain encoding.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    fate: Fate
    target: str | None
    reason: str


@dataclass(frozen=True)
class Anatomy:
    """What a model is made of, found from its structure and weight files.

    ``blocks``: module paths of the ordered blocks. ``layers``: all encodable layers in the order of computation,
    blocks first to last; embedding and head included. ``kept``: parameters (and persistent buffers) that stay as they
    are, ``name -> (dtype, shape)`` as they will be stored. ``embedding`` / ``head``: layer names, the same when tied.
    ``notes``: what a user should know (unknown parts kept, and so on).
    """

    model_type: str
    blocks: tuple[str, ...]
    layers: tuple[Layer, ...]
    kept: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    tensors: tuple[TensorFate, ...]
    embedding: str | None
    head: str | None
    source_bytes: int
    notes: tuple[str, ...] = ()

    def layers_of(self, block: int | None) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.block == block)

    @property
    def parameters(self) -> int:
        """Number of weights that will be stored, kept tensors included, tied ones once."""
        kept = sum(torch.Size(shape).numel() for _, shape in self.kept.values())
        return kept + sum(layer.parameters for layer in self.layers)


@dataclass(frozen=True)
class RatePoint:
    """One choice for one layer: ``nbytes`` in the file, header entries included; the codec's text.

    ``distortion``: expected increase of the objective (nats of KL per token, when sensitivities are measured).
    """

    nbytes: int
    distortion: float
    choice: str


@dataclass(frozen=True)
class Choice:
    """A plan's line for one layer."""

    codec: str
    nbytes: int
    distortion: float


@dataclass(frozen=True)
class Plan:
    """Which codec each layer gets; kept as JSON that a person can read and edit. ``predicted``: sum of distortions.

    ``file_bytes``: exactly, of all weight files. ``budget``: bytes asked for."""

    layers: Mapping[str, Choice]
    budget: int
    file_bytes: int
    predicted: float
    options: Mapping[str, Any] = field(default_factory=dict)


class Allocator(ABC):
    """Curves and a budget to a choice: a pure function."""

    @abstractmethod
    def allocate(self, curves: Mapping[str, Sequence[RatePoint]], budget: int) -> dict[str, RatePoint]:
        """One point per key with total bytes <= ``budget``, least total distortion.

        A key may stand for several layers that share a choice. Raises Infeasible, naming the least possible budget.
        """


@dataclass(frozen=True)
class Quality:
    """What was measured of a compressed model against its reference, per token, natural logarithms.

    ``kl``: mean KL(reference ‖ compressed); ``kl_error``: its standard error, from sequence means. ``top1``: share of
    tokens whose most likely next token agrees. ``tokens``, ``text``: how many and which, of the perplexities too.
    """

    kl: float
    kl_error: float
    perplexity: float
    reference_perplexity: float
    top1: float
    tokens: int
    text: str
