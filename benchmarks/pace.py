"""How long does llama.cpp take for a product with a matrix of each type, when it writes a token?

Files are made of one reference model in which all matrices have one type but those of one kind (the head, gate and up
projections, down projections, ...), which have another; their codes are of random weights. llama.cpp's own program
generates from each of them and from the file without the other type in turn, and the difference of their times, the
median of neighbours, is what the other type takes longer. The kinds differ in how many weights, rows and products they
have for each other, so that a time for each of the three can be fitted, none below zero. What the type of the other
matrices takes itself follows less surely, from the times of both models in it alone.

    python benchmarks/pace.py --model FOLDER --wide WIDE_FOLDER [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import llama_cpp
from scipy.optimize import lsq_linear
from torch import Tensor

from engines import bench_program, typical
from tersor import pipeline
from tersor.anatomy import WeightLoader
from tersor.codecs import parse
from tersor.contracts import Anatomy, Layer
from tersor.engines.llama_cpp.engine import ENGINE
from tersor.errors import ShapeMismatch
from tersor.pipeline import examine
from tersor.solvers import Encoder, Nearest
from tersor.stages.options import Options

BASE_TYPE = "iq4_nl"
SHORT = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16", "fp16")
"""Types for rows of any multiple of 32."""
LONG_K, LONG_IQ = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"), ("iq4_xs", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")
LONG = (*LONG_K, *LONG_IQ, "tq1_0", "tq2_0")
"""Types for rows of a multiple of 256."""
NARROW_KINDS, WIDE_KINDS = ("head", "query and output", "gate and up", "down"), ("head", "gate and up", "down")
NEIGHBOURS = 3
"""Files between two runs of the one that they are compared with."""
FLOOR = 15.0
"""Microseconds that a measured time is off beyond what its repeats show: this form of the time is not exact."""


@dataclass(frozen=True)
class Seen:
    """What one kind of matrices takes longer in one type than in ``BASE_TYPE``: microseconds a token, with its error.

    With no ``text``: what the whole model takes in ``BASE_TYPE``.
    """

    model: str
    kind: str
    text: str
    weights: int
    rows: int
    products: int
    time: float
    error: float


def kind_of(layer: Layer, anatomy: Anatomy) -> str:
    last = layer.name.rsplit(".", 1)[-1]
    names = {"q_proj": "query and output", "o_proj": "query and output", "k_proj": "key and value"}
    names |= {"v_proj": "key and value", "gate_proj": "gate and up", "up_proj": "gate and up", "down_proj": "down"}
    return names.get(last, "head" if layer.name == anatomy.head else "embedding")


class Files:
    """Files of one model with random weights, of any types."""

    def __init__(self, model: Path, folder: Path) -> None:
        source, body, self.anatomy = examine(model, Options(None, engine="llama.cpp"))
        self._target = ENGINE.open(source, self.anatomy, None)
        self._loader = WeightLoader(source, body)
        self._folder = folder
        self._rows: dict[tuple[str, int], Tensor] = {}

    def write(self, text: str, kind: str) -> Path:
        """All in ``BASE_TYPE``, and layers of that kind in another."""
        layers = {layer.name: layer for layer in self.anatomy.layers}
        texts = {name: text if kind_of(layer, self.anatomy) == kind else BASE_TYPE for name, layer in layers.items()}

        def read(name: str) -> dict[str, Tensor] | Tensor:
            if name not in layers:
                return self._loader.load([name])[name].float()
            rows = self._some_rows(texts[name], layers[name].shape[1])
            count = layers[name].stored_shape[0]
            return {"rows": rows.repeat(-(-count // len(rows)), 1)[:count].contiguous()}

        path = self._folder / f"{kind.replace(' ', '-')}-{text}.gguf"
        self._target.write({name: parse(text) for name, text in texts.items()}, path, read)
        return path

    def _some_rows(self, text: str, width: int) -> Tensor:
        if (text, width) not in self._rows:
            weights = torch.randn(8, width, generator=torch.Generator().manual_seed(0)) * 0.02
            (rows,) = Encoder(Nearest())(weights, parse(text), None)[0].values()
            self._rows[text, width] = rows
        return self._rows[text, width]

    def size(self, kind: str = "") -> tuple[int, int, int]:
        """Weights, rows and products of all layers of that kind, or of all kinds; an embedding is no product."""
        kinds = [(kind_of(layer, self.anatomy), layer) for layer in self.anatomy.layers]
        found = [layer for own, layer in kinds if own == kind or (not kind and own != "embedding")]
        rows = sum(layer.stored_shape[0] for layer in found)
        return sum(layer.parameters for layer in found), rows, sum(layer.copies for layer in found)

    def takes(self, text: str, kind: str) -> bool:
        """Whether this type can hold layers of that kind."""
        try:
            for layer in self.anatomy.layers:
                if kind_of(layer, self.anatomy) == kind:
                    parse(text).bits(layer.stored_shape)
        except ShapeMismatch:
            return False
        return True


def token_time(program: Path, path: Path, threads: int) -> float:
    """Microseconds a token, the median of four runs of llama.cpp's benchmark."""
    command = [str(program), "-m", str(path), "-p", "0", "-n", "32", "-r", "4", "-o", "json", "-t", str(threads)]
    answer = subprocess.run([*command, "-ngl", "0"], check=True, capture_output=True, text=True).stdout
    return statistics.median(1e6 / speed for speed in json.loads(answer)[0]["samples_ts"])


