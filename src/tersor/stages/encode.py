"""Stage: every layer encoded with the codec its plan names, block by block, into the artifact's files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersor.artifact import ArtifactWriter
from tersor.codecs.dense import Dense
from tersor.contracts import Codec, Gram, Layer
from tersor.errors import NotFinite
from tersor.parallel import in_order
from tersor.recovery import BlockTuning
from tersor.runtime.stream import BlockStream
from tersor.solvers import Encoder
from tersor.stages.context import Context, as_parameter, block_weights, oriented, row_pieces
from tersor.stages.curves import OUTSIDE, outside_objectives
from tersor.stages.encode_layers import Coded, Order, Ready, encode_layers, errors_of, summary
from tersor.stages.memory import give_back
from tersor.stages.sensitivity import advance, text_weights
from tersor.stages.tune import BlockTuner, Piece
from tersor.stages.work import Hidden
from tersor.statistics.collect import Grams, collect_grams

STAGE = "encode"

TUNING = BlockTuning(steps=32, batch=1024, rate=0.02, checks=2, sample=8192)
"""How blocks are tuned; docs/LOG.md says what other settings gave."""


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
        record = coded[piece.layer].record | summary(errors_of(piece.weight, piece.values, piece.gram))
        record["tuned"] = [found.before, found.after]
        coded[piece.layer] = replace(coded[piece.layer], parts=dict(piece.tensors), record=record)
    return list(coded.items())


def _ready(context: Context, gram: Gram | None, name: str) -> Ready:
    note = f"No calibration token reached {name}: rounded to nearest." if gram is None else ""
    return Ready(Encoder(context.solver(), workers=context.workers), gram, note)


def _encode_layers(
    context: Context, weights: Mapping[Layer, Tensor], sums: Grams, codecs: Mapping[str, Codec]
) -> Iterator[tuple[Layer, Coded]]:
    """Encode layers of a block; those that read the same input come one after the other and share a factor.

    The group with most weights comes first: while it is encoded there is time to factor what is next, which is often
    the widest Gram matrix.
    """
    give_back()
    groups: dict[str, list[Layer]] = {}
    for layer in weights:
        groups.setdefault(layer.inputs, []).append(layer)

    def orders(layers: list[Layer]) -> list[Order]:
        first = layers[0]
        ready = [_ready(context, sums.gram(first, copy), first.name) for copy in range(first.copies)]
        return [
            Order(layer, codecs[layer.name], partial(_source_weight, context, layer, weights[layer]), ready)
            for layer in layers
        ]

    largest_first = sorted(groups.values(), key=lambda layers: -sum(layer.parameters for layer in layers))
    return encode_layers(map(orders, largest_first), context.workers)


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
    for _, coded in encode_layers([[Order(layer, codec, lambda: weight, [ready])]], context.workers):
        _write(layer, coded, writer)


def _write(layer: Layer, coded: Coded, writer: ArtifactWriter) -> None:
    named = {f"{layer.name}.{name}": tensor for name, tensor in coded.parts.items()}
    writer.write(layer.name, named, record=coded.record)
