"""Stage: a file for another engine is run by that engine itself, and compared with the source and with our decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tersor.anatomy import Source, WeightLoader
from tersor.codecs import parse
from tersor.contracts import Anatomy, Layer, Quality, Rounding
from tersor.engines.contract import Engine, Stored, Target
from tersor.evaluation.divergence import DivergenceAccumulator, TokenComparison, compare_logits, join
from tersor.runtime.rounded import RoundedStream
from tersor.runtime.stream import BlockStream
from tersor.stages.context import Progress, as_parameter
from tersor.stages.verify import HEAD_TOKENS, decoding_loader, final_states

STAGE = "prove"


@dataclass(frozen=True)
class Proof:
    """What an engine computes with a file.

    ``by``: the engine's name. ``engine``: its output against the source's. ``ours``: what our own decoding of the same
    file predicts, with inputs rounded where the file asks for it. ``noise``: KL (prediction ‖ engine) in nats per
    token: the engine's arithmetic, if the file is read alike. ``file_bytes``: its size, as budgets count it. ``said``:
    what the file asks of the engine's arithmetic, if anything.
    """

    path: Path
    by: str
    engine: Quality
    ours: Quality
    noise: float
    file_bytes: int
    said: str = ""


def stored_loader(stored: Stored, anatomy: Anatomy, dtype: torch.dtype) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """A loader of parameters that decodes an engine's file by our codecs."""

    def weight(layer: Layer) -> Tensor:
        codec = parse(stored.texts[layer.name])
        return as_parameter(codec.decode(stored.tensors(layer, codec), layer.stored_shape).to(dtype), layer)

    return decoding_loader(anatomy, dtype, weight, stored.kept)


def prove_file(
    path: Path,
    engine: Engine,
    source: Source,
    model: torch.nn.Module,
    target: Target,
    ids: Tensor,
    *,
    chunk: int,
    workers: int,
    origin: str,
    progress: Progress,
) -> Proof:
    """Run a file by its engine on ``ids (n, T)``, next to the source and to our decoding of it, both in float32."""
    anatomy, dtype = target.anatomy, torch.float32
    stored = target.stored(path)
    loader = WeightLoader(source, model)
    first = BlockStream(model, anatomy, lambda names: loader.load(names, dtype), dtype=dtype)

    def rounding(layer: Layer) -> Rounding | None:
        codec = parse(stored.texts[layer.name])
        return stored.inputs(layer, codec)

    second = RoundedStream(model, anatomy, stored_loader(stored, anatomy, dtype), rounding, dtype=dtype)
    totals = [DivergenceAccumulator() for _ in range(3)]
    try:
        steps = len(anatomy.blocks) + len(ids)
        states = final_states(
            (first, second), len(anatomy.blocks), ids, chunk, workers, lambda done: progress(STAGE, done, steps)
        )
        hidden = [torch.cat(pieces) for pieces in states]
        with first.head_module(), second.head_module(), engine.run(path, ids.shape[1], workers) as run:
            for row, sequence in enumerate(ids):
                theirs = run.logits(sequence.tolist())[:-1]
                mine = [one[row : row + 1, :-1] for one in hidden]
                found = _three_ways((first, second), mine, theirs, sequence[1:])
                for total, one in zip(totals, found, strict=True):
                    total.add(one)
                progress(STAGE, len(anatomy.blocks) + row + 1, steps)
    finally:
        first.close()
        second.close()
    by_engine, predicted, between = (total.quality(origin) for total in totals)
    return Proof(path, engine.name, by_engine, predicted, between.kl, stored.nbytes, stored.said)


def _three_ways(
    streams: tuple[BlockStream, BlockStream], hidden: Sequence[Tensor], theirs: Tensor, targets: Tensor
) -> tuple[TokenComparison, ...]:
    """One sequence: the engine against the source, our decoding against the source, the engine against our decoding.

    ``hidden``: both streams' ``(1, tokens, width)`` after the last block; ``theirs (tokens, vocabulary)``: the engine's
    logits. Ours are there for at most HEAD_TOKENS tokens at a time.
    """
    pieces = []
    for start in range(0, len(theirs), HEAD_TOKENS):
        here = slice(start, start + HEAD_TOKENS)
        with torch.no_grad():
            wanted, ours = (stream.head(one[:, here])[0].float() for stream, one in zip(streams, hidden, strict=True))
        pairs = ((wanted, theirs[here]), (wanted, ours), (ours, theirs[here]))
        pieces.append([compare_logits(*pair, targets[here]) for pair in pairs])
    return tuple(join(parts) for parts in zip(*pieces, strict=True))
