"""Weights in a basis of their layer's own: the inputs' principal directions, within blocks of neighbouring columns.

The Karhunen-Loève transform, as transform coding has it (Huang and Schultheiss, 1963): inputs become uncorrelated, so
that a codec which rounds each weight by itself, at a step of each column's own, needs up to
``½ log2(Π H_jj / det H) / in`` bits a weight less. Error feedback has that gain already, in every basis, and even steps
lose by it, for they want columns alike, which is what ``rot`` is for. What a basis can do for feedback is to separate
large directions of the weights from small ones: ``:weights`` takes it from the weights' second moment over rows.

A basis takes ``N (N − 1) / 2`` bytes for each ``N`` columns: see :mod:`tersor.kernels.givens`.

>>> from tersor.codecs import parse
>>> codec = parse("klt16(int4:row)")
>>> codec.bits((64, 96)) == parse("int4:row").bits((64, 96)) + 8 * 6 * 120      # 6 blocks, 120 angles each
True
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.codecs.inner import under
from tersor.codecs.rows import RowStretches
from tersor.codecs.text import Words, parse, reads
from tersor.contracts import Codec, CompositeCodec, Encode, Gram, Part, Shape
from tersor.errors import BadInput, ShapeMismatch
from tersor.kernels.givens import count, factored, turn, unturn

_PREFIX = "k_"
_BLOCKS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class PrincipalBasis(CompositeCodec):
    """``inner`` encodes ``W Q``, with the Gram matrix ``Qᵀ H Q``; ``Q`` has a block for every ``block`` columns.

    A block's vectors are the eigenvectors of its diagonal block of the Gram matrix, largest first. Without a Gram
    matrix, or with ``weights``, they are those of the weights' second moment over rows. ``block`` None: one block.
    """

    inner: Codec
    block: int | None = None
    weights: bool = False

    def __post_init__(self) -> None:
        if self.block is not None and self.block not in _BLOCKS:
            sizes = ", ".join(map(str, _BLOCKS))
            raise BadInput(f"Codec {self} does not exist: its blocks have {sizes} columns; klt(...) has one block.")
        if isinstance(self.inner, RowStretches):
            raise BadInput(f"{self} has rows(...) inside; write rows(...) around it.")

    def __str__(self) -> str:
        return f"klt{self.block or ''}({self.inner})" + (":weights" if self.weights else "")

    def size(self, in_features: int) -> int:
        """Columns of a block. Raises ShapeMismatch where blocks do not divide the columns, or one is left."""
        size = self.block or in_features
        if in_features % size or size < 2:
            fits = [f"klt{size}" for size in _BLOCKS if in_features and in_features % size == 0]
            ways = ", ".join([*fits, "klt"] if in_features > 1 else ["the codec inside"])
            raise ShapeMismatch(
                f"Codec {self} cannot take a layer of {in_features} inputs: its blocks of {max(size, 2)} columns do "
                f"not divide {in_features}; use {ways}."
            )
        return size

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        size = self.size(shape[1])
        angles = Part("angles", torch.int8, (shape[1] // size, count(size)), shared=True)
        return (angles, *(replace(part, name=_PREFIX + part.name) for part in self.inner.parts(shape)))

    def tile(self, rows: int) -> int:
        return self.inner.tile(rows)

    @property
    def sampled(self) -> bool:
        # A basis of a few rows' own fits these far better than a layer's basis fits the layer.
        return self.inner.sampled and not self.weights

    def angles(self, weight: Tensor, gram: Gram | None) -> Tensor:
        """The stored basis for ``weight (out, in)``: int8 ``(blocks, N (N − 1) / 2)``."""
        size = self.size(weight.shape[1])
        blocks = weight.shape[1] // size
        if gram is None or self.weights:
            pieces = weight.double().reshape(len(weight), blocks, size).transpose(0, 1)
            moments = pieces.mT @ pieces
        else:
            moments = gram.matrix.reshape(blocks, size, blocks, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
        values, vectors = torch.linalg.eigh(moments)
        # Of equal ones the first: inputs that are white already stay as they are.
        order = torch.argsort(values, dim=1, descending=True, stable=True)
        return factored(torch.gather(vectors, 2, order[:, None, :].expand_as(vectors)))

    def encode(self, weight: Tensor, gram: Gram | None, encode: Encode) -> tuple[dict[str, Tensor], Tensor]:
        angles = self.angles(weight, gram)

        def turned() -> Gram:
            assert gram is not None
            half = turn(gram.matrix.double(), angles)
            return Gram(turn(half.T.contiguous(), angles).float(), gram.tokens, gram.damped)

        key = f"klt:{len(angles)}:{hashlib.sha256(angles.numpy().tobytes()).hexdigest()}"
        basis = None if gram is None else encode.transformed(gram, key, turned)
        tensors, values = encode(turn(weight, angles), self.inner, basis)
        named = {_PREFIX + name: tensor for name, tensor in tensors.items()}
        return {"angles": angles, **named}, unturn(values, angles)

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return unturn(self.inner.decode(under(tensors, _PREFIX), shape), tensors["angles"])

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        return unturn(self.inner.decode_rows(under(tensors, _PREFIX), shape, rows), tensors["angles"])


_FORM = "klt[4|8|16|32|64](<codec>)[:weights]"


@reads(r"klt(\d{0,6})", form=_FORM, heads=("klt", "klt16"))
def _read(words: Words) -> PrincipalBasis:
    if len(words.arguments) != 1 or words.options not in ((), ("weights",)):
        raise words.refuse(f"write {_FORM}, such as klt16(ectcq2).")
    return PrincipalBasis(parse(words.arguments[0]), int(words.head[1]) if words.head[1] else None, bool(words.options))
