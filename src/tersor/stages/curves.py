"""Stage: Gram matrices of the original model, block by block, and from them each layer's rate–distortion points."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tersor.codecs import parse
from tersor.contracts import Gram, Layer, RatePoint
from tersor.parallel import in_order
from tersor.runtime.stream import BlockStream
from tersor.solvers import Encoder, Nearest
from tersor.stages.candidates import engine_roundings, layer_candidates, middle
from tersor.stages.context import Context, Record, block_weights, oriented
from tersor.stages.memory import give_back
from tersor.stages.sensitivity import (
    advance,
    chunk_tokens,
    head_parameter,
    layer_energies,
    load_moments,
    token_weights,
)
from tersor.stages.stretches import Measured, combine, stretch_stops
from tersor.stages.work import Hidden
from tersor.statistics.collect import Grams, OutputMoments, collect_grams, collect_guided_grams
from tersor.statistics.curves import draw_sample, measure
from tersor.statistics.sensitivity import Objective, embedding_gram, embedding_objective, linear_objective

STAGE = "curves"
OUTSIDE = "curves/outside.json"
"""Where what was measured of embedding and head lies, once all is."""
_NOISE = "noise/"
SAMPLE_ROWS = 48
EMBEDDING_ROWS = 384
SAMPLE_COPIES = 4
MINIMUM_EXPERT_TOKENS = 256


@dataclass(frozen=True)
class Statistics:
    """Gram matrices of the calibration text and of its held-out part, for the layers of one block.

    Tokens count by the gradients at the outputs of what reads them, where those are known: in ``fit`` of all layers
    that share an input, in ``guided`` of each layer by itself, on the held-out text; ``held_out`` has only the others.
    """

    fit: Grams
    held_out: Grams
    guided: dict[str, Gram]

    def both(self, layer: Layer, copy: int) -> tuple[Gram | None, Gram | None]:
        fit, held = self.fit.gram(layer, copy), self.held_out.gram(layer, copy)
        # Too few held-out tokens measure nothing; an expert may have seen none.
        if held is not None and held.tokens < 64:
            held = None
        return fit, held if held is not None else fit


def measure_curves(context: Context, ids: Tensor, *, points: bool = True) -> None:
    """One pass of the original model over ``ids (n, T)``; leaves ``curves/<block>.json`` for every block.

    Codes are fitted on the calibration part's Gram matrix and judged on the held-out part's, so that a solver that
    fits its text too closely is not believed. Without ``points`` (a plan was given) only the Gram matrix at the head is
    collected, which encoding needs.
    """
    blocks = len(context.anatomy.blocks)
    total = blocks + 1
    stream = context.stream()
    width = context.width
    stores = [
        context.work.hidden(f"curves-{k}", (*ids.shape, width), context.dtype, context.chunk) for k in range(blocks + 1)
    ]
    try:
        first = next((k for k in range(blocks) if not context.work.has(f"curves/block-{k}.json")), blocks)
        if first == 0 and not stores[0].complete:
            for chunk in range(stores[0].chunks):
                with torch.no_grad():
                    stores[0].write(chunk, stream.embed(ids[stores[0].sequences(chunk)]))
            stores[0].finish()
        for block in range(first, blocks):
            context.work.event(STAGE, "block begun", block=block)
            record: Record = {}
            with stream.block(block) as module:
                if points:
                    record = _measure_block(context, stream, module, block, stores, context.held_out(len(ids)))
                else:
                    advance(context, stream, module, block, stores[block], stores[block + 1])
            give_back()
            context.work.save(f"curves/block-{block}.json", record)
            context.work.event(STAGE, "block done", block=block)
            stores[block].remove()
            context.progress(STAGE, block + 1, total)
        if not context.work.has(OUTSIDE):
            _measure_outside(context, stream, stores[blocks], ids, points=points)
            stores[blocks].remove()
        context.progress(STAGE, total, total)
    finally:
        stream.close()


def _measure_block(
    context: Context, stream: BlockStream, module: torch.nn.Module, block: int, stores: list[Hidden], held_out: int
) -> Record:
    """Statistics and points of one block; its matrices go when this returns."""
    weights = block_weights(context, module, block)
    fit_chunks = stores[block].chunks - held_out
    moments = load_moments(context, block) if context.options.sensitivity == "fisher" else None
    energies: list[dict[str, Tensor]] = [{} for _ in range(stores[block].chunks)]
    if moments is not None:
        energies = layer_energies(context, moments, *stores[block].shape[:2])
    statistics = _block_statistics(context, stream, module, block, weights, stores, fit_chunks, energies)
    give_back()
    return _measure_layers(context, weights, statistics, moments)


def _block_statistics(
    context: Context,
    stream: BlockStream,
    module: torch.nn.Module,
    block: int,
    weights: dict[Layer, Tensor],
    stores: list[Hidden],
    fit_chunks: int,
    energies: Sequence[Mapping[str, Tensor]],
) -> Statistics:
    """Gram matrices of all layers; of the held-out text one for each layer whose gradients are known."""
    before, after = stores[block], stores[block + 1]
    chunks = before.chunks
    judging = [chunk for chunk in range(fit_chunks if fit_chunks < chunks else 0, chunks) if energies[chunk]]

    def forward(chunk: int) -> Tensor:
        return stream.run(module, block, before.read(chunk))

    roundings = engine_roundings(context, weights)
    fitting = None
    if context.options.guided:
        tokens = chunk_tokens(context, *before.shape[:2])
        fitting = token_weights(energies[:fit_chunks], tokens[:fit_chunks], weights)
    fit = collect_grams(
        forward,
        fit_chunks,
        weights,
        workers=context.workers,
        keep=after.write,
        roundings=roundings,
        energies=fitting,
    )
    guided = frozenset(energies[judging[0]] if judging else ())
    held = collect_grams(
        lambda chunk: forward(chunk + fit_chunks),
        chunks - fit_chunks,
        {layer: weight for layer, weight in weights.items() if layer.name not in guided},
        workers=context.workers,
        keep=lambda chunk, output: after.write(chunk + fit_chunks, output),
        roundings=roundings,
    )
    after.finish()
    judges = collect_guided_grams(
        lambda piece: forward(judging[piece]),
        weights,
        [energies[chunk] for chunk in judging],
        workers=context.workers,
        roundings=roundings,
    )
    return Statistics(fit, held, judges)


def _measure_layers(
    context: Context, weights: dict[Layer, Tensor], statistics: Statistics, moments: OutputMoments | None
) -> Record:
    """Points of all layers of a block; layers with the same input share one factorization."""
    keys = sorted({(layer.inputs, copy) for layer in weights for copy in _sample_copies(layer, statistics)})

    def work(index: int) -> list[tuple[str, Record]]:
        key, copy = keys[index]
        layers = [layer for layer in weights if layer.inputs == key and copy < layer.copies]
        fit, held = statistics.both(layers[0], copy)
        if fit is None or held is None:
            return []
        encoder = Encoder(context.sampler())
        results = []
        for layer in layers:
            weight = oriented(weights[layer], layer)[copy]
            objective = _objective(layer, copy, weight, statistics.guided.get(layer.name, held), moments)
            results.append((layer.name, _points(context, layer, weight, objective, encoder, fit, copy)))
        return results

    found: dict[str, list[Record]] = {}
    for results in in_order(work, len(keys), context.workers):
        for name, record in results:
            found.setdefault(name, []).append(record)
    return {
        layer.name: _merge_copies(context, layer, found.get(layer.name, []), statistics, weights[layer])
        for layer in weights
    }


def _sample_copies(layer: Layer, statistics: Statistics) -> Iterable[int]:
    """The copies measured: some of the experts that any token reached, spread over the list."""
    if layer.copies == 1:
        return [0]
    seen = [copy for copy in range(layer.copies) if statistics.fit.gram(layer, copy) is not None]
    step = max(len(seen) // SAMPLE_COPIES, 1)
    return seen[::step][:SAMPLE_COPIES]


def _objective(layer: Layer, copy: int, weight: Tensor, gram: Gram, moments: OutputMoments | None) -> Objective:
    if moments is not None:
        return linear_objective(gram, moments, layer, copy)
    return flat_objective(layer, weight, gram)


def flat_objective(layer: Layer, weight: Tensor, gram: Gram) -> Objective:
    """Every layer's relative error counts alike, by its number of weights: what tools without sensitivities assume."""
    energy = float(((weight.float() @ gram.matrix) * weight.float()).sum().clamp(min=1e-30))
    return Objective(torch.full((layer.shape[0],), weight.numel() * 1e-8 / energy), gram)


