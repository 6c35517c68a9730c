"""What each trellis code loses on a unit Gaussian, and how fast it is searched, on one core.

    python benchmarks/trellis.py [--columns 256] [--context 96] [trellis2:L12 ...]

Tiles of 256 rows as rings, as layers have them; scales are not counted. The sample is brought to unit power, which
takes out most of its own error; the standard error that is left is printed. The gap is the rate above Shannon's bound
for the same mean squared error. Speed is processor time, all searches of a ring included.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

from tersor.codecs import Trellis, parse, trellis
from tersor.kernels.trellis import trellis_search


def measure(codec: Trellis, columns: int, context: int) -> str:
    bits, window = codec.bits_per_code, codec.window
    weight = torch.randn(256, columns, generator=torch.Generator().manual_seed(7))
    weight /= weight.square().mean().sqrt()
    ones = torch.ones(256)
    table = trellis.table_of(bits, window)
    began = time.process_time()
    path = trellis_search(weight, ones, table, bits=bits, window=window, tile=256, context=context, turns=codec.turns)
    seconds = time.process_time() - began
    squares = (weight - table[path.long()]).square().mean(0).double()
    error = float(squares.mean())
    deviation = float(squares.std()) / math.sqrt(columns)
    gap = bits + 0.5 * math.log2(error)
    return (
        f"{codec!s:14} MSE {error:.5f} ± {deviation:.5f}   gap {gap:.3f} bit   "
        f"{weight.numel() / seconds / 1e6:7.3f} M weights/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the trellis codes on a unit Gaussian.")
    parser.add_argument("codecs", nargs="*", help="default: all")
    parser.add_argument("--columns", type=int, default=256, help="sequences of 256 (windows above 12 bits: a quarter)")
    parser.add_argument("--context", type=int, default=trellis.CONTEXT, help="rows to either side of the seam")
    options = parser.parse_args()
    torch.set_num_threads(1)
    every = [str(Trellis(bits, window)) for bits, windows in trellis.WINDOWS.items() for window in windows]
    for text in options.codecs or every:
        codec = parse(text)
        assert isinstance(codec, Trellis)
        columns = options.columns if codec.window <= 12 else options.columns // 4
        print(measure(codec, columns, options.context), flush=True)


if __name__ == "__main__":
    main()
