"""Stage: every layer encoded with the codec its plan names, block by block, into the artifact's files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tersor.artifact import ArtifactWriter
from tersor.codecs.dense import Dense
from tersor.codecs.inner import under
from tersor.contracts import Codec, CompositeCodec, DirectCodec, Gram, Layer, LeafCodec, Stretch
from tersor.errors import NotFinite
from tersor.parallel import in_order
from tersor.recovery import BlockTuning
from tersor.runtime.stream import BlockStream
from tersor.solvers import Encoder, chunk_of
from tersor.stages.context import Context, as_parameter, block_weights, oriented, row_pieces
from tersor.stages.curves import OUTSIDE, outside_objectives
from tersor.stages.memory import give_back
from tersor.stages.sensitivity import advance, text_weights
from tersor.stages.tune import BlockTuner, Piece
from tersor.stages.weights import is_finite
from tersor.stages.work import Hidden
from tersor.statistics.collect import Grams, collect_grams
from tersor.statistics.outputs import output_energy

STAGE = "encode"

TUNING = BlockTuning(steps=32, batch=1024, rate=0.02, checks=2, sample=8192)
"""How blocks are tuned; docs/LOG.md says what other settings gave."""


@dataclass(frozen=True)
class Coded:
    """An encoded layer: ``weight (copies · out, in)`` as the source has it, and the tensors that are stored for it.

    ``gram``: of the layer's input, where there is one for all of it.
    """

    weight: Tensor
    parts: dict[str, Tensor]
    record: dict[str, Any]
    gram: Gram | None


@dataclass(frozen=True)
class Ready:
    """An encoder, and the Gram matrix to encode a layer's rows with. ``note``: why there is none, or empty."""

    encoder: Encoder
    gram: Gram | None
    note: str = ""


def encode_model(context: Context, codecs: Mapping[str, Codec], writer: ArtifactWriter, ids: Tensor) -> None:
    """Encode all layers into ``writer``. What an earlier, killed run finished is not done again.

    With ``propagate`` the statistics of each block come from hidden states that have passed through the compressed
    blocks before it, so that each block is fitted to the inputs it will really get.
    """
    blocks = len(context.anatomy.blocks)
    total = blocks + 1
    stream = context.stream()
    stores = [
        context.work.hidden(
            f"encode-{k}",
            (*ids.shape, context.width),
            context.dtype,
            context.chunk,
        )
        for k in range(blocks + 1)
    ]
    try:
        _write_kept(context, writer)
        embedding = next((layer for layer in context.anatomy.layers if layer.name == context.anatomy.embedding), None)
        first = max((k for k in range(blocks + 1) if stores[k].complete), default=None)
        if embedding is not None and not writer.done(embedding.name):
            _encode_outside(context, embedding, codecs[embedding.name], writer)
        if first is None:
            _embed(context, stream, embedding, codecs, writer, ids, stores[0])
            first = 0
        for block in range(first, blocks):
            _encode_block(context, stream, block, codecs, writer, stores, ids)
            context.progress(STAGE, block + 1, total)
        for layer in context.anatomy.layers_of(None):
            if not writer.done(layer.name):
                _encode_outside(context, layer, codecs[layer.name], writer)
        context.progress(STAGE, total, total)
    finally:
        stream.close()


def _write_kept(context: Context, writer: ArtifactWriter) -> None:
    for name, (dtype, _) in context.anatomy.kept.items():
        if writer.done(name):
            continue
        tensor = context.loader.load([name])[name]
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NotFinite(f"Tensor {name} of the source has NaN or Inf; the source model is damaged.")
        writer.write(name, {name: tensor.to(dtype)})


def _embed(
    context: Context,
    stream: BlockStream,
    embedding: Layer | None,
    codecs: Mapping[str, Codec],
    writer: ArtifactWriter,
    ids: Tensor,
    store: Hidden,
) -> None:
    """Inputs of the first block: what the (compressed, when propagating) embedding gives for the calibration tokens."""
    load = context.loader.load
    if embedding is not None and context.options.propagate:
        decoded = _written_weight(context, embedding, codecs[embedding.name], writer)

        def load_compressed(names: Any) -> dict[str, Tensor]:
            found = load([name for name in names if name != embedding.parameter], context.dtype)
            return {**found, **({embedding.parameter: decoded} if embedding.parameter in names else {})}

        stream = BlockStream(context.model, context.anatomy, load_compressed, dtype=context.dtype)
    with torch.no_grad():
        for chunk in range(store.chunks):
            store.write(chunk, stream.embed(ids[store.sequences(chunk)]))
    store.finish()