def _points(
    context: Context, layer: Layer, weight: Tensor, objective: Objective, encoder: Encoder, fit: Gram | None, copy: int
) -> Record:
    """Measured points of one matrix, and how calibrated codes compare with uncalibrated ones on held-out text."""
    outside = layer.block is None
    seed = context.options.seed * 7919 + sum(layer.name.encode()) + copy
    candidates = layer_candidates(context, layer)
    codecs = [candidates[text] for text in candidates]
    mean = middle(candidates, layer)
    mixing = outside and context.options.candidates is None
    all_sampled = all(codec.sampled for codec in codecs)
    uncalibrated = Encoder(Nearest())
    measured, plain = [], 0.0
    start = 0
    for stop in stretch_stops(layer.shape[0]) if mixing else (layer.shape[0],):
        part = objective.stretch(start, stop)
        count = EMBEDDING_ROWS if outside else SAMPLE_ROWS
        sample = draw_sample(weight[start:stop], part, count=count, seed=seed + start)
        whole = draw_sample(weight[start:stop], part, count=stop - start, seed=seed) if not all_sampled else sample
        losses = [
            measure(sample if codec.sampled else whole, part, [codec], lambda rows, codec: encoder(rows, codec, fit)[1])
            for codec in codecs
        ]
        measured.append(Measured(start, stop, [loss for found in losses for loss in found]))
        plain += measure(sample, part, [candidates[mean]], lambda rows, codec: uncalibrated(rows, codec, None)[1])[0]
        start = stop
    points = combine(layer.stored_shape, codecs, measured)
    calibrated = sum(stretch.losses[list(candidates).index(mean)] for stretch in measured)
    return {
        "points": {text: loss + objective.rounding(weight, text) for text, loss in points.items()},
        "calibrated": calibrated,
        "uncalibrated": plain,
        "damping": encoder.damping,
        "copy": copy,
    }


