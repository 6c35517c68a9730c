"""Stage: how much each layer's error matters, from one backward pass through the streamed model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tersor.contracts import Layer
from tersor.errors import NotFinite, UnknownArchitecture
from tersor.parallel import in_order
from tersor.runtime.stream import BlockStream
from tersor.stages.context import Context, block_weights
from tersor.stages.memory import give_back
from tersor.stages.options import EffortName
from tersor.stages.weights import is_finite
from tersor.stages.work import Hidden
from tersor.statistics.collect import OutputMoments
from tersor.statistics.sensitivity import backward_block, backward_head, embedding_gradient, token_energies

SEEN_TOKENS: dict[EffortName, int] = {"fast": 2**12, "normal": 2**13, "best": 2**14}
"""Tokens that the backward pass sees, by effort."""
_GUIDED = 0.2
"""Share of a Gram matrix in which tokens count by their gradients; docs/LOG.md ("Token weights") has others."""


def most_chunks(effort: EffortName, tokens: int) -> int:
    """How many chunks of ``tokens`` tokens the backward pass sees at most: two at the least, to fit and to judge."""
    return max(SEEN_TOKENS[effort] // tokens, 2)


def seen_chunks(context: Context, sequences: int, length: int) -> range:
    """Which chunks of a text of ``sequences`` of ``length`` tokens the backward pass sees.

    As many as :data:`SEEN_TOKENS` allows: half of them, where there are so many, of the held-out end that judges, the
    others right before it, which codes are fitted to.
    """
    chunks = -(-sequences // context.chunk)
    held = context.held_out(sequences)
    most = most_chunks(context.options.effort, context.chunk * length)
    judging = min(held, max(most // 2, most - (chunks - held)))
    fitting = min(chunks - held, most - judging)
    return range(chunks - held - fitting, chunks - held + judging)


STAGE = "sensitivity"
_DONE = "sensitivity/done.json"


def measure_sensitivity(context: Context, ids: Tensor) -> None:
    """Backward pass over :func:`seen_chunks` of ``ids (n, T)``; leaves a file of moments per block in the work folder.

    Forward through the blocks keeping each one's inputs on disk, labels sampled at the head, then back block by block.
    Every finished block is kept if the run is killed.
    """
    if context.work.has(_DONE):
        return
    seen = seen_chunks(context, ids.shape[0], ids.shape[1])
    ids = ids[seen.start * context.chunk : seen.stop * context.chunk]
    blocks = len(context.anatomy.blocks)
    total = 2 * blocks + 2
    stream = context.stream()
    try:
        stores = forward_states(context, stream, STAGE, ids, total)
        gradient = gradient_from_head(context, stream, STAGE, stores[blocks], ids)
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


def layer_energies(context: Context, moments: OutputMoments, sequences: int, length: int) -> list[dict[str, Tensor]]:
    """By chunk of a text and by layer, ``Σ_rows g²`` of every token, ``(tokens,)`` float32; none where it was not seen.

    Only of layers that every token goes through once: experts have none.
    """
    seen = seen_chunks(context, sequences, length)
    whole = {name: torch.cat(pieces) for name, pieces in moments.energies.items()}
    # Gradients beyond all bounds weigh nothing: what they come from is found, and named, where activations are summed.
    pieces = {
        name: energy.split(context.chunk * length)  # type: ignore[no-untyped-call]
        for name, energy in whole.items()
        if len(energy) == moments.positions and energy.any() and torch.isfinite(energy).all()
    }
    return [
        {name: found[chunk - seen.start] for name, found in pieces.items()} if chunk in seen else {}
        for chunk in range(-(-sequences // context.chunk))
    ]


def chunk_tokens(context: Context, sequences: int, length: int) -> list[int]:
    """How many tokens each chunk of a text has."""
    return [min(context.chunk, sequences - at) * length for at in range(0, sequences, context.chunk)]


def text_weights(
    context: Context, block: int, layers: Iterable[Layer], sequences: int, length: int
) -> list[dict[str, Tensor]]:
    """:func:`token_weights` of a whole text for a block's ``layers``, from what :func:`measure_sensitivity` left."""
    energies = layer_energies(context, load_moments(context, block), sequences, length)
    return token_weights(energies, chunk_tokens(context, sequences, length), layers)


def token_weights(
    energies: Sequence[Mapping[str, Tensor]], tokens: Sequence[int], layers: Iterable[Layer]
) -> list[dict[str, Tensor]]:
    """By chunk and input how much each token counts where codes are solved, ``(tokens,)`` float32, 1 in the mean.

    ``energies``: what :func:`layer_energies` gave for some chunks; ``tokens`` in each of them. Four fifths of
    the weight are alike for all, one fifth goes by the energies of all ``layers`` that read the input: it is few tokens
    that count for much more, so that it takes little text to know them, and the rest is all the text's. Inputs without
    energies have no weights.
    """
    readers: dict[str, list[str]] = {}
    for layer in layers:
        readers.setdefault(layer.inputs, []).append(layer.name)
    found: list[dict[str, Tensor]] = [{} for _ in energies]
    for inputs, names in readers.items():
        sums = {
            chunk: torch.stack([one[name] for name in names]).sum(0)
            for chunk, one in enumerate(energies)
            if all(name in one for name in names)
        }
        total = sum(float(one.sum()) for one in sums.values())
        for chunk, count in enumerate(tokens) if total > 0 else ():
            found[chunk][inputs] = torch.full((count,), 1 - _GUIDED)
            if chunk in sums:
                found[chunk][inputs] += sums[chunk] * (_GUIDED * sum(tokens) / total)
    return found


def _save_moments(context: Context, name: str, moments: OutputMoments) -> None:
    # The count rides behind the sums; both are float32, exact for counts below 2^24.
    tensors = {
        f"{layer}#{copy}": torch.cat([value, torch.tensor([float(moments.tokens[layer, copy])])])
        for (layer, copy), value in moments.sums.items()
    }
    tensors.update({f"{layer}#energy": torch.cat(pieces) for layer, pieces in moments.energies.items()})
    context.work.save_tensors(f"{name}.safetensors", tensors or {"none#0": torch.zeros(2)})


def _store(context: Context, folder: str, name: str, ids: Tensor, dtype: torch.dtype) -> Hidden:
    """Hidden states or gradients for ``ids (n, T)``; ``folder``: whose pass they are of."""
    return context.work.hidden(f"{folder}-{name}", (*ids.shape, context.width), dtype, context.chunk)


def forward_states(context: Context, stream: BlockStream, folder: str, ids: Tensor, total: int) -> list[Hidden]:
    """Inputs of every block, and of the head, on disk. ``folder``: of the work folder, for the pass they are of."""
    blocks = len(context.anatomy.blocks)
    stores = [_store(context, folder, f"{k}", ids, context.dtype) for k in range(blocks + 1)]
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


def gradient_from_head(context: Context, stream: BlockStream, folder: str, inputs: Hidden, ids: Tensor) -> Hidden:
    """Gradients at what comes out of the last block, on disk; the head's own moments are kept in ``folder``."""
    blocks = len(context.anatomy.blocks)
    gradient = _store(context, folder, f"gradient-{blocks}", ids, torch.float32)
    if context.work.has(f"{folder}/head.safetensors"):
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
    _save_moments(context, f"{folder}/head", moments)
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
    _save_moments(context, f"{STAGE}/block-{block}", moments)
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
