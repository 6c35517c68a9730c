"""Make ``src/tersor/codecs/trellis_tables.py``: the window maps and value tables of the trellis codecs.

    python benchmarks/train_trellis.py [--bits 3 4] [--print]

Deterministic, table by table, for one version of torch. For each rate and window, many window maps are drawn. Each
gets a short LBG run (Viterbi search, then centroids) on unit Gaussian tiles, and the best ones a long run; the table of
the best is then rounded to int8 and settled by a few more rounds. The NumPy decoder's copy of the tables is written
too. Tables that artifacts have been written with must never change: new ones need a new name of the codec.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from pathlib import Path

import torch
from torch import Tensor

from tersor.codecs.trellis_tables import TABLES
from tersor.kernels.reference_trellis import window_map
from tersor.kernels.trellis import trellis_search

TILE = 256
CONTEXT = 128
FINALISTS = 6
# (bits, window): bits of the index into the table, maps drawn.
PLANS = {
    (1, 8): (5, 400), (1, 10): (6, 200), (1, 12): (6, 400), (1, 14): (6, 40), (1, 16): (6, 8),
    (2, 8): (5, 600), (2, 10): (6, 300), (2, 12): (6, 500), (2, 14): (6, 40), (2, 16): (6, 8),
    (3, 8): (7, 600), (3, 10): (7, 300), (3, 12): (7, 160), (3, 14): (7, 30),
    (4, 8): (8, 400), (4, 10): (8, 300), (4, 12): (8, 160), (4, 14): (8, 30),
}  # fmt: skip
# Root mean square of the first table. LBG hardly moves the tails, and high rates want them long.
FIRST = {1: 0.86, 2: 0.965, 3: 1.08, 4: 1.13}


def gaussian(columns: int, generator: torch.Generator) -> Tensor:
    """Tiles of unit power: the sample's own power would hide differences between codes."""
    x = torch.randn(TILE, columns, generator=generator)
    return x / x.square().mean().sqrt()


def draw(bits: int, window: int, index: int, rng: random.Random) -> tuple[int, ...]:
    """A window map of full rank.

    The first rows add one of the newest bits to one of the oldest, so that neither successors nor merging paths are
    ever close, and to random bits of the middle; the others add random bits of the middle, or of the whole window where
    the middle is too short.
    """
    middle = window - 2 * bits
    short = middle < index - bits

    def some() -> int:
        return rng.randrange(1 << middle) << bits

    while True:
        crossed = rng.random() < 0.5
        masks = []
        for bit in reversed(range(bits)):
            old = window - 1 - bit if crossed else window - bits + bit
            masks.append((1 << bit) ^ (1 << old) ^ some())
        masks += [rng.randrange(1 << window) if short else some() for _ in range(index - bits)]
        if rank(masks) == index:
            return tuple(masks)


def neighbour(masks: tuple[int, ...], bits: int, window: int, rng: random.Random) -> tuple[int, ...]:
    """The same window map but for one bit of the middle."""
    while window > 2 * bits:
        changed = list(masks)
        changed[rng.randrange(len(masks))] ^= 1 << rng.randrange(bits, window - bits)
        if rank(changed) == len(masks):
            return tuple(changed)
    return masks


def rank(masks: list[int]) -> int:
    rest, found = list(masks), 0
    while rest:
        pivot = rest.pop()
        if pivot:
            found += 1
            rest = [mask ^ pivot if mask & pivot & -pivot else mask for mask in rest]
    return found


