"""Stage: how much each layer's error matters, from one backward pass through the streamed model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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

PART_TOKENS = 2**15
"""Tokens whose hidden states lie on disk at one time, for all blocks; longer texts are gone through in parts."""
STAGE = "sensitivity"
_DONE = "sensitivity/done.json"


@dataclass(frozen=True)
class Part:
    """Text that is gone through at one time, and where what is found of it lies in the work folder.

    ``seed``: of the labels that are drawn. Steps of progress: ``begun`` before it, ``total`` in all.
    """

    name: str
    seed: int
    begun: int
    total: int

    def file(self, name: str) -> str:
        return f"{self.name}/{name}.safetensors"

    def store(self, context: Context, name: str, ids: Tensor, dtype: torch.dtype) -> Hidden:
        """Hidden states, or gradients, called ``name``, for tokens ``ids (n, T)``."""
        shape = (*ids.shape, context.width)
        return context.work.hidden(f"{self.name.replace('/', '-')}-{name}", shape, dtype, context.chunk)


def _part_name(number: int) -> str:
    return f"{STAGE}/{number}"


def text_parts(sequences: int, length: int, chunk: int) -> list[slice]:
    """``sequences`` of ``length`` tokens in parts of at most :data:`PART_TOKENS`, in whole chunks of ``chunk``."""
    step = chunk * max(1, PART_TOKENS // (chunk * length))
    return [slice(start, min(start + step, sequences)) for start in range(0, sequences, step)]


def measure_sensitivity(context: Context, ids: Tensor) -> None:
    """Backward pass over ``ids (n, T)``; leaves files of moments in the work folder, for every part of the text.

    Forward through the blocks keeping each one's inputs on disk, labels sampled at the head, then back block by block.
    Every finished block is kept if the run is killed.
    """
    if context.work.has(_DONE):
        return
    pieces = text_parts(ids.shape[0], ids.shape[1], context.chunk)
    each = 2 * len(context.anatomy.blocks) + 2
    total = each * len(pieces)
    stream = context.stream()
    try:
        for number, piece in enumerate(pieces):
            part = Part(_part_name(number), context.options.seed + 7_919 * number, number * each, total)
            if not context.work.has(part.file("embedding")):
                _measure_part(context, stream, part, ids[piece])
    finally:
        stream.close()
    context.work.save(_DONE, {"tokens": ids.numel(), "parts": len(pieces)})
    context.progress(STAGE, total, total)


def _measure_part(context: Context, stream: BlockStream, part: Part, ids: Tensor) -> None:
    """One part of the text, there and back."""
    blocks = len(context.anatomy.blocks)
    stores = forward_states(context, stream, part, ids)
    gradient = gradient_from_head(context, stream, part, stores[blocks], ids)
    for block in reversed(range(blocks)):
        gradient = _back(context, stream, part, block, ids, gradient)
        context.progress(STAGE, part.begun + 2 * blocks + 1 - block, part.total)
    _embedding(context, stream, part, ids, gradient)
    for store in (*stores, gradient):
        store.remove()


def load_moments(context: Context, block: int | None) -> OutputMoments:
    """The output-gradient moments of a block's layers (None: of head), as stored by :func:`measure_sensitivity`."""
    name = "head" if block is None else f"block-{block}"
    done = context.work.load(_DONE)
    total = OutputMoments(positions=done["tokens"])
    for part in range(done["parts"]):
        moments = OutputMoments()
        for key, value in context.work.load_tensors(f"{_part_name(part)}/{name}.safetensors").items():
            layer, copy = key.rsplit("#", 1)
            if copy == "energy":
                moments.energies[layer] = [value]
                continue
            moments.sums[layer, int(copy)] = value[:-1]
            moments.tokens[layer, int(copy)] = int(value[-1])
        total.add(moments)
    return total


def layer_energies(moments: OutputMoments, shape: tuple[int, int], chunk: int) -> list[dict[str, Tensor]]:
    """By chunk of ``chunk`` sequences and by layer, ``Σ_rows g²`` of every token, ``(tokens,)`` float32.

    ``shape``: sequences of the text, and tokens in each. Only of layers that every token goes through once: experts
    have none.
    """
    sequences, length = shape
    whole = {name: torch.cat(pieces) for name, pieces in moments.energies.items()}
    whole = {name: energy for name, energy in whole.items() if len(energy) == sequences * length and energy.any()}
    edges = [(start, min(start + chunk, sequences)) for start in range(0, sequences, chunk)]
    return [{name: one[start * length : stop * length] for name, one in whole.items()} for start, stop in edges]


