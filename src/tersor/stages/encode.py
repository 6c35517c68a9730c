"""Stage: every layer encoded with the codec its plan names, block by block, into the artifact's files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tersor.artifact import ArtifactWriter
from tersor.contracts import Codec, Gram, Layer, LeafCodec, Solver
from tersor.errors import NotFinite, NotPositiveDefinite
from tersor.runtime.stream import BlockStream
from tersor.solvers import Nearest
from tersor.stages.context import ROW_CHUNK, Context, block_weights, oriented
from tersor.stages.curves import outside_objectives
from tersor.stages.memory import give_back
from tersor.stages.sensitivity import advance
from tersor.stages.work import Hidden
from tersor.statistics.collect import Grams, collect_grams, in_order
from tersor.statistics.curves import encode_rows

STAGE = "encode"


@dataclass(frozen=True)
class Prepared:
    """A solver ready for one Gram matrix. ``note``: what went another way than asked, or empty."""

    solver: Solver
    factor: Any
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
            _encode_block(context, stream, block, codecs, writer, stores)
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
            )
            _encode_layers(context, open_layers, sums, codecs, writer)
        if context.options.propagate:
            _replace_weights(context, module, block, codecs, writer)
            advance(context, stream, module, block, before, after)
        else:
            after.finish()
    give_back()
    context.work.event(STAGE, "block done", block=block)
    before.remove()


def _replace_weights(
    context: Context, module: nn.Module, block: int, codecs: Mapping[str, Codec], writer: ArtifactWriter
) -> None:
    """Put what was written in the place of the block's own weights."""
    with torch.no_grad():
        for layer, parameter in block_weights(context, module, block).items():
            parameter.copy_(_written_weight(context, layer, codecs[layer.name], writer))


def _written_weight(context: Context, layer: Layer, codec: Codec, writer: ArtifactWriter) -> Tensor:
    """A layer's weight as the artifact now holds it, in the parameter's own shape and the run's dtype."""
    rows, columns = layer.stored_shape
    stored = writer.read([f"{layer.name}.{part.name}" for part in codec.parts(layer.stored_shape)])
    parts = {name.rsplit(".", 1)[1]: tensor for name, tensor in stored.items()}

    def work(index: int) -> Tensor:
        here = slice(index * ROW_CHUNK, min((index + 1) * ROW_CHUNK, rows))
        return codec.decode_rows(parts, columns, here).to(context.dtype)

    weight = torch.cat(list(in_order(work, -(-rows // ROW_CHUNK), context.workers)))
    if layer.copies > 1:
        weight = weight.reshape(layer.copies, *layer.shape)
    return weight.transpose(-1, -2).contiguous() if layer.transposed else weight


def _prepare(context: Context, gram: Gram | None, name: str) -> Prepared:
    solver = context.solver()
    if gram is None:
        return Prepared(Nearest(), None, None, f"No calibration token reached {name}: rounded to nearest.")
    try:
        return Prepared(solver, solver.prepare(gram), gram)
    except NotPositiveDefinite as error:
        return Prepared(Nearest(), gram, gram, f"{name}: {error} It was rounded to nearest instead.")


def _encode_layers(
    context: Context,
    weights: Mapping[Layer, Tensor],
    sums: Grams,
    codecs: Mapping[str, Codec],
    writer: ArtifactWriter,
) -> None:
    """Encode a block's open layers; those that read the same input come one after the other and share a factor."""
    ready: dict[tuple[str, int], Prepared] = {}
    for layer in sorted(weights, key=lambda layer: layer.inputs):
        ready = {key: value for key, value in ready.items() if key[0] == layer.inputs}
        source = _source_weight(context, layer, weights[layer])
        keys = [(layer.inputs, copy) for copy in range(layer.copies)]
        for key in keys:
            if key not in ready:
                ready[key] = _prepare(context, sums.gram(layer, key[1]), layer.name)
        encode_layer(context, layer, source, codecs[layer.name], [ready[key] for key in keys], writer)


def _source_weight(context: Context, layer: Layer, held: Tensor) -> Tensor:
    """A layer's weight as the source has it; the running block may hold it more coarsely, in the run's dtype."""
    name = context.loader.provider(layer.parameter)
    if name is not None and context.loader.targets[name].dtype == held.dtype:
        return oriented(held, layer)
    return context.weight(layer)


def _encode_outside(context: Context, layer: Layer, codec: Codec, writer: ArtifactWriter) -> None:
    weight = context.weight(layer)
    gram = outside_objectives(context, layer, weight[0])[0]
    encode_layer(context, layer, weight, codec, [_prepare(context, gram, layer.name)], writer)


def encode_layer(
    context: Context, layer: Layer, weight: Tensor, codec: Codec, prepared: list[Prepared], writer: ArtifactWriter
) -> None:
    """Encode ``weight (copies, out, in)`` and write it, with what was measured on the way as the unit's record.

    Rows are taken in chunks of fixed size, each an independent piece of work.
    """
    if not torch.isfinite(weight).all():
        raise NotFinite(f"The weights of {layer.name} have NaN or Inf; the source model is damaged.")
    out = layer.shape[0]
    parts = {part.name: torch.empty(part.shape, dtype=part.dtype) for part in codec.parts(layer.stored_shape)}
    pieces = [
        (stretch, start, min(start + ROW_CHUNK, stop))
        for stretch in codec.stretches(layer.stored_shape[0])
        for first, stop in _within_copies(stretch.start, stretch.stop, out)
        for start in range(first, stop, ROW_CHUNK)
    ]
    flat = weight.reshape(layer.stored_shape)

    def work(index: int) -> tuple[dict[str, Tensor], list[float]]:
        stretch, start, stop = pieces[index]
        ready = prepared[start // out]
        tile = flat[start:stop].float().contiguous()
        leaf = isinstance(stretch.codec, LeafCodec)
        tensors, values = encode_rows(
            tile, stretch.codec, ready.solver if leaf else Nearest(), ready.factor if leaf else None
        )
        return tensors, _errors(tile, values, ready.gram)

    totals = [0.0] * 4
    for (stretch, start, stop), (tensors, errors) in zip(
        pieces, in_order(work, len(pieces), context.workers), strict=True
    ):
        for name, tensor in tensors.items():
            parts[stretch.prefix + name][start - stretch.start : stop - stretch.start] = tensor
        totals = [total + error for total, error in zip(totals, errors, strict=True)]
    record = {
        "relative_error": math.sqrt(totals[0] / totals[1]) if totals[1] > 0 else 0.0,
        "output_error": totals[2] / totals[3] if totals[3] > 0 else None,
        "notes": sorted({ready.note for ready in prepared if ready.note}),
    }
    writer.write(layer.name, {f"{layer.name}.{name}": tensor for name, tensor in parts.items()}, record=record)


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
    return [*sums, *(float(((m @ gram.matrix) * m).double().sum()) for m in (error, weight))]