def _merge_copies(
    context: Context, layer: Layer, found: list[Record], statistics: Statistics, weight: Tensor
) -> Record:
    """One record for a layer; for experts, sums scaled from the measured copies to all by their share of tokens."""
    notes: list[str] = []
    counts = [statistics.fit.tokens.get((layer.inputs, copy), 0) for copy in range(layer.copies)]
    if layer.copies > 1:
        few = sum(count < MINIMUM_EXPERT_TOKENS for count in counts)
        if few:
            notes.append(
                f"{few} of {layer.copies} experts of {layer.name} saw fewer than {MINIMUM_EXPERT_TOKENS} calibration "
                f"tokens (least {min(counts)}); give more text."
            )
    if not found:
        # No token reached any copy: nothing is known, so every choice costs what its weights' own error is.
        energy = Gram(torch.eye(layer.shape[1]), 0)
        matrix = oriented(weight, layer)[0]
        objective = flat_objective(layer, matrix, energy)
        found = [_points(context, layer, matrix, objective, Encoder(Nearest()), None, 0)]
        notes.append(f"No calibration token reached {layer.name}; it is rounded to nearest.")
    scale = layer.copies / len(found)
    if context.options.sensitivity == "fisher" and sum(counts) > 0:
        scale = sum(counts) / sum(counts[record["copy"]] for record in found)
    texts = list(found[0]["points"])
    points = {text: scale * math.fsum(record["points"][text] for record in found) for text in texts}
    damping = max(record["damping"] for record in found)
    # 0.01 is the solver's own damping; what is above it was raised because the matrix would not factor.
    if damping > 0.011:
        notes.append(f"Damping for {layer.name} was raised to {damping:g} of the mean diagonal.")
    return {
        "points": points,
        "calibrated": scale * math.fsum(record["calibrated"] for record in found),
        "uncalibrated": scale * math.fsum(record["uncalibrated"] for record in found),
        "notes": notes,
    }