def input_energies(energies: Iterable[Mapping[str, Tensor]], layers: Iterable[Layer]) -> list[dict[str, Tensor]]:
    """By chunk and input what :func:`layer_energies` gave, summed over the ``layers`` that read it."""
    readers: dict[str, list[str]] = {}
    for layer in layers:
        readers.setdefault(layer.inputs, []).append(layer.name)
    return [
        {
            inputs: torch.stack([found[name] for name in names]).sum(0)
            for inputs, names in readers.items()
            if all(name in found for name in names)
        }
        for found in energies
    ]


def load_embedding(context: Context) -> dict[str, Tensor]:
    """Of the gradient at the embedding's rows, per token of text: ``moment (in,)`` and ``energies (vocabulary,)``."""
    done = context.work.load(_DONE)
    parts = [context.work.load_tensors(f"{_part_name(part)}/embedding.safetensors") for part in range(done["parts"])]
    return {name: torch.stack([part[name] for part in parts]).sum(0) / done["tokens"] for name in parts[0]}


def _save_moments(context: Context, part: Part, name: str, moments: OutputMoments) -> None:
    # The count rides behind the sums; both are float32, exact for counts below 2^24.
    tensors = {
        f"{layer}#{copy}": torch.cat([value, torch.tensor([float(moments.tokens[layer, copy])])])
        for (layer, copy), value in moments.sums.items()
    }
    tensors.update({f"{layer}#energy": torch.cat(pieces) for layer, pieces in moments.energies.items()})
    context.work.save_tensors(part.file(name), tensors or {"none#0": torch.zeros(2)})


def forward_states(context: Context, stream: BlockStream, part: Part, ids: Tensor) -> list[Hidden]:
    """Inputs of every block, and of the head, on disk."""
    blocks = len(context.anatomy.blocks)
    stores = [part.store(context, f"{k}", ids, context.dtype) for k in range(blocks + 1)]
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
        context.progress(STAGE, part.begun + block + 1, part.total)
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


def gradient_from_head(context: Context, stream: BlockStream, part: Part, inputs: Hidden, ids: Tensor) -> Hidden:
    """Gradients at what comes out of the last block, on disk; the head's own moments are kept."""
    blocks = len(context.anatomy.blocks)
    gradient = part.store(context, f"gradient-{blocks}", ids, torch.float32)
    if context.work.has(part.file("head")):
        return gradient
    layers = [layer for layer in context.anatomy.layers if layer.name == context.anatomy.head]
    with stream.head_module() as module:
        weights = {layer: module.get_parameter(head_parameter(layer)) for layer in layers}
        moments = backward_head(
            stream.head,
            inputs.read,
            inputs.chunks,
            weights,
            seed=part.seed,
            workers=context.workers,
            keep=gradient.write,
        )
    gradient.finish()
    _save_moments(context, part, "head", moments)
    return gradient


def head_parameter(layer: Layer) -> str:
    """The parameter through which the head multiplies: its own, or the one tied to the embedding's."""
    return layer.tied[0] if layer.tied else layer.parameter


def _back(context: Context, stream: BlockStream, part: Part, block: int, ids: Tensor, arriving: Hidden) -> Hidden:
    inputs = part.store(context, f"{block}", ids, context.dtype)
    leaving = part.store(context, f"gradient-{block}", ids, torch.float32)
    if context.work.has(part.file(f"block-{block}")):
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
    _save_moments(context, part, f"block-{block}", moments)
    give_back()
    context.work.event(STAGE, "block done", block=block, way="backward")
    arriving.remove()
    return leaving


def _embedding(context: Context, stream: BlockStream, part: Part, ids: Tensor, gradient: Hidden) -> None:
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
    found = {"moment": moment.float(), "energies": energies.float()}
    context.work.save_tensors(part.file("embedding"), found)
