"""Stage: rate–distortion points from the weights alone, for a plan in seconds."""

from __future__ import annotations

import torch

from tersor.contracts import Gram
from tersor.errors import NotFinite
from tersor.parallel import in_order
from tersor.solvers import Encoder, Nearest
from tersor.stages.candidates import layer_candidates
from tersor.stages.context import Context, Record
from tersor.stages.curves import SAMPLE_ROWS, flat_objective
from tersor.stages.weights import is_finite
from tersor.statistics.curves import draw_sample, measure


def fast_curves(context: Context) -> dict[str, Record]:
    """Points of every layer, nearest rounding, each layer's relative error counted by its number of weights.

    The sum is no prediction of KL; it only ranks.
    """
    layers = context.anatomy.layers

    def work(index: int) -> Record:
        layer = layers[index]
        weight = context.weight(layer)[0]
        picks = torch.linspace(0, weight.shape[0] - 1, min(weight.shape[0], 4 * SAMPLE_ROWS)).long()
        part = weight[picks].float()
        if not is_finite(part):
            raise NotFinite(f"The weights of {layer.name} have NaN or Inf; the model is damaged: copy it again.")
        objective = flat_objective(layer, part, Gram(torch.eye(layer.shape[1]), 0))
        sample = draw_sample(part, objective, count=SAMPLE_ROWS, seed=context.options.seed)
        candidates = layer_candidates(context, layer)
        scale = layer.parameters / part.numel()
        encoder = Encoder(Nearest())
        found = measure(sample, objective, list(candidates.values()), lambda rows, codec: encoder(rows, codec, None)[1])
        return {"points": {text: scale * value for text, value in zip(candidates, found, strict=True)}, "notes": []}

    records = {}
    for layer, record in zip(layers, in_order(work, len(layers), context.workers), strict=True):
        records[layer.name] = record
        context.progress("weights", len(records), len(layers))
    return records
