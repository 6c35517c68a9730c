"""How far stored layers of a real model are from the least rate that any code needs for the same output error.

Layers of every kind from early, middle and late blocks are encoded with error feedback, and for each is printed: all
bits that are stored per weight; ``D = tr(E H Eᵀ) / tr(W H Wᵀ)``, with ``H`` the Gram matrix of the layer's inputs; the
rate that reverse water-filling needs for that ``D``; and the excess of what is stored over it.

The bound is that of independent Gaussian weights of which each row has the energy that it has: water-filling over the
products of row energies and eigenvalues of ``H``, each product a source of its own. One energy for all rows would be a
higher rate, and flatter a code by what it saves where rows are unlike. Energies of columns are not taken into account.

The last column says, for the first rate, by how much the water-filling rate falls when the weights' own second moment
over rows is known too (its eigenvectors turned into those of ``H``): what a Karhunen-Loève basis for each layer could
gain at most, its matrix not counted, which takes 16 in / out bits a weight. Where rows are fewer than columns, or few
more, most of it is that any moment of few rows fits these.

    python benchmarks/limit.py --model MODEL_FOLDER --text TEXT [--quick] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from tersor import pipeline
from tersor.codecs import parse
from tersor.contracts import Gram
from tersor.solvers import Encoder, ErrorFeedback
from tersor.stages.context import Context, block_weights
from tersor.stages.options import Budget, Options
from tersor.stages.text import prepare_texts
from tersor.statistics.collect import collect_grams

CHOSEN = (
    ("q_proj", 0.04), ("k_proj", 0.5), ("v_proj", 0.96), ("o_proj", 0.5), ("gate_proj", 0.96), ("up_proj", 0.04),
    ("down_proj", 0.5), ("q_proj", 0.96),
)  # fmt: skip
"""Kinds of layers, and how deep they lie."""
QUICK = (0, 2, 3)
TEXTS = ("rot(ectcq{rate}:t{states})", "rot(trellis{rate}:L12)", "int{rate}:g64")


def collect(context: Context, ids: Tensor, quick: bool) -> list[tuple[str, Tensor, Gram]]:
    """Names, weights and Gram matrices of the chosen layers; the model is run up to the last of them."""
    blocks = len(context.anatomy.blocks)
    wanted = [CHOSEN[i] for i in QUICK] if quick else list(CHOSEN)
    places = [(min(round(depth * (blocks - 1)), blocks - 1), kind) for kind, depth in wanted]
    stream, found = context.stream(), []
    with torch.no_grad():
        states = [stream.embed(ids[i : i + context.chunk]) for i in range(0, len(ids), context.chunk)]
        for block in range(max(place for place, _ in places) + 1):
            layers = [
                layer
                for layer in context.anatomy.layers_of(block)
                if any(place == block and layer.name.endswith(kind) for place, kind in places)
            ]
            after: list[Tensor] = []
            with stream.block(block) as module:
                run = lambda i, module=module, block=block, states=states: stream.run(module, block, states[i])  # noqa: E731
                if layers:
                    weights = block_weights(context, module, block)
                    sums = collect_grams(
                        run,
                        len(states),
                        {layer: weights[layer] for layer in layers},
                        workers=context.workers,
                        keep=lambda _, output, after=after: after.append(output),
                    )
                    for layer in layers:
                        gram = sums.gram(layer)
                        assert gram is not None
                        found.append((layer.name, context.weight(layer)[0].float().contiguous(), gram))
                else:
                    after = [run(i) for i in range(len(states))]
            states = after
    stream.close()
    return found


def water_filling(energy: Tensor, distortion: float) -> float:
    """Bits a source that sources of these ``energy (n,)`` need for ``distortion`` in all; 0 beyond their sum."""
    order = energy.flatten().double().sort().values
    below = order.cumsum(0)
    left = torch.arange(len(order) - 1, -1, -1)
    first = int(torch.searchsorted(below + left * order, distortion))
    if first >= len(order):
        return 0.0
    level = (distortion - (float(below[first - 1]) if first else 0.0)) / (len(order) - first)
    return float((0.5 * torch.log2(order[first:] / level)).sum()) / len(order)


def bound(weight: Tensor, gram: Tensor, distortion: float, *, known: bool = False) -> float:
    """Bits a weight for ``distortion``; ``known``: the second moment of the weights over rows is known too."""
    row = weight.double().square().mean(1)
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp(min=0)
    if known:
        moment = (weight.double() / row.sqrt().clamp(min=1e-30)[:, None]).T
        moment = moment @ moment.T / len(weight)
        root = vectors * values.sqrt()
        values = torch.linalg.eigvalsh(root.T @ moment @ root).clamp(min=0)
    return water_filling(row[:, None] * values, distortion)


def measure(name: str, weight: Tensor, gram: Gram, text: str, first: bool) -> dict[str, object]:
    """One layer in one codec; printed and returned."""
    shape = (weight.shape[0], weight.shape[1])
    codec = parse(text)
    began = time.perf_counter()
    tensors, values = Encoder(ErrorFeedback())(weight, codec, gram)
    seconds = time.perf_counter() - began
    bits = 8 * sum(tensor.nbytes for tensor in tensors.values()) / weight.numel()
    matrix, error, whole = gram.matrix.double(), (weight - values).double(), weight.double()
    lost, energy = (float(((m @ matrix) * m).sum()) for m in (error, whole))
    least = bound(weight, gram.matrix, lost)
    row = {"layer": name, "shape": shape, "codec": text, "bits": bits, "distortion": lost / energy, "limit": least}
    row |= {"excess": bits - least, "seconds": seconds}
    gain = ""
    if first:
        row["gain_of_known_moment"] = least - bound(weight, gram.matrix, lost, known=True)
        gain = f"{row['gain_of_known_moment']:8.3f}"
    short = name.removeprefix("model.layers.")
    print(f"{short:22} {text:20} {bits:7.4f} {lost / energy:9.6f} {least:7.4f} {bits - least:7.4f} {gain}", flush=True)
    return row


def main() -> None:
    """Print a line for every layer, rate and codec, then the means; write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--rates", default="2,3,4")
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="three layers only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "limit.json")
    arguments = parser.parse_args()
    options = Options(
        Budget("bpw", 4.0), text=str(arguments.text), eval_text=str(arguments.text), sequences=arguments.sequences,
        eval_sequences=1, length=512, samples=0,
    )  # fmt: skip
    rows = []
    with pipeline.one_thread_each(), tempfile.TemporaryDirectory() as cache:
        context = pipeline.light_context(arguments.model, options)
        texts = prepare_texts(
            context.source, options, cache=Path(cache), workers=context.workers, progress=context.progress
        )
        layers = collect(context, texts.calibration.ids, arguments.quick)
        print(f"{'layer':22} {'codec':20} {'bits':>7} {'D':>9} {'limit':>7} {'excess':>7} {'known':>8}")
        for name, weight, gram in layers:
            for rate in arguments.rates.split(","):
                for template in TEXTS:
                    text = template.format(rate=rate, states=arguments.states)
                    first = template is TEXTS[0] and rate == arguments.rates.split(",")[0]
                    rows.append(measure(name, weight, gram, text, first))
    means = {}
    for text in dict.fromkeys(row["codec"] for row in rows):
        excess = [float(str(row["excess"])) for row in rows if row["codec"] == text]
        means[str(text)] = {"mean": sum(excess) / len(excess), "largest": max(excess), "layers": len(excess)}
        print(f"{text:43} excess: mean {sum(excess) / len(excess):.4f}, largest {max(excess):.4f} bits")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    summary = {"tokens": texts.calibration.tokens, "torch": torch.__version__, "excess": means, "layers": rows}
    arguments.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
