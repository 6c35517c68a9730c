"""Stage: a block's encoded layers tuned together, against what the original block puts out."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from tersor.contracts import Codec, Gram, Layer
from tersor.errors import VerificationFailed
from tersor.parallel import in_order
from tersor.recovery import BlockTuning, Run, Tunable, Tuned, as_tunable
from tersor.runtime.stream import BlockStream
from tersor.stages.context import Context
from tersor.stages.verify import advance_states


@dataclass(frozen=True)
class Piece:
    """A layer, or one copy of several, as it was encoded: ``weight`` and decoded ``values (out, in)`` float32.

    ``tensors``: as ``codec`` stores them; None when there is more to undo than decoding. ``gram``: to judge it alone.
    """

    layer: Layer
    name: str
    weight: Tensor
    values: Tensor
    codec: Codec
    tensors: Mapping[str, Tensor] | None
    gram: Gram | None

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The values that stored tensors of this piece stand for."""
        return self.codec.decode(tensors, (self.weight.shape[0], self.weight.shape[1]))


class BlockTuner:
    """Tunes one block after the other, on some sequences.

    ``reference``: what reaches the next block in the original model, a sequence ``(1, length, width)`` each; what its
    blocks put out are the targets. It moves on with every block that is tuned.
    """

    def __init__(self, context: Context, stream: BlockStream, tuning: BlockTuning, reference: Sequence[Tensor]) -> None:
        self._context, self._stream, self._tuning = context, stream, tuning
        self.reference = list(reference)

    def tune(self, module: nn.Module, block: int, pieces: Sequence[Piece], states: Tensor) -> tuple[list[Piece], Tuned]:
        """The pieces of a block tuned together. ``module`` still has its original weights, and keeps them.

        ``states (n, length, width)``: what reaches the block in the compressed model, for the same sequences.
        """
        workers = self._context.workers
        precision = partial(self._tuning.precision, states.device)
        self.reference = advance_states(self._stream, module, block, self.reference, workers, precision)
        by_name = {piece.name: piece for piece in pieces}
        weights: dict[str, Tunable] = {}
        for name, piece in by_name.items():
            made = None if piece.tensors is None else as_tunable(piece.codec, piece.weight, piece.tensors)
            if made is not None:
                weights[name] = made

        def decode(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
            return by_name[name].decode(tensors)

        tuned = self._tuning(
            self._runner(module, block, by_name, fixed={*by_name} - {*weights}),
            weights,
            decode,
            states,
            torch.cat(self.reference),
            workers=workers,
        )
        found = list(in_order(lambda at: _finished(pieces[at], tuned.tensors), len(pieces), workers))
        self._check(found, pieces)
        return found, tuned

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
                stacked = (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(layer.copies, *layer.shape)
                parameter = layer.parameter.removeprefix(prefix)
                turned = stacked.transpose(1, 2) if layer.transposed else stacked
                given[parameter] = turned.reshape(own.module.get_parameter(parameter).shape)
            return self._stream.run(_Given(own.module, given), block, states)

        return run

    def _check(self, tuned: Sequence[Piece], before: Sequence[Piece]) -> None:
        for one, other in zip(tuned, before, strict=True):
            if one.tensors is not None and other.tensors is not None:
                kinds = [{name: (t.dtype, t.shape) for name, t in piece.tensors.items()} for piece in (one, other)]  # type: ignore[union-attr]
                if kinds[0] != kinds[1]:
                    raise VerificationFailed(
                        f"Tuning {one.name} in {one.codec} changed what is stored: {kinds[1]}, {kinds[0]}."
                    )


def _finished(piece: Piece, tuned: Mapping[str, Mapping[str, Tensor]]) -> Piece:
    """The piece with its tuned tensors, and what they decode to."""
    tensors = tuned.get(piece.name)
    if tensors is None:
        return piece
    return replace(piece, tensors=tensors, values=piece.decode(tensors))


class _Given(nn.Module):
    """A module run with other parameters than its own, for as long as a call takes."""

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._module, self._given = [module], dict(parameters)

    def forward(self, *args: object, **kwargs: object) -> object:
        return torch.func.functional_call(self._module[0], self._given, args, kwargs)
