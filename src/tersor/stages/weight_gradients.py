"""Stage: how steep the loss is in every single weight, for methods that choose or price weights one by one."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tersor.stages.context import Context, block_weights, oriented
from tersor.stages.memory import give_back
from tersor.stages.sensitivity import STAGE, forward_states, gradient_from_head
from tersor.statistics.sensitivity import weight_energies

_DONE = "gradients/done.json"
_PASS = "weight-gradients"


def measure_weight_gradients(context: Context, ids: Tensor) -> None:
    """Mean square over the sequences of ``ids (n, T)`` of the gradient of a sequence's summed log-likelihood.

    Next tokens are drawn from the model. Kept in the work folder, a file for each block, in bfloat16; every finished
    block is kept if the run is killed.
    """
    if context.work.has(_DONE):
        return
    blocks = len(context.anatomy.blocks)
    total = 2 * blocks + 1
    stream = context.stream()
    try:
        stores = forward_states(context, stream, _PASS, ids, total)
        arriving = gradient_from_head(context, stream, _PASS, stores[blocks], ids)
        for block in reversed(range(blocks)):
            leaving = context.work.hidden(f"gradients-{block}", stores[block].shape, torch.float32, context.chunk)
            if not context.work.has(f"gradients/{block}.safetensors"):
                with stream.block(block) as module:
                    sums = weight_energies(
                        partial(stream.run, module, block),
                        stores[block].read,
                        arriving.read,
                        stores[block].chunks,
                        block_weights(context, module, block),
                        workers=context.workers,
                        keep=leaving.write,
                    )
                leaving.finish()
                named = {
                    f"{layer.name}#{copy}": (value / len(ids)).to(torch.bfloat16)
                    for layer, energy in sums.items()
                    for copy, value in enumerate(oriented(energy, layer))
                }
                context.work.save_tensors(f"gradients/{block}.safetensors", named)
                arriving.remove()
                give_back()
            arriving = leaving
            context.progress(STAGE, total - block, total)
    finally:
        stream.close()
    context.work.save(_DONE, {"sequences": len(ids)})
    for store in (*stores, arriving):
        store.remove()


def load_weight_gradients(context: Context, block: int) -> dict[str, Tensor]:
    """Those of a block's layers, ``(out, in)`` float32 by ``<layer>#<copy>``."""
    return {name: value.float() for name, value in context.work.load_tensors(f"gradients/{block}.safetensors").items()}
