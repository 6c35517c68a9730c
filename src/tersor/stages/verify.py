"""Stage: the written artifact is opened again and compared with the source; only what was read back is reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.artifact import Artifact
from tersor.contracts import Anatomy, Layer, Quality
from tersor.errors import VerificationFailed
from tersor.evaluation.divergence import DivergenceAccumulator, compare_logits
from tersor.parallel import in_order
from tersor.runtime.stream import BlockStream
from tersor.stages.context import Context, Progress, as_parameter, row_pieces

STAGE = "verify"
HEAD_TOKENS = 256
"""Tokens whose logits are there at one time, for each of the two models."""


def decoding_loader(
    anatomy: Anatomy, dtype: torch.dtype, weight: Callable[[Layer], Tensor], kept: Callable[[str], Tensor]
) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """A loader of parameters for :class:`BlockStream`.

    ``weight(layer)``: a layer's decoded weight, shaped as the model's parameter is. ``kept(name)``: a kept parameter.
    """
    layers = {layer.parameter: layer for layer in anatomy.layers}
    tied = {name: layer for layer in anatomy.layers for name in layer.tied}

    def load(names: Sequence[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            layer = layers.get(name) or tied.get(name)
            found[name] = (kept(name) if layer is None else weight(layer)).to(dtype)
        return found

    return load


def artifact_loader(
    artifact: Artifact, anatomy: Anatomy, dtype: torch.dtype, workers: int
) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """A loader of parameters for :class:`BlockStream` that decodes an artifact's layers."""
    return decoding_loader(anatomy, dtype, lambda layer: decoded(artifact, layer, dtype, workers), artifact.kept)


def decoded(artifact: Artifact, layer: Layer, dtype: torch.dtype, workers: int) -> Tensor:
    """A layer's weight out of the artifact, shaped as the model's parameter is."""
    pieces = row_pieces(artifact.layers[layer.name], layer)

    def work(index: int) -> Tensor:
        return artifact.decode(layer.name, pieces[index]).to(dtype)

    return as_parameter(torch.cat(list(in_order(work, len(pieces), workers))), layer)


def check_errors(context: Context, artifact: Artifact) -> None:
    """Decode every layer from the file and compare its distance from the source with what encoding recorded.

    Raises VerificationFailed naming the first layer that differs.
    """
    for layer in context.anatomy.layers:
        source = context.weight(layer).reshape(layer.stored_shape)
        pieces = row_pieces(artifact.layers[layer.name], layer)

        def work(
            index: int, layer: Layer = layer, source: Tensor = source, pieces: list[slice] = pieces
        ) -> tuple[float, float]:
            here = pieces[index]
            weight = source[here].float()
            error = weight - artifact.decode(layer.name, here)
            return float(error.double().square().sum()), float(weight.double().square().sum())

        sums = list(in_order(work, len(pieces), context.workers))
        energy = math.fsum(pair[1] for pair in sums)
        found = math.sqrt(math.fsum(pair[0] for pair in sums) / energy) if energy > 0 else 0.0
        expected = artifact.manifest.errors[layer.name]
        if not math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9):
            raise VerificationFailed(
                f"{layer.name} reads back with a relative error of {found:.6g}, but {expected:.6g} was recorded when "
                f"it was encoded: the file is not what was written; check the disk and run again."
            )


@dataclass(frozen=True)
class Pair:
    """Two models run side by side: the reference, and what is compared with it."""

    reference: BlockStream
    compressed: BlockStream


def measure_quality(
    pair: Pair, blocks: int, ids: Tensor, *, chunk: int, workers: int, origin: str, progress: Progress
) -> Quality:
    """KL, perplexity and agreement on ``ids (n, T)``, both models streamed block by block in tandem."""
    streams = (pair.reference, pair.compressed)
    states = final_states(streams, blocks, ids, chunk, workers, lambda done: progress(STAGE, done, blocks + 1))
    pieces = _pieces(ids, chunk)
    accumulator = DivergenceAccumulator()
    with pair.reference.head_module(), pair.compressed.head_module():
        for index, piece in enumerate(pieces):
            for row in range(piece.stop - piece.start):
                targets = ids[piece.start + row, 1:]
                hidden = [states[number][index][row : row + 1, :-1] for number in (0, 1)]
                accumulator.add(compare_sequence(pair, hidden[0], hidden[1], targets, workers))
    progress(STAGE, blocks + 1, blocks + 1)
    return accumulator.quality(origin)


def _pieces(ids: Tensor, chunk: int) -> list[slice]:
    return [slice(at, min(at + chunk, len(ids))) for at in range(0, len(ids), chunk)]


def final_states(
    streams: Sequence[BlockStream], blocks: int, ids: Tensor, chunk: int, workers: int, done: Callable[[int], None]
) -> list[list[Tensor]]:
    """Hidden states after the last block, for each stream in pieces of ``chunk`` sequences of ``ids (n, T)``.

    ``done(blocks)`` is called after each block.
    """
    with torch.no_grad():
        states = [[stream.embed(ids[piece]) for piece in _pieces(ids, chunk)] for stream in streams]
    for block in range(blocks):
        for number, stream in enumerate(streams):
            with stream.block(block) as module:
                states[number] = advance_states(stream, module, block, states[number], workers)
        done(block + 1)
    return states


def advance_states(
    stream: BlockStream,
    module: torch.nn.Module,
    block: int,
    states: list[Tensor],
    workers: int,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> list[Tensor]:
    """Hidden states in pieces, after one more block. ``precision()``: what a thread runs it in."""

    def work(index: int) -> Tensor:
        with torch.no_grad(), precision():
            return stream.run(module, block, states[index]).to(states[index].dtype)

    return list(in_order(work, len(states), workers))


def compare_sequence(pair: Pair, reference: Tensor, compressed: Tensor, targets: Tensor, workers: int):  # type: ignore[no-untyped-def]
    """Statistics of one sequence: logits of at most HEAD_TOKENS positions at a time."""

    def work(index: int):  # type: ignore[no-untyped-def]
        here = slice(index * HEAD_TOKENS, (index + 1) * HEAD_TOKENS)
        with torch.no_grad():
            first = pair.reference.head(reference[:, here])[0]
            second = pair.compressed.head(compressed[:, here])[0]
        return compare_logits(first, second, targets[here])

    pieces = list(in_order(work, -(-targets.shape[0] // HEAD_TOKENS), workers))
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total