def compare(program: Path, base: Path, files: dict[str, Path], given: argparse.Namespace) -> dict[str, list[float]]:
    """Of each file, times of its neighbours in ``BASE_TYPE`` subtracted: one difference a turn."""
    found: dict[str, list[float]] = {name: [] for name in files}
    names = list(files)
    for _ in range(given.turns):
        before = token_time(program, base, given.threads)
        for start in range(0, len(names), NEIGHBOURS):
            some = names[start : start + NEIGHBOURS]
            times = [token_time(program, files[name], given.threads) for name in some]
            after = token_time(program, base, given.threads)
            for name, time in zip(some, times, strict=True):
                found[name].append(time - (before + after) / 2)
            before = after
    return found


def measure(name: str, model: Path, kinds: tuple[str, ...], given: argparse.Namespace) -> Iterator[Seen]:
    """All types in all kinds of one model."""
    program = bench_program(llama_cpp(given.tools))
    with tempfile.TemporaryDirectory() as scratch:
        files = Files(model, Path(scratch))
        base = files.write(BASE_TYPE, "none")
        times = [token_time(program, base, given.threads) for _ in range(2 * given.turns)]
        yield Seen(name, "all", "", *files.size(), *typical(times))
        for kind in kinds:
            texts = [text for text in (*SHORT, *LONG) if files.takes(text, kind)]
            paths = {text: files.write(text, kind) for text in texts}
            for text, differences in compare(program, base, paths, given).items():
                one = Seen(name, kind, text, *files.size(kind), *typical(differences))
                print(f"{name}: {text} in {kind}: {one.time:.0f} ± {one.error:.0f} us longer", flush=True)
                yield one
            for path in paths.values():
                path.unlink()


def fit(seen: list[Seen]) -> dict[str, tuple[float, float, float]]:
    """Picoseconds a weight, nanoseconds a row and microseconds a product of every type, all at once.

    Where no type is named in what was seen, it is a whole file in ``BASE_TYPE``: that also takes what is no product,
    the same for both models.
    """
    texts = [BASE_TYPE, *dict.fromkeys(one.text for one in seen if one.text)]
    parts = np.zeros((len(seen), 3 * len(texts) + 1))
    for place, one in enumerate(seen):
        own = np.array((1e-6 * one.weights, 1e-3 * one.rows, one.products))
        if one.text:
            parts[place, :3] = -own
            start = 3 * texts.index(one.text)
            parts[place, start : start + 3] = own
        else:
            parts[place, :3], parts[place, -1] = own, 1.0
    trust = 1 / np.hypot([one.error for one in seen], FLOOR)
    found = lsq_linear(parts * trust[:, None], trust * [one.time for one in seen], bounds=(0, np.inf)).x
    return {text: tuple(float(figure) for figure in found[3 * i : 3 * i + 3]) for i, text in enumerate(texts)}


def table(result: dict[str, Any]) -> str:
    """Times of all types, and how well they give what was measured, as Markdown."""
    lines = ["# Times of a product in llama.cpp's types", ""]
    lines += [f"{result['processor']}, {result['threads']} threads, {result['turns']} turns.", ""]
    lines += ["| type | ps a weight | ns a row | µs a product | measured, and fitted: µs longer than in iq4_nl |"]
    lines += ["|---|---|---|---|---|"]
    base = result["pace"][BASE_TYPE]
    for text, own in result["pace"].items():
        pairs = []
        for one in result["seen"]:
            if one["text"] == text:
                more = [first - second for first, second in zip(own, base, strict=True)]
                fitted = more[0] * one["weights"] * 1e-6 + more[1] * one["rows"] * 1e-3 + more[2] * one["products"]
                pairs.append(f"{one['model']} {one['kind']} {one['time']:.0f} ± {one['error']:.0f}, {fitted:.0f}")
        lines.append(f"| {text} | {own[0]:.1f} | {own[1]:.1f} | {own[2]:.1f} | {'; '.join(pairs)} |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the reference model")
    parser.add_argument("--wide", type=Path, required=True, help="the one whose widths 256 divides")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tools", type=Path, default=Path("out/tools"), help="where llama.cpp is built")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "pace.json")
    given = parser.parse_args()
    with pipeline.one_thread_each():
        seen = list(measure("narrow", given.model, NARROW_KINDS, given))
        seen += measure("wide", given.wide, WIDE_KINDS, given)
    result = {"processor": processor(), "threads": given.threads, "turns": given.turns, "pace": fit(seen)}
    result["seen"] = [vars(one) for one in seen]
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(table(result))
    sys.stdout.write(table(result))


if __name__ == "__main__":
    main()
