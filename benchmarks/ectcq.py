"""Entropy-coded trellis codecs on a unit Gaussian: error and distance to Shannon's limit at real stored sizes; speed.

    python benchmarks/ectcq.py [--size 1024] [--rates 0.75,1,2,3,4] [--states 1,8,64]

The gap is ``R + log2(MSE) / 2`` bits: with ``R`` everything that is stored, and with the stream alone. The path's speed
is that of the search for one path through every column; the others are all of encoding, five to ten such searches, and
of decoding. All in processor time, on one thread. Results are left in ``benchmarks/results/ectcq.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch

from tersor.codecs.ectcq import EntropyCodedTrellis
from tersor.codecs.ectcq_leaf import TrellisGrid
from tersor.solvers import Encoder, Nearest

RESULTS = Path(__file__).parent / "results" / "ectcq.json"


def main() -> None:
    """Print one line for each rate and number of states, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--rates", default="0.75,1,2,3,4")
    parser.add_argument("--states", default="1,8,64")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = (arguments.size, arguments.size)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    columns = torch.arange(arguments.size)
    print(f"{'codec':>14} {'MSE':>9} {'gap':>7} {'stream':>7} {'empty':>7}   million weights/s: path encode decode")
    rows = []
    for states in map(int, arguments.states.split(",")):
        for rate in map(float, arguments.rates.split(",")):
            codec = EntropyCodedTrellis(round(rate * 1000), states)
            begin = time.process_time()
            tensors, values = Encoder(Nearest())(weight, codec, None)
            encoded = time.process_time()
            codec.decode(tensors, shape)
            decoded = time.process_time()
            leaf = TrellisGrid(states, 2.0 - rate, codec.contexts(shape), 0.36)
            side = leaf.prepare(weight)
            started = time.process_time()
            leaf.round(weight, side, columns)
            searched = time.process_time()
            loss = float((weight - values).square().mean())
            stream = tensors["stream"]
            empty = 1 - (int(stream.nonzero().max()) + 1) / len(stream)
            gaps = [8 * size / weight.numel() + 0.5 * math.log2(loss) for size in (codec.bits(shape) // 8, len(stream))]
            speeds = [weight.numel() / 1e6 / t for t in (searched - started, encoded - begin, decoded - encoded)]
            print(
                f"{codec!s:>14} {loss:9.6f} {gaps[0]:7.4f} {gaps[1]:7.4f} {empty:7.4f}   "
                + " ".join(f"{speed:6.1f}" for speed in speeds),
                flush=True,
            )
            rows.append(
                {
                    "codec": str(codec),
                    "error": loss,
                    "gap": gaps[0],
                    "million_weights_per_second": dict(zip(("path", "encode", "decode"), speeds, strict=True)),
                }
            )
    RESULTS.write_text(json.dumps({"shape": shape, "threads": 1, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
