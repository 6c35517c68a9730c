"""What a run will cost, told before it begins: memory, disk, time. Formulas, not promises."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from tersor.contracts import Anatomy, Layer
from tersor.errors import BadInput
from tersor.stages.options import LEAST_TRELLIS, Options, searches
from tersor.stages.sensitivity import most_chunks

_REPORT_BYTES = 3_000_000
"""Most of it is the library that draws the charts; the rest leaves room for a tokenizer."""
_SEARCHED = {"normal": 2.5e6, "best": 0.4e6}
"""Weights a second and worker that a trellis search takes, its points on the curves included."""
_ASIDE = 250_000_000
"""What hardly grows with the model: tokenizer, hidden states, pieces of weights, what the allocator keeps."""
_HEAD_TOKENS = 256
_HEAD_COPIES = 5
"""Arrays of (tokens x vocabulary) that the head's backward pass holds at once."""


@dataclass(frozen=True)
class Estimate:
    """``memory``: peak resident bytes above those of the interpreter with torch imported; ``disk``: bytes needed while
    running, the artifact included; ``seconds``: wall time, None when there is nothing to run."""

    memory: int
    disk: int
    seconds: float | None


def chunk_sequences(length: int) -> int:
    """Sequences run through a block together: about a thousand tokens, whatever the machine."""
    return max(1, 1024 // length)


def peak_memory(anatomy: Anatomy, options: Options, workers: int) -> int:
    """Peak resident bytes above the baseline, from the largest block and the largest working set.

    On a model of 1.1 billion weights it is within a few per cent of what was measured (benchmarks/results/).
    """
    dtype = 2 if options.dtype == "bfloat16" else 4
    needs = [_Block.of(anatomy.layers_of(k), dtype) for k in range(len(anatomy.blocks))]
    tokens = chunk_sequences(options.length) * options.length
    widest = max((layer.shape[1] for layer in anatomy.layers), default=1)
    activations = workers * tokens * 12 * widest * 4
    # Sums of the fitted and of the held-out text, and each worker's products of one chunk while they are added.
    collecting = max((need.weights + need.grams * (2 + workers) for need in needs), default=0) + activations
    guided = options.sensitivity == "fisher"
    square = _factor_square(options)
    measuring = max(
        (
            need.weights
            + need.grams
            + (max(need.grams, need.guided) if guided else need.grams)
            + square * sum(width * width for width in need.widths[:workers])
            for need in needs
        ),
        default=0,
    )
    outermost = max((layer.parameters for layer in anatomy.layers_of(None)), default=0)
    vocabulary = max((layer.shape[0] for layer in anatomy.layers_of(None)), default=0)
    head = outermost * dtype * 2 + workers * _HEAD_COPIES * _HEAD_TOKENS * vocabulary * 4
    return _ASIDE + max(collecting, measuring, head)


@dataclass(frozen=True)
class _Block:
    """``weights``: bytes of a block's parameters; ``grams``: of the Gram matrices of all its inputs; ``guided``: of one
    for each layer; ``widths`` of all inputs, copies counted, the widest first."""

    weights: int
    grams: int
    guided: int
    widths: tuple[int, ...]

    @classmethod
    def of(cls, layers: Iterable[Layer], dtype: int) -> _Block:
        layers = list(layers)
        inputs = {(layer.inputs, copy): layer.shape[1] for layer in layers for copy in range(layer.copies)}
        return cls(
            dtype * sum(layer.parameters for layer in layers),
            4 * sum(width * width for width in inputs.values()),
            4 * sum(layer.copies * layer.shape[1] ** 2 for layer in layers),
            tuple(sorted(inputs.values(), reverse=True)),
        )


def _factor_square(options: Options) -> int:
    """Bytes for each entry of a Gram matrix that measuring one layer takes: one float64 matrix being factored (8) and
    the mixing kept from it (4); where codecs rotate their input, the rotated Gram matrix and its mixing too."""
    return 20 if options.candidates is None and searches(options.effort) else 12


def choose_workers(anatomy: Anatomy, options: Options, available: int) -> int:
    """As many workers as asked for or available, fewer when memory would not do.

    Raises BadInput when even one worker would need more than the cap.
    """
    wanted = options.workers or available
    if options.max_memory is None:
        return wanted
    for workers in range(wanted, 0, -1):
        if peak_memory(anatomy, options, workers) <= options.max_memory:
            return workers
    least = peak_memory(anatomy, options, 1)
    raise BadInput(
        f"--max-memory {options.max_memory:,} bytes is too little for this model: its largest block and Gram matrices "
        f"need about {least:,} bytes with one worker; raise the cap or shorten --length."
    )


def machine_speed(workers: int) -> float:
    """Floating-point operations per second of one worker, times workers; a matrix product timed for a moment."""
    a = torch.full((512, 768), 0.5)
    b = torch.full((768, 768), 0.5)
    a @ b
    began = time.perf_counter()
    rounds = 0
    while time.perf_counter() - began < 0.1:
        a @ b
        rounds += 1
    return workers * 2 * 512 * 768 * 768 * rounds / (time.perf_counter() - began)


def estimate(anatomy: Anatomy, options: Options, workers: int, file_bytes: int) -> Estimate:
    """Memory, disk and time of a whole run."""
    weights = sum(layer.parameters for layer in anatomy.layers if layer.block is not None)
    outside = sum(layer.parameters for layer in anatomy.layers_of(None))
    tokens = options.sequences * options.length
    backward = _seen(options)
    evaluated = options.eval_sequences * options.length
    gram = sum(2 * width * width for width in _distinct_inputs(anatomy))
    sampled = (tokens + evaluated) if options.text is None else 0
    forward = 2 * weights
    flops = (
        3 * tokens * forward
        + 2 * tokens * gram
        + backward * (3 * forward + 6 * outside)
        + evaluated * 2 * (forward + 2 * outside)
        # Token by token, batches are small and every step reads all weights: a third of the speed of long products.
        + 3 * sampled * (forward + 2 * outside)
        + 30 * sum(layer.parameters * layer.shape[1] for layer in anatomy.layers)
    )
    memory = peak_memory(anatomy, options, workers)
    seconds = 20 + flops / machine_speed(workers)
    if options.candidates is None and searches(options.effort):
        searched = sum(layer.parameters for layer in anatomy.layers if layer.shape[1] >= LEAST_TRELLIS)
        seconds += searched / (workers * _SEARCHED[options.effort])
    return Estimate(memory, disk_bytes(anatomy, options, file_bytes), math.ceil(seconds))


def disk_bytes(anatomy: Anatomy, options: Options, file_bytes: int) -> int:
    """Bytes on disk while running: the artifact with its report, and hidden states between blocks."""
    tokens = options.sequences * options.length
    backward = _seen(options)
    width = max((layer.shape[1] for layer in anatomy.layers_of(None)), default=1024)
    dtype = 2 if options.dtype == "bfloat16" else 4
    hidden = 2 * tokens * width * dtype + backward * width * (len(anatomy.blocks) * dtype + 8)
    return file_bytes + _REPORT_BYTES + hidden


def _seen(options: Options) -> int:
    """Tokens that the backward pass sees."""
    if options.sensitivity != "fisher":
        return 0
    chunk = chunk_sequences(options.length) * options.length
    return min(options.sequences * options.length, most_chunks(options.effort, chunk) * chunk)


def check_disk(partial: Path, needed: int) -> None:
    """Raise BadInput before any work when the disk of ``partial`` has not ``needed`` bytes, those it holds included."""
    held = sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(partial.absolute().parent).free
    if needed > free + held:
        raise BadInput(
            f"The run needs about {needed:,} bytes in {partial.absolute().parent}, and its disk has {free:,} free; "
            f"free some space, choose another --output, or use fewer --sequences."
        )


def _distinct_inputs(anatomy: Anatomy) -> list[int]:
    found = {(layer.block, layer.inputs, copy): layer.shape[1] for layer in anatomy.layers for copy in range(1)}
    return list(found.values())
