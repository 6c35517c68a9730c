"""The layers of one block in a survey: encoded by a recipe, put in place, and tuned together where it says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tersor.codecs import BitStack
from tersor.contracts import Codec, Gram, Layer
from tersor.recipes import NothingFits, Recipe
from tersor.solvers import Encoder
from tersor.stages.context import Context, oriented
from tersor.stages.tune import Piece
from tersor.statistics.collect import OutputMoments
from tersor.statistics.outputs import output_energy
from tersor.statistics.sensitivity import Objective, linear_objective

_SAMPLED_ROWS = 256
"""Rows of a layer whose error stands for that of all, when a plan asks."""


def encode_copies(
    context: Context,
    recipe: Recipe,
    layer: Layer,
    codec: Codec,
    grams: Mapping[str, Gram],
    encoder: Encoder,
    gradients: Mapping[str, Tensor],
) -> tuple[int, list[Piece]]:
    """All copies of a layer by a recipe, and the bits they take. ``gradients``: by ``<layer>#<copy>``, or none."""
    source = context.weight(layer)
    bits, pieces = 0, []
    for number in range(layer.copies):
        weight = source[number].float().contiguous()
        gram = grams.get(f"{layer.inputs}#{number}")
        if gram is not None and gradients:
            gram = replace(gram, gradients=gradients[f"{layer.name}#{number}"])
        used, finer, tensors, values = _encoded(recipe, weight, codec, gram, encoder)
        bits += used
        pieces.append(Piece(layer, f"{layer.name}#{number}", weight, values, finer, tensors, gram))
    return bits, pieces


def put_values(parameter: Tensor, layer: Layer, pieces: Sequence[Piece]) -> None:
    """Decoded values, one piece for each copy in order, in the place of a layer's weights."""
    oriented(parameter, layer).copy_(torch.stack([piece.values for piece in pieces]))


def relative_errors(pieces: Sequence[Piece], energies: dict[str, float]) -> list[float]:
    """``tr(E H Eᵀ) / tr(W H Wᵀ)`` of each piece of which the inputs are known and that puts out anything.

    ``energies``: the denominators by name, which no recipe changes; those that are not there yet are added.
    """
    errors = []
    for piece in pieces:
        if piece.gram is not None:
            if piece.name not in energies:
                energies[piece.name] = output_energy(piece.weight, piece.gram.matrix)
            if energies[piece.name] > 0:
                errors.append(output_energy(piece.weight - piece.values, piece.gram.matrix) / energies[piece.name])
    return errors


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


def expected_loss(
    context: Context,
    recipe: Recipe,
    layer: Layer,
    codec: Codec,
    grams: Mapping[str, Gram],
    encoder: Encoder,
    moments: OutputMoments,
) -> float:
    """The divergence, in nats a token, that a layer in ``codec`` is expected to cost the model; from some rows."""
    total = 0.0
    for number, source in enumerate(context.weight(layer)):
        gram = grams.get(f"{layer.inputs}#{number}")
        if gram is not None:
            step = max(len(source) // _SAMPLED_ROWS, 1) if codec.sampled else 1
            rows = torch.arange(0, len(source), step)
            weight = source[rows].float().contiguous()
            error = weight - encoder(weight, codec, gram if recipe.calibrated else None)[1]
            total += _price(error, rows, linear_objective(gram, moments, layer, number)) * len(source)
    return total


def expected_losses(
    context: Context,
    recipe: Recipe,
    layer: Layer,
    stack: BitStack,
    grams: Mapping[str, Gram],
    encoder: Encoder,
    moments: OutputMoments,
) -> Iterator[float]:
    """:func:`expected_loss` of the stacks of one stage, of two and so on, each stage encoded once."""
    grown = []
    for number, source in enumerate(context.weight(layer)):
        gram = grams.get(f"{layer.inputs}#{number}")
        if gram is not None:
            weight = source.float().contiguous()
            objective = linear_objective(gram, moments, layer, number)
            stages = stack.growing(weight, gram if recipe.calibrated else None, encoder)
            grown.append((weight, torch.arange(len(weight)), objective, stages))
    for _ in range(stack.stages):
        yield sum(
            _price(weight - next(stages)[1], rows, objective) * len(weight) for weight, rows, objective, stages in grown
        )


def _price(error: Tensor, rows: Tensor, objective: Objective) -> float:
    return float(objective.distortion(error, rows).double().mean())
