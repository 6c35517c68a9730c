"""The layers of one block in a survey: encoded by a recipe, put in place, and tuned together where it says so."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tersor.contracts import Codec, Gram, Layer
from tersor.parallel import in_order
from tersor.recipes import NothingFits, Recipe
from tersor.recovery import BlockTuning, Run, Tunable, as_tunable
from tersor.runtime.stream import BlockStream
from tersor.solvers import Encoder
from tersor.stages.context import Context, oriented
from tersor.stages.verify import advance_states
from tersor.statistics.text import TokenBatch

_SAMPLED_ROWS = 256
"""Rows of a layer whose error stands for that of all, when a plan asks."""


@dataclass(frozen=True)
class Piece:
    """One copy of a layer as it was encoded: ``weight`` and decoded ``values (out, in)`` float32.

    ``tensors``: as ``codec`` stores them; None when a recipe has more to undo than decoding.
    """

    layer: Layer
    copy: int
    weight: Tensor
    values: Tensor
    codec: Codec
    tensors: Mapping[str, Tensor] | None
    gram: Gram | None

    @property
    def name(self) -> str:
        return f"{self.layer.name}#{self.copy}"

    def error(self) -> float | None:
        """``tr(E H Eᵀ) / tr(W H Wᵀ)``; None where nothing of the input is known, or there is none."""
        return None if self.gram is None else relative_error(self.weight, self.values, self.gram)


def relative_error(weight: Tensor, values: Tensor, gram: Gram) -> float | None:
    """``tr(E H Eᵀ) / tr(W H Wᵀ)`` for ``(out, in)`` float32; None when the layer's output is zero anyway."""
    error, energy = (float(((m @ gram.matrix) * m).double().sum()) for m in (weight - values, weight))
    return error / energy if energy > 0 else None


def encode_copies(
    context: Context, recipe: Recipe, layer: Layer, codec: Codec, grams: Mapping[str, Gram], encoder: Encoder
) -> tuple[int, list[Piece]]:
    """All copies of a layer by a recipe, and the bits they take."""
    source = context.weight(layer)
    bits, pieces = 0, []
    for number in range(layer.copies):
        weight = source[number].float().contiguous()
        gram = grams.get(f"{layer.inputs}#{number}")
        used, finer, tensors, values = _encoded(recipe, weight, codec, gram, encoder)
        bits += used
        pieces.append(Piece(layer, number, weight, values, finer, tensors, gram))
    return bits, pieces


def put_values(parameter: Tensor, layer: Layer, pieces: Sequence[Piece]) -> None:
    """Decoded values, one piece for each copy in order, in the place of a layer's weights."""
    oriented(parameter, layer).copy_(torch.stack([piece.values for piece in pieces]))


def encode_layer(
    recipe: Recipe, weight: Tensor, codec: Codec, gram: Gram | None, encoder: Encoder
) -> tuple[int, Tensor]:
    """Bits, and decoded values ``(out, in)`` of ``weight (out, in)`` float32, by a recipe."""
    used, _, _, values = _encoded(recipe, weight, codec, gram, encoder)
    return used, values


def _encoded(
    recipe: Recipe, weight: Tensor, codec: Codec, gram: Gram | None, encoder: Encoder
) -> tuple[int, Codec, Mapping[str, Tensor] | None, Tensor]:
    """Bits, the codec in the end, stored tensors (None where decoding them is not all that is to be done), values."""
    shape = (weight.shape[0], weight.shape[1])
    if recipe.refine is not None:
        finer = recipe.refine(weight, codec)
        if finer.bits(shape) > codec.bits(shape):
            raise NothingFits(f"Recipe {recipe.name} refined {codec} into {finer}, which takes more bits.")
        codec = finer
    whole = recipe.prepare is None or gram is None
    if recipe.prepare is not None and gram is not None:
        prepared = recipe.prepare(weight, gram, codec)
        tensors, values = encoder(prepared.weight, codec, prepared.gram)
        values = prepared.restore(values)
    else:
        tensors, values = encoder(weight, codec, gram if recipe.calibrated else None)
    stored = 8 * sum(tensor.nbytes for tensor in tensors.values())
    if stored != codec.bits(shape):
        raise NothingFits(f"Codec {codec} says {codec.bits(shape):,} bits for {shape} and stored {stored:,}.")
    return recipe.bits(codec, shape), codec, tensors if whole else None, values


