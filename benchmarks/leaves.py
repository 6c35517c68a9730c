"""What each leaf codec loses on a unit Gaussian, and how far that is from Shannon's bound.

Every bit that is stored counts: codes, scales, tables. ``gap`` is the rate wasted, ``R + 0.5 log2(MSE)`` bits a weight
(0 at the bound); a tenth of a bit is 15 % of error. Weights are rounded by themselves, since independent weights leave
error feedback nothing to do.

    python benchmarks/leaves.py [--rows 768] [--columns 1152] [--only trellis] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

from tersor.codecs import parse
from tersor.contracts import Gram
from tersor.solvers import Encoder, ErrorFeedback, Nearest

TEXTS = (
    *(f"int{bits}:g64:s8" for bits in (1, 2, 3, 4, 5, 6, 8)),
    *(f"int{bits}:g32:asym:s8" for bits in (2, 3, 4)),
    *(f"int{bits}:row" for bits in (2, 3, 4)),
    *(f"lut{bits}:row" for bits in (2, 3, 4)),
    "fp4:e2m1:g32:s8",
    "fp6:e2m3:g64:s8",
    "fp8:e4m3:row",
    "bin:row",
    "bin:g64",
    "bin2:g64",
    "fdb:g64",
    "ternary:row",
    "ternary:g64",
    "vq8x4",
    "vq12x6",
    "e8p:row",
    "pvq1:n16",
    "pvq2:n16",
    "pvq3:n16",
    *(f"trellis{bits}:L{window}" for bits in (1, 2, 3, 4) for window in (8, 10, 12, 14)),
    *(f"ectcq{rate}:t8" for rate in (0.75, 1, 1.5, 2, 2.5, 3, 4)),
    *(f"ectcq{rate}:t64" for rate in (1, 2, 3, 4)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=1152)
    parser.add_argument("--only", default="", help="only codecs whose text begins with this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "leaves.json")
    options = parser.parse_args()
    shape = (options.rows, options.columns)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    white = Gram(torch.eye(options.columns), 1)
    found = []
    sys.stdout.write(f"{'codec':20} {'bits':>7} {'MSE':>9} {'Shannon':>9} {'gap':>6} {'Mweights/s':>11}\n")
    for text in TEXTS:
        if not text.startswith(options.only):
            continue
        codec = parse(text)
        solver = ErrorFeedback() if text.startswith("ectcq") else Nearest()
        began = time.perf_counter()
        tensors, values = Encoder(solver)(weight, codec, white)
        seconds = time.perf_counter() - began
        assert codec.bits(shape) == 8 * sum(tensor.nbytes for tensor in tensors.values())
        error = (weight - values).square().double()
        mse, rate = float(error.mean()), codec.bits(shape) / weight.numel()
        spread = float(error.mean(1).std()) / math.sqrt(options.rows)
        row = {
            "codec": str(codec),
            "bits": rate,
            "mse": mse,
            "mse_error": spread,
            "gap": rate + 0.5 * math.log2(mse),
            "weights_per_second": weight.numel() / seconds,
        }
        found.append(row)
        speed = 1e-6 * weight.numel() / seconds
        sys.stdout.write(f"{text:20} {rate:7.4f} {mse:9.5f} {4.0**-rate:9.5f} {row['gap']:6.3f} {speed:11.2f}\n")
        sys.stdout.flush()
    if not options.only:
        options.out.write_text(
            json.dumps({"shape": shape, "torch": torch.__version__, "codecs": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