def _measure_outside(context: Context, stream: BlockStream, hidden: Hidden, ids: Tensor, *, points: bool) -> None:
    """Embedding and head: their Gram matrices, kept for encoding too, and their points."""
    layers = {layer.name: layer for layer in context.anatomy.layers_of(None)}
    head = layers.get(context.anatomy.head or "")
    fit = held = None
    if head is not None:
        chunks = hidden.chunks
        fit_chunks = chunks - context.held_out(len(ids))
        with stream.head_module() as module:
            weights = {head: module.get_parameter(head_parameter(head))}

            def run(chunk: int) -> Tensor:
                return stream.head(hidden.read(chunk))

            collect = partial(
                collect_grams,
                weights=weights,
                workers=context.workers,
                skip=frozenset([head]),
                roundings=engine_roundings(context, weights),
            )
            fit = collect(run, fit_chunks).gram(head)
            held = collect(lambda chunk: run(chunk + fit_chunks), chunks - fit_chunks).gram(head) or fit
        assert fit is not None
        assert held is not None
        # Text too short to hold any out leaves one matrix, which a file must not hold twice.
        apart = {} if held is fit else {"held": held.matrix}
        noise = {f"{_NOISE}{text}": one.clone() for text, one in held.noise.items()}
        context.work.save_tensors(
            "curves/head.safetensors", {"fit": fit.matrix, **apart, **noise, "tokens": torch.tensor([fit.tokens])}
        )
    record = {}
    for layer in layers.values() if points else ():
        encoder = Encoder(context.sampler())
        weight = context.weight(layer)[0]
        fit_gram, objective = outside_objectives(context, layer, weight)
        record[layer.name] = {
            **_points(context, layer, weight, objective, encoder, fit_gram, 0),
            "notes": [],
        }
    context.work.save(OUTSIDE, record)


def outside_objectives(context: Context, layer: Layer, weight: Tensor) -> tuple[Gram, Objective]:
    """For an embedding or head: the Gram matrix to fit codes with, and the objective to judge them by."""
    is_head = layer.name == context.anatomy.head
    fit = held = None
    if is_head:
        stored = context.work.load_tensors("curves/head.safetensors")
        tokens = int(stored["tokens"])
        noise = {key.removeprefix(_NOISE): one for key, one in stored.items() if key.startswith(_NOISE)}
        fit, held = (Gram(stored.get(name, stored["fit"]), tokens, noise=noise) for name in ("fit", "held"))
    if context.options.sensitivity != "fisher":
        plain = Gram(torch.eye(layer.shape[1]), 0)
        return fit or plain, flat_objective(layer, weight[: 4 * EMBEDDING_ROWS], held or plain)
    rows = None
    if is_head:
        moments = load_moments(context, None)
        key = (layer.name, 0)
        rows = moments.sums[key] / moments.tokens[key]
    if layer.name != context.anatomy.embedding:
        assert rows is not None
        assert fit is not None
        assert held is not None
        return fit, Objective(0.5 * rows, held)
    found = context.work.load_tensors("sensitivity/embedding.safetensors")
    judge = embedding_objective(found["energies"], found["moment"], head_gram=held, head_rows=rows)
    return embedding_gram(found["moment"], head_gram=fit, head_rows=rows), judge


def load_records(context: Context) -> dict[str, Record]:
    """All layers' records, in the model's order."""
    names = [f"curves/block-{k}.json" for k in range(len(context.anatomy.blocks))] + [OUTSIDE]
    found: dict[str, Record] = {}
    for name in names:
        found.update(context.work.load(name))
    return {layer.name: found[layer.name] for layer in context.anatomy.layers if layer.name in found}


def calibration_notes(records: dict[str, Record], *, held_out: bool) -> tuple[str, ...]:
    """What the held-out text (if there is any) says of the calibration, and the notes of all layers."""
    notes = [note for record in records.values() for note in record["notes"]]
    if not held_out:
        short = "The calibration text is too short to hold any out, so nothing tells whether calibration helps."
        return (f"{short} Give more text, or --sequences.", *notes)
    ratios = {
        name: record["calibrated"] / record["uncalibrated"]
        for name, record in records.items()
        if record["uncalibrated"] > 0
    }
    if ratios:
        mean = math.exp(math.fsum(math.log(max(ratio, 1e-6)) for ratio in ratios.values()) / len(ratios))
        worse = [name for name, ratio in ratios.items() if ratio > 1]
        summary = f"On held-out text, calibrated codes have {mean:.2f} x the error of uncalibrated ones."
        if mean >= 1:
            summary += " Calibration did not help: use text closer to what the model is for, or --solver nearest."
        elif worse:
            summary += f" In {len(worse)} of {len(ratios)} layers they are worse (first: {worse[0]})."
        notes.insert(0, summary)
    return tuple(notes)


def rate_points(context: Context, records: dict[str, Record], cost: Any) -> dict[str, list[RatePoint]]:
    """Curves for the allocator. ``cost(layer, codec) -> bytes`` in the file, headers included."""
    curves = {}
    for layer in context.anatomy.layers:
        curves[layer.name] = [
            RatePoint(cost(layer, parse(text)), float(loss), text)
            for text, loss in records[layer.name]["points"].items()
        ]
    return curves