def expected_loss(context: Context, layer: Layer, codec: Codec, grams: Mapping[str, Gram], encoder: Encoder) -> float:
    """The relative output error of a layer in ``codec``, from some rows; the mean over copies."""
    errors = []
    for number, source in enumerate(context.weight(layer)):
        gram = grams.get(f"{layer.inputs}#{number}")
        if gram is not None:
            step = max(len(source) // _SAMPLED_ROWS, 1)
            weight = (source[::step] if codec.sampled else source).float().contiguous()
            values = encoder(weight, codec, gram)[1]
            errors.append(relative_error(weight, values, gram) or 0.0)
    return sum(errors) / len(errors) if errors else 0.0


class BlockTuner:
    """Tunes one block after the other, on the first sequences of a text.

    :meth:`tune` is called for every block in order. The states that it tunes with are those that reach the block in the
    compressed model; the targets are what the original model's block puts out, given its own inputs.
    """

    def __init__(self, context: Context, stream: BlockStream, text: TokenBatch, tuning: BlockTuning) -> None:
        self._context, self._stream, self._tuning = context, stream, tuning
        self._reference = [stream.embed(row[None]) for row in text.ids[: max(tuning.sample // text.ids.shape[1], 1)]]
        self._states = torch.cat(self._reference)

    def tune(self, module: nn.Module, block: int, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces of a block tuned together. ``module`` still has its original weights, and keeps them."""
        workers = self._context.workers
        self._reference = advance_states(self._stream, module, block, self._reference, workers)
        by_name = {piece.name: piece for piece in pieces}
        weights: dict[str, Tunable] = {}
        for name, piece in by_name.items():
            made = None if piece.tensors is None else as_tunable(piece.codec, piece.weight, piece.tensors)
            if made is not None:
                weights[name] = made

        def decode(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
            return by_name[name].codec.decode(tensors, by_name[name].layer.shape)

        tuned = self._tuning(
            self._runner(module, block, by_name, fixed={*by_name} - {*weights}),
            weights,
            decode,
            self._states,
            torch.cat(self._reference),
            workers=workers,
        )
        self._states = tuned.outputs
        found = list(in_order(lambda at: _finished(pieces[at], tuned.tensors), len(pieces), workers))
        self._check(found, pieces)
        return found

    def _runner(self, module: nn.Module, block: int, pieces: Mapping[str, Piece], fixed: set[str]) -> Run:
        """The block with other weights. Every thread has a module of its own: putting weights in changes it."""
        prefix = self._context.anatomy.blocks[block] + "."
        layers = {
            piece.layer: [name for name in pieces if pieces[name].layer == piece.layer] for piece in pieces.values()
        }
        own = threading.local()

        def run(weights: Mapping[str, Tensor], states: Tensor) -> Tensor:
            if not hasattr(own, "module"):
                own.module = copy.deepcopy(module)
            given = {}
            for layer, names in layers.items():
                parts = [pieces[name].values.to(states.dtype) if name in fixed else weights[name] for name in names]
                stacked = torch.stack([part.T if layer.transposed else part for part in parts])
                parameter = layer.parameter.removeprefix(prefix)
                given[parameter] = stacked.reshape(own.module.get_parameter(parameter).shape)
            return self._stream.run(_Given(own.module, given), block, states)

        return run

    def _check(self, tuned: Sequence[Piece], before: Sequence[Piece]) -> None:
        for one, other in zip(tuned, before, strict=True):
            if one.tensors is not None and other.tensors is not None:
                kinds = [{name: (t.dtype, t.shape) for name, t in piece.tensors.items()} for piece in (one, other)]  # type: ignore[union-attr]
                if kinds[0] != kinds[1]:
                    raise NothingFits(
                        f"Tuning {one.name} in {one.codec} changed what is stored: {kinds[1]}, {kinds[0]}."
                    )


def _finished(piece: Piece, tuned: Mapping[str, Mapping[str, Tensor]]) -> Piece:
    """The piece with its tuned tensors, and what they decode to."""
    tensors = tuned.get(piece.name)
    if tensors is None:
        return piece
    return replace(piece, tensors=tensors, values=piece.codec.decode(tensors, piece.layer.shape))


class _Given(nn.Module):
    """A module run with other parameters than its own, for as long as a call takes."""

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._module, self._given = [module], dict(parameters)

    def forward(self, *args: object, **kwargs: object) -> object:
        return torch.func.functional_call(self._module[0], self._given, args, kwargs)
