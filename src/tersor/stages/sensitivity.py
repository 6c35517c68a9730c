"""Stage: how much each layer's error matters, from one backward pass through the streamed model."""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.contracts import Layer
from tersor.errors import NotFinite, UnknownArchitecture
from tersor.parallel import in_order
from tersor.runtime.stream import BlockStream
from tersor.stages.context import Context, block_weights
from tersor.stages.memory import give_back
from tersor.stages.weights import is_finite
from tersor.stages.work import Hidden
from tersor.statistics.collect import OutputMoments
from tersor.statistics.sensitivity import backward_block, backward_head, embedding_gradient, token_energies

FISHER_SEQUENCES = 16
"""Sequences that the backward pass sees: enough for row moments to a few percent, at a tenth of the run's cost."""


def backward_from(sequences: int, chunk: int) -> int:
    """The first of ``sequences`` that the backward pass sees: the last ones, in whole chunks of ``chunk`` sequences.

    At most half of the text, so that most of what it sees was not used to fit codes.
    """
    chunks = -(-sequences // chunk)
    seen = max(1, min(FISHER_SEQUENCES // chunk, chunks // 2))
    return (chunks - seen) * chunk


STAGE = "sensitivity"
_DONE = "sensitivity/done.json"


def measure_sensitivity(context: Context, ids: Tensor) -> None:
    """Backward pass over the last sequences of ``ids (n, T)``; leaves a file of moments per block in the work folder.

    Forward through the blocks keeping each one's inputs on disk, labels sampled at the head, then back block by block.
    Every finished block is kept if the run is killed.
    """
    if context.work.has(_DONE):
        return
    ids = ids[backward_from(ids.shape[0], context.chunk) :]
    blocks = len(context.anatomy.blocks)
    total = 2 * blocks + 2
    stream = context.stream()
    try:
        stores = forward_states(context, stream, ids, total)
        gradient = gradient_from_head(context, stream, stores[blocks], ids)
        for block in reversed(range(blocks)):
            gradient = _back(context, stream, block, stores[block], gradient)
            context.progress(STAGE, total - block - 1, total)
        _embedding(context, stream, ids, gradient)
    finally:
        stream.close()
    context.work.save(_DONE, {"tokens": ids.numel()})
    for store in (*stores, gradient):
        store.remove()
    context.progress(STAGE, total, total)


def load_moments(context: Context, block: int | None) -> OutputMoments:
    """The output-gradient moments of a block's layers (None: of head), as stored by :func:`measure_sensitivity`."""
    name = "head" if block is None else f"block-{block}"
    moments = OutputMoments(positions=context.work.load(_DONE)["tokens"])
    for key, value in context.work.load_tensors(f"sensitivity/{name}.safetensors").items():
        layer, copy = key.rsplit("#", 1)
        if copy == "energy":
            moments.energies[layer] = [value]
            continue
        moments.sums[layer, int(copy)] = value[:-1]
        moments.tokens[layer, int(copy)] = int(value[-1])
    return moments


def _save_moments(context: Context, name: str, moments: OutputMoments) -> None:
    # The count rides behind the sums; both are float32, exact for counts below 2^24.
    tensors = {
        f"{layer}#{copy}": torch.cat([value, torch.tensor([float(moments.tokens[layer, copy])])])
        for (layer, copy), value in moments.sums.items()
    }
    tensors.update({f"{layer}#energy": torch.cat(pieces) for layer, pieces in moments.energies.items()})
    context.work.save_tensors(f"sensitivity/{name}.safetensors", tensors or {"none#0": torch.zeros(2)})


def new_store(context: Context, name: str, ids: Tensor, width: int, dtype: torch.dtype) -> Hidden:
    return context.work.hidden(f"sensitivity-{name}", (*ids.shape, width), dtype, context.chunk)


def forward_states(context: Context, stream: BlockStream, ids: Tensor, total: int) -> list[Hidden]:
    """Inputs of every block, and of the head, on disk."""
    blocks = len(context.anatomy.blocks)
    width = context.width
    stores = [new_store(context, f"{k}", ids, width, context.dtype) for k in range(blocks + 1)]
    if not stores[0].complete:
        with torch.no_grad():
            for chunk in range(stores[0].chunks):
                stores[0].write(chunk, stream.embed(ids[stores[0].sequences(chunk)]))
        stores[0].finish()
    for block in range(blocks):
        if stores[block + 1].complete:
            continue
        context.work.event(STAGE, "block begun", block=block, way="forward")
        with stream.block(block) as module:
            advance(context, stream, module, block, stores[block], stores[block + 1])
        give_back()
        context.work.event(STAGE, "block done", block=block, way="forward")
        context.progress(STAGE, block + 1, total)
    return stores


def advance(
    context: Context, stream: BlockStream, module: torch.nn.Module, block: int, before: Hidden, after: Hidden
) -> None:
    """Run all chunks of hidden states through a materialised block, from one store to the next."""

    def work(chunk: int) -> Tensor:
        with torch.no_grad():
            return stream.run(module, block, before.read(chunk))

    for chunk, hidden in enumerate(in_order(work, before.chunks, context.workers)):
        if not is_finite(hidden):
            raise NotFinite(
                f"Activations leaving {context.anatomy.blocks[block]} have NaN or Inf; check the source model, or run "
                f"with --dtype float32."
            )
        after.write(chunk, hidden)
    after.finish()


def gradient_from_head(context: Context, stream: BlockStream, inputs: Hidden, ids: Tensor) -> Hidden:
    blocks = len(context.anatomy.blocks)
    gradient = new_store(context, f"gradient-{blocks}", ids, inputs.shape[2], torch.float32)
    if context.work.has("sensitivity/head.safetensors"):
        return gradient
    layers = [layer for layer in context.anatomy.layers if layer.name == context.anatomy.head]
    with stream.head_module() as module:
        weights = {layer: module.get_parameter(head_parameter(layer)) for layer in layers}
        moments = backward_head(
            stream.head,
            inputs.read,
            inputs.chunks,
            weights,
            seed=context.options.seed,
            workers=context.workers,
            keep=gradient.write,
        )
    gradient.finish()
    _save_moments(context, "head", moments)
    return gradient


def head_parameter(layer: Layer) -> str:
    """The parameter through which the head multiplies: its own, or the one tied to the embedding's."""
    return layer.tied[0] if layer.tied else layer.parameter


def _back(context: Context, stream: BlockStream, block: int, inputs: Hidden, arriving: Hidden) -> Hidden:
    leaving = context.work.hidden(f"sensitivity-gradient-{block}", inputs.shape, torch.float32, context.chunk)
    if context.work.has(f"sensitivity/block-{block}.safetensors"):
        return leaving
    context.work.event(STAGE, "block begun", block=block, way="backward")
    with stream.block(block) as module:
        moments = backward_block(
            lambda hidden: stream.run(module, block, hidden),
            inputs.read,
            arriving.read,
            inputs.chunks,
            block_weights(context, module, block),
            workers=context.workers,
            keep=leaving.write,
        )
    leaving.finish()
    _save_moments(context, f"block-{block}", moments)
    give_back()
    context.work.event(STAGE, "block done", block=block, way="backward")
    arriving.remove()
    return leaving


def _embedding(context: Context, stream: BlockStream, ids: Tensor, gradient: Hidden) -> None:
    """Second moment of the gradient at the embedding's own rows, before whatever the model makes of them."""
    layer = next((layer for layer in context.anatomy.layers if layer.name == context.anatomy.embedding), None)
    moment = torch.zeros(1 if layer is None else layer.shape[1], dtype=torch.float64)
    energies = torch.zeros(1 if layer is None else layer.shape[0], dtype=torch.float64)
    with stream.embed_module() as module:
        for chunk in range(gradient.chunks if layer is not None else 0):
            assert layer is not None
            weight = module.get_parameter(layer.parameter)
            here = ids[gradient.sequences(chunk)]
            arriving = embedding_gradient(stream.embed, here, gradient.read(chunk), weight)
            if arriving is None:
                raise UnknownArchitecture(
                    f"{type(module).__name__} does not look its tokens up in {layer.parameter}, so the price of errors "
                    f"there cannot be measured; use --sensitivity flat."
                )
            moment += arriving.reshape(-1, arriving.shape[-1]).double().square().sum(0)
            energies += token_energies(here, arriving, layer.shape[0])
    found = {"moment": (moment / ids.numel()).float(), "energies": (energies / ids.numel()).float()}
    context.work.save_tensors("sensitivity/embedding.safetensors", found)
