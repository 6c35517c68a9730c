"""Products with packed weights, one token at a time, against the speed at which the machine reads memory.

A product of one token reads the weight once and does little else, so the bytes of the weight over the time, as a share
of what plain reading of as many bytes reaches in the same run, say how good a kernel is. Each line takes turns: plain
reading, the kernel, torch's bfloat16 ``linear`` on the same shape; shares are medians of ratios of neighbours, which a
noisy machine disturbs least. Weights are random codes, in as many copies as it takes to be larger than any cache; they,
torch's weights and what is read lie in large pages where the system has them, as weights of `tersor run` do. What a
product keeps of its own (ternary codes, at 2 bits) does not.

    python benchmarks/product_speed.py [--only int4] [--threads 2] [--turns 15] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.codecs import parse
from tersor.contracts import Codec, Shape
from tersor.kernels import products
from tersor.runtime import large_pages
from tersor.runtime.products import product_of

FORMATS = {
    "int8:g64": 0.8,
    "int4:g64": 0.8,
    "int3:g64": 0.6,
    "int2:g64": 0.6,
    "int4:row": None,
    "int4:g32:asym": None,
    "fp4:e2m1:g32": None,
    "bin:row": None,
    "ternary:row": 0.6,
    "lut4:row": 0.6,
    "lut3:row": 0.6,
    "trellis2:L8": 0.6,
    "trellis2:L12": 0.4,
    "trellis3:L10": None,
    "trellis4:L10": None,
    "rot(trellis2:L12)": None,
    "rot(trellis4:L10)": None,
}
"""Codecs, and the least share of the reading speed that they are to reach with all threads."""
MOST = torch.get_num_threads()
SHAPES = ((4096, 4096), (4096, 14336))
CACHES = 512 << 20
"""Bytes that are surely more than all caches hold."""


def random_parts(codec: Codec, shape: Shape, seed: int) -> dict[str, Tensor]:
    """Stored tensors of a weight of random codes, with scales of about one."""
    draw = torch.Generator().manual_seed(seed)
    parts = {}
    for part in codec.parts(shape):
        if part.dtype.is_floating_point:
            parts[part.name] = (torch.rand(part.shape, generator=draw) * 0.1 + 0.01).to(part.dtype)
        else:
            ceiling = 243 if str(codec).startswith("ternary") else 256
            parts[part.name] = torch.randint(ceiling, part.shape, generator=draw, dtype=torch.uint8)
    return parts


def in_large_pages(tensor: Tensor, copies: int = 1) -> list[Tensor]:
    """Copies of a tensor, in large pages where there are any."""
    size = -(-tensor.numel() * tensor.element_size() // 64) * 64
    memory = large_pages.room(size * copies)
    memory = torch.empty(size * copies, dtype=torch.uint8) if memory is None else memory
    found = [part[: tensor.numel() * tensor.element_size()] for part in memory.split(size)]
    found = [part.view(tensor.dtype).view(tensor.shape) for part in found]
    for copy in found:
        copy.copy_(tensor)
    return found


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(text: str, shape: Shape, *, threads: int, turns: int) -> dict[str, Any]:
    """One line of the results."""
    codec = parse(text)
    stored = sum(part.nbytes for part in codec.parts(shape))
    copies = max(CACHES // stored, 2)
    # Copies are of one random weight: what they hold makes no difference to the time.
    first = random_parts(codec, shape, 0)
    parts = {name: in_large_pages(part, copies) for name, part in first.items()}
    weights = [product_of(codec, {name: part[i] for name, part in parts.items()}, shape) for i in range(copies)]
    if weights[0] is None:
        return {"codec": text, "shape": shape, "kernel": False}
    plain = in_large_pages(torch.zeros(shape, dtype=torch.bfloat16), max(CACHES // (2 * shape[0] * shape[1]), 2))
    reading = in_large_pages(torch.ones(CACHES // 8, dtype=torch.int64))[0].numpy().view("uint64")
    x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(1))
    x16 = x.bfloat16()
    found: dict[str, list[float]] = {"read": [], "int16": [], "int8": [], "bf16": []}
    for turn in range(turns):
        found["read"].append(CACHES / seconds(lambda: products.read(reading, threads)))
        for bits in (16, 8):
            here = weights[(2 * turn + (bits == 8)) % copies]
            several = [weights[(2 * turn + (bits == 8) + i) % copies] for i in range(8)]
            products.multiply(here, x, bits=bits)
            took = seconds(lambda bits=bits, several=several: [products.multiply(w, x, bits=bits) for w in several])
            found[f"int{bits}"].append(8 * stored / took)
        several = [plain[(4 * turn + i) % len(plain)] for i in range(4)]
        took = seconds(lambda several=several: [torch.nn.functional.linear(x16, w) for w in several])
        found["bf16"].append(4 * plain[0].nbytes / took)
    speed = {name: statistics.median(values) for name, values in found.items()}
    share = {
        name: statistics.median(a / b for a, b in zip(found[name], found["read"], strict=True))
        for name in ("int16", "int8", "bf16")
    }
    faster = {
        name: statistics.median(
            (a / stored) / (b / plain[0].nbytes) for a, b in zip(found[name], found["bf16"], strict=True)
        )
        for name in ("int16", "int8")
    }
    return {
        "codec": text,
        "shape": shape,
        "kernel": True,
        "bits": 8 * stored / (shape[0] * shape[1]),
        "threads": threads,
        "read_bytes_per_second": speed["read"],
        "bytes_per_second": {name: speed[name] for name in ("int16", "int8")},
        "share_of_reading": share,
        "times_bf16_linear": faster,
        "all_threads": threads == MOST,
        "aim": FORMATS.get(text),
    }


def line(row: dict[str, Any]) -> str:
    rows, columns = row["shape"]
    head = f"{row['codec']:20} {rows:5}x{columns:<6}"
    if not row["kernel"]:
        return f"{head} no kernel"
    share, faster = row["share_of_reading"], row["times_bf16_linear"]
    aim = (
        ""
        if row["aim"] is None or not row["all_threads"]
        else f"  aim {row['aim']:.1f}: {'met' if share['int16'] >= row['aim'] else 'missed'}"
    )
    return (
        f"{head} {row['bits']:5.2f} bits  {row['bytes_per_second']['int16'] / 1e9:6.1f} GB/s of "
        f"{row['read_bytes_per_second'] / 1e9:5.1f}  share {share['int16']:.2f} (8-bit inputs {share['int8']:.2f}, "
        f"torch bf16 {share['bf16']:.2f})  {faster['int16']:5.2f} x bf16{aim}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="measure the codecs whose text begins so, and write nothing")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, MOST])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    options = parser.parse_args(arguments)
    rows = []
    for threads in sorted(set(options.threads)):
        torch.set_num_threads(threads)
        print(f"{threads} thread{'s' * (threads > 1)}")
        for text in FORMATS:
            if options.only and not text.startswith(options.only):
                continue
            for shape in SHAPES:
                rows.append(measure(text, shape, threads=threads, turns=options.turns))
                print(line(rows[-1]), flush=True)
    if not options.only:
        options.out.write_text(json.dumps({"instructions": products.instructions(), "lines": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