class Trainer:
    """LBG for one rate and window."""

    def __init__(self, bits: int, window: int) -> None:
        self.bits, self.window = bits, window

    def indices(self, x: Tensor, table: Tensor, index: Tensor) -> Tensor:
        path = trellis_search(
            x, torch.ones(len(x)), table[index], bits=self.bits, window=self.window, tile=TILE, context=CONTEXT
        )
        return index[path.long()]

    def centroids(self, x: Tensor, table: Tensor, index: Tensor) -> Tensor:
        found = self.indices(x, table, index).flatten()
        count = torch.bincount(found, minlength=len(table)).double()
        total = torch.zeros(len(table), dtype=torch.float64).index_add_(0, found, x.flatten().double())
        return torch.where(count > 0, total / count.clamp(min=1), table.double()).float()

    def error(self, x: Tensor, table: Tensor, index: Tensor) -> float:
        return float((x - table[self.indices(x, table, index)]).square().mean())

    def fit(
        self, x: Tensor, table: Tensor, masks: tuple[int, ...], rounds: int
    ) -> tuple[float, tuple[int, ...], Tensor]:
        index = window_map(masks, self.window)
        for _ in range(rounds):
            table = self.centroids(x, table, index)
        return self.error(x, table, index), masks, table

    def run(self, index_bits: int, drawn: int) -> tuple[tuple[int, ...], int, tuple[int, ...], float]:
        generator = torch.Generator().manual_seed(1000 * self.window + self.bits)
        rng = random.Random(1000 * self.window + self.bits)
        few, many = gaussian(40 if self.window < 16 else 16, generator), gaussian(400, generator)
        if self.window >= 14:
            many = many[:, : 160 if self.window == 14 else 60]
        quantiles = (torch.arange(2**index_bits) + 0.5) / 2**index_bits
        start = torch.special.ndtri(quantiles) * FIRST[self.bits]
        tried: list[tuple[float, tuple[int, ...], Tensor]] = []
        for count in range(drawn):
            # The later half are neighbours of the best so far.
            masks = draw(self.bits, self.window, index_bits, rng)
            if count > drawn // 2:
                masks = neighbour(rng.choice(tried[:4])[1], self.bits, self.window, rng)
            tried.append(self.fit(few, start, masks, 3))
            tried.sort(key=lambda one: one[0])
        # A small sample's best is partly luck: the first few are compared on a larger one.
        finals = [self.fit(many, table, masks, 5) for _, masks, table in tried[:FINALISTS]]
        _, masks, table = min(finals, key=lambda one: one[0])
        _, _, table = self.fit(many, table, masks, 6)
        index = window_map(masks, self.window)
        # In units of 1 / 4096, so that integer times unit is exact in float32.
        unit = -(-float(table.abs().max()) * 4096 // 127)
        for _ in range(3):
            table = self.centroids(many, table, index)
            table = (table * 4096 / unit).round().clamp(-127, 127) * (unit / 4096)
        integers = tuple(int(value) for value in (table * 4096 / unit).round().tolist())
        return masks, int(unit), integers, self.error(many, table, index)


def literal(tables: dict[tuple[int, int], tuple[tuple[int, ...], int, tuple[int, ...]]]) -> str:
    lines = ["TABLES: dict[tuple[int, int], tuple[tuple[int, ...], int, tuple[int, ...]]] = {"]
    for key, (masks, unit, integers) in tables.items():
        lines += [f"    {key}: (", f"        {masks}, {unit}, ("]
        line = "           "
        for value in integers:
            if len(line) + len(str(value)) + 2 > 119:
                lines.append(line)
                line = "           "
            line += f" {value},"
        lines += [line, "        ),", "    ),"]
    return "\n".join([*lines, "}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tables of the trellis codecs.")
    parser.add_argument("--print", action="store_true", help="print the errors and write nothing")
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4], help="train these, keep the other tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables: dict[tuple[int, int], tuple[tuple[int, ...], int, tuple[int, ...]]] = {}
    for (bits, window), (index_bits, drawn) in PLANS.items():
        if bits not in options.bits:
            tables[bits, window] = TABLES[bits, window]
            continue
        began = time.monotonic()
        masks, unit, integers, error = Trainer(bits, window).run(index_bits, drawn)
        tables[bits, window] = (masks, unit, integers)
        print(f"trellis{bits}:L{window}  MSE {error:.5f} in training, {time.monotonic() - began:.0f} s", flush=True)
    if options.print:
        return
    source = Path(__file__).resolve().parent.parent / "src" / "tersor"
    for path in (source / "codecs" / "trellis_tables.py", source / "artifact" / "decoder_numpy_trellis.py"):
        text = path.read_text()
        new = re.sub(r"TABLES: dict.*?\n}\n", lambda _: literal(tables), text, count=1, flags=re.DOTALL)
        path.write_text(new)


if __name__ == "__main__":
    main()