def _encode_block(
    context: Context,
    stream: BlockStream,
    block: int,
    codecs: Mapping[str, Codec],
    writer: ArtifactWriter,
    stores: list[Hidden],
    ids: Tensor,
) -> None:
    context.work.event(STAGE, "block begun", block=block)
    before, after = stores[block], stores[block + 1]
    with stream.block(block) as module:
        weights = block_weights(context, module, block)
        open_layers = {layer: weight for layer, weight in weights.items() if not writer.done(layer.name)}
        if open_layers or not context.options.propagate:
            keep = None if context.options.propagate else after.write
            sums = collect_grams(
                lambda chunk: stream.run(module, block, before.read(chunk)),
                before.chunks,
                weights,
                workers=context.workers,
                keep=keep,
                energies=text_weights(context, block, weights, *ids.shape) if context.options.guided else None,
            )
            if context.options.tuned and open_layers:
                # Layers are tuned together, so those that an interrupted run had written are encoded once more.
                found = _encode_layers(context, weights, sums, codecs)
                coded: Iterable[tuple[Layer, Coded]]
                coded = _tuned(context, stream, module, block, before, ids, codecs, found)
            else:
                coded = _encode_layers(context, open_layers, sums, codecs)
            for layer, one in coded:
                if not writer.done(layer.name):
                    _write(layer, one, writer)
        if not context.options.propagate:
            after.finish()
        elif block + 1 < len(stores) - 1:
            _replace_weights(context, module, block, codecs, writer)
            advance(context, stream, module, block, before, after)
        else:
            after.skip()  # nobody reads what the last block puts out
    give_back()
    context.work.event(STAGE, "block done", block=block)
    before.remove()
    context.work.remove(f"reference-{block}.safetensors")


def _replace_weights(
    context: Context, module: nn.Module, block: int, codecs: Mapping[str, Codec], writer: ArtifactWriter
) -> None:
    """Put what was written in the place of the block's own weights."""
    with torch.no_grad():
        for layer, parameter in block_weights(context, module, block).items():
            parameter.copy_(_written_weight(context, layer, codecs[layer.name], writer))


def _written_weight(context: Context, layer: Layer, codec: Codec, writer: ArtifactWriter) -> Tensor:
    """A layer's weight as the artifact now holds it, in the parameter's own shape and the run's dtype."""
    stored = writer.read([f"{layer.name}.{part.name}" for part in codec.parts(layer.stored_shape)])
    parts = {name.rsplit(".", 1)[1]: tensor for name, tensor in stored.items()}
    return as_parameter(_decoded(context, layer, codec, parts, context.dtype), layer)


