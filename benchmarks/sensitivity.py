"""Which sensitivity predicts best? Flat, Fisher from one backward pass, and measured KL one layer at a time.

Every layer by itself is encoded at about 3 bits, everything else untouched, and the KL of the whole model is measured
on a few hundred tokens: the truth that the other two try to predict. Then a plan is made from each of the three and
encoded at the same bytes. Uses the work folder of ``allocation.py``, whose statistics it shares.

    python benchmarks/sensitivity.py --model MODEL_FOLDER --text TEXT [--bpw 4] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from allocation import measure, prepare
from torch import Tensor, nn

from tersor import pipeline
from tersor.codecs import parse
from tersor.contracts import Gram, Layer, RatePoint
from tersor.evaluation.divergence import compare_logits
from tersor.parallel import in_order
from tersor.runtime.stream import BlockStream
from tersor.solvers import Encoder
from tersor.stages import curves as curve_stage
from tersor.stages.allocate import Costs, make_plan
from tersor.stages.context import Context, block_weights, oriented
from tersor.stages.sensitivity import load_moments
from tersor.statistics.collect import collect_grams
from tersor.statistics.sensitivity import Objective, linear_objective

PROBE = "int3:g32:s8"


def rounded(context: Context, weight: Tensor, gram: Gram) -> Tensor:
    """A weight ``(out, in)`` as the probe codec represents it, solved as for rate–distortion points."""
    return Encoder(context.sampler(), workers=context.workers)(weight.float(), parse(PROBE), gram)[1]


def finish_from(
    stream: BlockStream, modules: list[nn.Module], block: int, hidden: list[Tensor], workers: int
) -> list[Tensor]:
    """Logits of each piece of hidden states, run from ``block`` to the end."""

    def work(index: int) -> Tensor:
        with torch.no_grad():
            state = hidden[index]
            for k in range(block, len(modules)):
                state = stream.run(modules[k], k, state)
            return stream.head(state)[0, :-1]

    return list(in_order(work, len(hidden), workers))


def divergence(first: list[Tensor], second: list[Tensor], ids: Tensor) -> float:
    values = [compare_logits(a, b, ids[i, 1:]).kl.double() for i, (a, b) in enumerate(zip(first, second, strict=True))]
    return float(torch.cat(values).mean())


def probe_blocks(context: Context, ids: Tensor, calibration: Tensor) -> dict[str, dict[str, float]]:
    """For every linear layer: measured KL with it alone rounded, and what Fisher and flat objectives say of it."""
    stream = context.stream()
    found: dict[str, dict[str, float]] = {}
    with ExitStack() as stack, torch.no_grad():
        modules = [stack.enter_context(stream.block(k)) for k in range(len(context.anatomy.blocks))]
        stack.enter_context(stream.head_module())
        states = [stream.embed(ids[i : i + 1]) for i in range(len(ids))]
        fit = [stream.embed(calibration[i : i + 1]) for i in range(len(calibration))]
        truth = finish_from(stream, modules, 0, states, context.workers)
        for block, module in enumerate(modules):
            weights = block_weights(context, module, block)
            moments = load_moments(context, block)
            after: list[Tensor] = []
            sums = collect_grams(
                lambda i, module=module, block=block, fit=fit: stream.run(module, block, fit[i]),
                len(fit),
                weights,
                workers=context.workers,
                keep=lambda _, output, after=after: after.append(output),
            )
            for layer, parameter in weights.items():
                found[layer.name] = one_layer(
                    context, layer, parameter, sums.gram(layer), moments,
                    lambda block=block, states=states: divergence(
                        truth, finish_from(stream, modules, block, states, context.workers), ids
                    ),
                )  # fmt: skip
            fit = after
            states = [stream.run(module, block, state) for state in states]
            print(
                f"block {block}: " + ", ".join(f"{found[layer.name]['measured']:.4f}" for layer in weights), flush=True
            )
    stream.close()
    return found


def one_layer(
    context: Context, layer: Layer, parameter: Tensor, gram: Gram | None, moments: Any, kl: Any
) -> dict[str, float]:
    assert gram is not None
    weight = oriented(parameter, layer)[0].clone()
    changed = rounded(context, weight, gram)
    error = weight.float() - changed
    fisher = linear_objective(gram, moments, layer)
    flat: Objective = curve_stage.flat_objective(layer, weight, gram)
    before = parameter.detach().clone()
    parameter.copy_(changed.T if layer.transposed else changed)
    measured = kl()
    parameter.copy_(before)
    return {
        "measured": measured,
        "fisher": float(fisher.distortion(error).double().sum()),
        "flat": float(flat.distortion(error).double().sum()),
    }


def agreement(found: Mapping[str, Mapping[str, float]], name: str) -> dict[str, float]:
    """Correlation of logarithms with the measured KL, and the spread of the ratio (1.0 would be a factor e)."""
    truth = np.log([max(row["measured"], 1e-9) for row in found.values()])
    guess = np.log([max(row[name], 1e-30) for row in found.values()])
    difference = guess - truth
    return {
        "correlation": float(np.corrcoef(truth, guess)[0, 1]),
        "spread": float(difference.std()),
        "median_ratio": float(math.exp(np.median(difference))),
    }


def scaled(
    records: Mapping[str, Any], found: Mapping[str, Mapping[str, float]], name: str
) -> dict[str, dict[str, float]]:
    """Curves whose level at the probe is what ``name`` says; layers that were not probed keep their Fisher level."""
    points = {}
    for layer, record in records.items():
        factor = found[layer][name] / found[layer]["fisher"] if layer in found else 1.0
        points[layer] = {text: value * factor for text, value in record["points"].items()}
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bpw", type=float, default=4.0)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--evaluation", type=int, default=12)
    parser.add_argument("--probe-sequences", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/bench-allocation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sensitivity.json"))
    arguments = parser.parse_args()
    with pipeline.one_thread_each():
        context, texts = prepare(
            arguments.model, arguments.text, arguments.work, arguments.sequences, arguments.evaluation
        )
        kept = arguments.work / "probe.json"
        if not kept.exists():
            ids = texts.calibration.ids
            probe = probe_blocks(context, ids[-arguments.probe_sequences :], ids[:8])
            kept.write_text(json.dumps(probe, indent=1))
        found = json.loads(kept.read_text())
        summary: dict[str, Any] = {"probe": PROBE, "layers": len(found), "agreement": {}, "plans": {}}
        for name in ("fisher", "flat"):
            summary["agreement"][name] = agreement(found, name)
            print(name, summary["agreement"][name], flush=True)
        records = curve_stage.load_records(context)
        budget = int(arguments.bpw * context.anatomy.parameters / 8)
        costs = Costs(context.anatomy, budget)
        level = math.fsum(row["measured"] for row in found.values()) / math.fsum(row["flat"] for row in found.values())
        for row in found.values():
            row["flat"] *= level  # flat knows no level of its own; the embedding's curve needs one to compare with
        for name in ("fisher", "measured", "flat"):
            curves: dict[str, list[RatePoint]] = {
                layer.name: [
                    RatePoint(costs.layer(layer, parse(text)), value, text)
                    for text, value in scaled(records, found, name)[layer.name].items()
                ]
                for layer in context.anatomy.layers
            }
            plan = make_plan(context.anatomy, curves, budget, context.options)
            summary["plans"][name] = measure(context, texts, plan, arguments.work / "artifact")
            print(name, summary["plans"][name], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