def _decoded(context: Context, layer: Layer, codec: Codec, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight ``(copies · out, in)`` that stored tensors stand for."""
    pieces = row_pieces(codec, layer)

    def work(index: int) -> Tensor:
        return codec.decode_rows(parts, layer.stored_shape, pieces[index]).to(dtype)

    return torch.cat(list(in_order(work, len(pieces), context.workers)))


def _tuned(
    context: Context,
    stream: BlockStream,
    module: nn.Module,
    block: int,
    before: Hidden,
    ids: Tensor,
    codecs: Mapping[str, Codec],
    encoded: Iterable[tuple[Layer, Coded]],
) -> list[tuple[Layer, Coded]]:
    """A block's layers, with what can be tuned of them tuned against the original block's output.

    The original's own states go from block to block in files of their own, for as many sequences as are tuned on.
    """
    here, after = (f"reference-{k}.safetensors" for k in (block, block + 1))
    count = min(TUNING.rows(before.shape[1]), before.shape[0])
    coded = dict(encoded)
    with torch.no_grad():
        states = torch.cat([before.read(chunk) for chunk in range(-(-count // before.chunk))])[:count]
        if block == 0:
            reference = [stream.embed(row[None]) for row in ids[:count]]
        else:
            reference = [row[None] for row in context.work.load_tensors(here)["states"]]
        pieces = [
            Piece(
                layer=layer,
                name=layer.name,
                weight=one.weight.float(),
                values=_decoded(context, layer, codecs[layer.name], one.parts, torch.float32),
                codec=codecs[layer.name],
                tensors=one.parts,
                gram=one.gram,
            )
            for layer, one in coded.items()
        ]
        tuner = BlockTuner(context, stream, TUNING, reference)
        tuned, found = tuner.tune(module, block, pieces, states)
    context.work.save_tensors(after, {"states": torch.cat(tuner.reference)})
    for piece in tuned:
        assert piece.tensors is not None
        record = coded[piece.layer].record | _summary(_errors(piece.weight, piece.values, piece.gram))
        record["tuned"] = [found.before, found.after]
        coded[piece.layer] = replace(coded[piece.layer], parts=dict(piece.tensors), record=record)
    return list(coded.items())


def _ready(context: Context, gram: Gram | None, name: str) -> Ready:
    note = f"No calibration token reached {name}: rounded to nearest." if gram is None else ""
    return Ready(Encoder(context.solver(), workers=context.workers), gram, note)


def _encode_layers(
    context: Context, weights: Mapping[Layer, Tensor], sums: Grams, codecs: Mapping[str, Codec]
) -> Iterator[tuple[Layer, Coded]]:
    """Encode layers of a block; those that read the same input come one after the other and share a factor."""
    give_back()
    ready: dict[tuple[str, int], Ready] = {}
    for layer in sorted(weights, key=lambda layer: layer.inputs):
        ready = {key: value for key, value in ready.items() if key[0] == layer.inputs}
        source = _source_weight(context, layer, weights[layer])
        keys = [(layer.inputs, copy) for copy in range(layer.copies)]
        for key in keys:
            if key not in ready:
                ready[key] = _ready(context, sums.gram(layer, key[1]), layer.name)
        yield layer, encode_layer(context, layer, source, codecs[layer.name], [ready[key] for key in keys])


def _source_weight(context: Context, layer: Layer, held: Tensor) -> Tensor:
    """A layer's weight as the source has it; the running block may hold it more coarsely, in the run's dtype."""
    name = context.loader.provider(layer.parameter)
    if name is not None and context.loader.targets[name].dtype == held.dtype:
        return oriented(held, layer)
    return context.weight(layer)


def _encode_outside(context: Context, layer: Layer, codec: Codec, writer: ArtifactWriter) -> None:
    weight = context.weight(layer)
    if isinstance(codec, Dense) and not context.work.has(OUTSIDE):
        ready = Ready(Encoder(context.solver(), workers=context.workers), None)
    else:
        ready = _ready(context, outside_objectives(context, layer, weight[0])[0], layer.name)
    _write(layer, encode_layer(context, layer, weight, codec, [ready]), writer)


def _write(layer: Layer, coded: Coded, writer: ArtifactWriter) -> None:
    named = {f"{layer.name}.{name}": tensor for name, tensor in coded.parts.items()}
    writer.write(layer.name, named, record=coded.record)


def encode_layer(context: Context, layer: Layer, weight: Tensor, codec: Codec, ready: list[Ready]) -> Coded:
    """Encode ``weight (copies, out, in)``; what was measured on the way is the unit's record."""
    if not is_finite(weight):
        raise NotFinite(f"The weights of {layer.name} have NaN or Inf; the source model is damaged.")
    parts = {part.name: torch.empty(part.shape, dtype=part.dtype) for part in codec.parts(layer.stored_shape)}
    flat = weight.reshape(layer.stored_shape)
    totals = [0.0] * 4
    for stretch in codec.stretches(layer.stored_shape[0]):
        own = under(parts, stretch.prefix)
        shape = (stretch.stop - stretch.start, layer.shape[1])
        direct = isinstance(stretch.codec, DirectCodec) and not any(part.shared for part in stretch.codec.parts(shape))
        composed = isinstance(stretch.codec, CompositeCodec) and stretch.codec.by_rows
        by_rows = direct or composed or isinstance(stretch.codec, LeafCodec)
        if by_rows:
            errors = _encode_by_rows(context, layer, flat, stretch, ready, own)
        else:
            errors = _encode_whole(flat[stretch.start : stretch.stop], stretch.codec, ready, own)
        totals = [total + error for total, error in zip(totals, errors, strict=True)]
    notes = {one.note for one in ready if one.note}
    notes |= {f"{layer.name}: {note}" for one in ready for note in one.encoder.notes}
    record = {**_summary(totals), "notes": sorted(notes)}
    return Coded(flat, parts, record, ready[0].gram if layer.copies == 1 else None)


def _summary(totals: Sequence[float]) -> dict[str, Any]:
    """What a record says of a layer's errors, from the sums that :func:`_errors` gives."""
    return {
        "relative_error": math.sqrt(totals[0] / totals[1]) if totals[1] > 0 else 0.0,
        "output_error": totals[2] / totals[3] if totals[3] > 0 else None,
    }


def _encode_by_rows(
    context: Context, layer: Layer, flat: Tensor, stretch: Stretch, ready: list[Ready], parts: dict[str, Tensor]
) -> list[float]:
    """Fill ``parts`` of one stretch in chunks of rows of fixed size, each an independent piece of work."""
    out = layer.shape[0]
    rows = stretch.stop - stretch.start
    shape = (rows, layer.shape[1])
    shared = {part.name for part in stretch.codec.parts(shape) if part.shared}
    codec = stretch.codec
    if isinstance(codec, LeafCodec | CompositeCodec):
        codec = codec.learn(flat[stretch.start : stretch.stop], _mean_gram(ready))
    step, tile = chunk_of(stretch.codec, rows), stretch.codec.tile(rows)
    pieces = [
        (start, min(start + step, stop))
        for first, stop in _within_copies(stretch.start, stretch.stop, out)
        for start in range(first, stop, step)
    ]

    def work(index: int) -> tuple[dict[str, Tensor], list[float]]:
        start, stop = pieces[index]
        one = ready[start // out]
        weight = flat[start:stop].float().contiguous()
        tensors, values = one.encoder.rows(weight, codec, one.gram)
        return tensors, _errors(weight, values, one.gram)

    totals = [0.0] * 4
    for (start, _), (tensors, errors) in zip(pieces, in_order(work, len(pieces), context.workers), strict=True):
        for name, tensor in tensors.items():
            if name in shared:
                parts[name].copy_(tensor)
            else:
                first = (start - stretch.start) // (1 if len(parts[name]) == rows else tile)
                parts[name][first : first + len(tensor)] = tensor
        totals = [total + error for total, error in zip(totals, errors, strict=True)]
    return totals


def _encode_whole(rows: Tensor, codec: Codec, ready: list[Ready], parts: dict[str, Tensor]) -> list[float]:
    """Fill ``parts`` of a stretch whose codec takes all its ``rows`` at once; copies share their mean Gram matrix."""
    weight = rows.float().contiguous()
    gram = _mean_gram(ready)
    tensors, values = ready[0].encoder(weight, codec, gram)
    for name, tensor in tensors.items():
        parts[name].copy_(tensor)
    return _errors(weight, values, gram)


def _mean_gram(ready: list[Ready]) -> Gram | None:
    """One Gram matrix for all copies of a layer, each counting by its tokens."""
    grams = [one.gram for one in ready if one.gram is not None]
    if len(grams) < 2:
        return grams[0] if grams else None
    tokens = sum(gram.tokens for gram in grams)
    matrix = torch.zeros_like(grams[0].matrix)
    for gram in grams:
        matrix += gram.matrix * (gram.tokens / max(tokens, 1))
    reaches = [gram.reach for gram in grams if gram.reach is not None]
    return Gram(matrix, tokens, reach=max(reaches, default=None))


def _within_copies(start: int, stop: int, out: int) -> list[tuple[int, int]]:
    """Rows ``start`` to ``stop`` cut where one copy of ``out`` rows ends and the next begins."""
    cuts = [start, *range((start // out + 1) * out, stop, out), stop]
    return list(pairwise(cuts))


def _errors(weight: Tensor, values: Tensor, gram: Gram | None) -> list[float]:
    """``‖E‖²``, ``‖W‖²``, ``tr(E H Eᵀ)``, ``tr(W H Wᵀ)`` of some rows."""
    error = weight - values
    sums = [float(error.double().square().sum()), float(weight.double().square().sum())]
    if gram is None:
        return [*sums, 0.0, 0.0]
    return [*sums, *(output_energy(m, gram.matrix) for m in (error, weight))]
