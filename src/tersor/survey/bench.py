"""One recipe at one number of bits: every linear of the blocks encoded, and what that does to the model's predictions.

What all recipes share is measured once and kept in a folder: Gram matrices of the original model's inputs, and the
held-out text's hidden states where the blocks begin and end. The reference's logits come from the latter through the
head, which is the same on both sides: exact, and a thousandth of the size of the logits.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.contracts import Codec, Gram, Layer
from tersor.errors import TersorError
from tersor.evaluation.divergence import DivergenceAccumulator
from tersor.recipes import NothingFits, Recipe
from tersor.runtime.stream import BlockStream
from tersor.solvers import Encoder
from tersor.stages.context import Context, block_weights, oriented
from tersor.stages.finish import peak_resident_bytes
from tersor.stages.memory import give_back
from tersor.stages.text import Texts
from tersor.stages.verify import Pair, advance_states, compare_sequence
from tersor.stages.work import Work
from tersor.statistics.collect import collect_grams
from tersor.survey.records import Outcome
from tersor.version import __version__

SIDE = 16 / 64
"""Bits per weight that layers may take beyond those asked: a float16 scale for every 64 weights."""
_DONE = "shared.json"
_STAGE = "statistics"
_OF_RECIPES = (
    TersorError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a recipe from outside can raise; it is recorded and the survey goes on. A failing disk stops the survey."""


@dataclass(frozen=True)
class Bench:
    """A model, its texts, and the folder with what recipes share. ``key``: digest of all that results depend on."""

    context: Context
    texts: Texts
    work: Work
    key: str

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that recipes encode: the linears of all blocks."""
        return tuple(layer for layer in self.context.anatomy.layers if layer.block is not None)

    @property
    def weights(self) -> int:
        return sum(layer.parameters for layer in self.layers)


def open_bench(context: Context, texts: Texts, folder: Path) -> Bench:
    """The bench for a model and texts; what it keeps lies in ``folder``, one folder below for each setting."""
    setting = {
        "calibration": texts.calibration.digest(),
        "evaluation": texts.evaluation.digest(),
        "dtype": str(context.dtype),
    }
    key = hashlib.sha256(json.dumps(setting).encode()).hexdigest()[:16]
    return Bench(context, texts, Work(folder / f"{context.source.fingerprint()[:16]}-{key}"), key)


def shared_measured(bench: Bench) -> bool:
    """Whether what all recipes share is there."""
    return bench.work.has(_DONE)


def measure_shared(bench: Bench) -> None:
    """Gram matrices of all block inputs and the reference's states, unless they are there already."""
    context, work = bench.context, bench.work
    if shared_measured(bench):
        return
    blocks = len(context.anatomy.blocks)
    stream = context.stream()
    try:
        with torch.no_grad():
            fit = _embedded(stream, bench.texts.calibration.ids, context.chunk)
            held = _embedded(stream, bench.texts.evaluation.ids, context.chunk)
            work.save_tensors("begin.safetensors", {"states": torch.cat(held)})
            tokens = {}
            for block in range(blocks):
                after: list[Tensor] = []
                with stream.block(block) as module:
                    sums = collect_grams(
                        partial(_step, stream, module, block, fit),
                        len(fit),
                        block_weights(context, module, block),
                        workers=context.workers,
                        keep=lambda _, output, after=after: after.append(output),  # type: ignore[misc]
                    )
                    held = advance_states(stream, module, block, held, context.workers)
                named = {f"{name}#{copy}": matrix for (name, copy), matrix in sums.matrices.items()}
                tokens.update({f"{name}#{copy}": count for (name, copy), count in sums.tokens.items()})
                work.save_tensors(f"gram-{block}.safetensors", named)
                fit = after
                give_back()
                context.progress(_STAGE, block + 1, blocks)
        work.save_tensors("end.safetensors", {"states": torch.cat(held)})
        work.save(_DONE, {"tokens": tokens})
    finally:
        stream.close()


def _embedded(stream: BlockStream, ids: Tensor, chunk: int) -> list[Tensor]:
    return [stream.embed(piece) for piece in _pieces(ids, chunk)]


def _pieces(tensor: Tensor, chunk: int) -> list[Tensor]:
    return [tensor[start : start + chunk] for start in range(0, len(tensor), chunk)]


def _step(stream: BlockStream, module: nn.Module, block: int, states: list[Tensor], index: int) -> Tensor:
    return stream.run(module, block, states[index])


def blank(bench: Bench, recipe: Recipe, bits: float) -> tuple[Outcome, dict[tuple[int, int], Codec]]:
    """The outcome before anything is measured, and the codec for every shape; ``skipped`` when some shape has none."""
    codecs: dict[tuple[int, int], Codec] = {}
    status, error = "measured", ""
    try:
        for layer in bench.layers:
            if layer.shape not in codecs:
                codecs[layer.shape] = recipe.codec_for(bits + SIDE, layer.shape)
    except NothingFits as reason:
        status, error = "skipped", str(reason)
    except _OF_RECIPES as reason:
        status, error = "failed", _told(reason)
    settings = {
        "codecs": {f"{rows}x{columns}": str(codec) for (rows, columns), codec in codecs.items()},
        "solver": repr(recipe.solver()),
        "calibrated": recipe.calibrated,
        "steps": [step.__qualname__ for step in (recipe.refine, recipe.prepare) if step is not None],
    }
    outcome = Outcome(
        model=bench.context.source.fingerprint(),
        setting=bench.key,
        recipe=recipe.name,
        recipe_settings=json.dumps(settings, sort_keys=True),
        bits=bits,
        status=status,  # type: ignore[arg-type]
        version=__version__,
        error=error,
        created=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    return outcome, codecs


def run_recipe(bench: Bench, recipe: Recipe, bits: float, progress: Callable[[int], None]) -> Outcome:
    """Encode all block linears and measure. Never raises for what a recipe does: the outcome has the error.

    ``progress(blocks done)``.
    """
    began = time.perf_counter()
    _forget_peak()
    outcome, codecs = blank(bench, recipe, bits)
    if outcome.status != "measured":
        return outcome
    found: dict[str, Any]
    try:
        found = _measure(bench, recipe, codecs, progress)
    except _OF_RECIPES as error:
        found = {"status": "failed", "error": _told(error)}
    return Outcome(
        **{
            **outcome.plain(),
            **found,
            "seconds": time.perf_counter() - began,
            "memory": _peak(),
            "created": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
    )


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, TersorError) else f"{type(error).__name__}: {error}"


def _measure(
    bench: Bench, recipe: Recipe, codecs: dict[tuple[int, int], Codec], progress: Callable[[int], None]
) -> dict[str, Any]:
    context = bench.context
    tokens = bench.work.load(_DONE)["tokens"]
    stream = context.stream()
    total, errors = 0, []
    notes: dict[str, None] = {}
    try:
        with torch.no_grad():
            states = _pieces(bench.work.load_tensors("begin.safetensors")["states"], context.chunk)
            for block in range(len(context.anatomy.blocks)):
                grams = bench.work.load_tensors(f"gram-{block}.safetensors")
                ready = {name: Gram(matrix, tokens[name]) for name, matrix in grams.items()}
                with stream.block(block) as module:
                    weights = block_weights(context, module, block)
                    encoder: tuple[str, Encoder] | None = None
                    for layer in sorted(weights, key=lambda layer: layer.inputs):
                        if encoder is None or encoder[0] != layer.inputs:
                            # One encoder for all that read the same input: its Gram matrix is factored once.
                            encoder = (layer.inputs, Encoder(recipe.solver(), workers=context.workers))
                        used, error = _replace(
                            context, recipe, layer, weights[layer], codecs[layer.shape], ready, encoder[1]
                        )
                        total += used
                        errors += error
                        notes.update({f"{layer.name}: {note}": None for note in encoder[1].notes})
                    states = advance_states(stream, module, block, states, context.workers)
                give_back()
                progress(block + 1)
            accumulator = _compare(bench, stream, torch.cat(states))
    finally:
        stream.close()
    quality = accumulator.quality(bench.texts.evaluation.origin)
    return {
        "nbytes": -(-total // 8),
        "weights": bench.weights,
        "kl": quality.kl,
        "kl_error": quality.kl_error,
        "sequences": accumulator.detail().sequences,
        "output_error": math.fsum(errors) / len(errors) if errors else None,
        "perplexity": quality.perplexity,
        "top1": quality.top1,
        "error": " ".join(notes),
    }


def _replace(
    context: Context,
    recipe: Recipe,
    layer: Layer,
    parameter: Tensor,
    codec: Codec,
    grams: dict[str, Gram],
    encoder: Encoder,
) -> tuple[int, list[float]]:
    """Put a layer's decoded values in the place of its weights; gives the bits they take and their output errors."""
    source = context.weight(layer)
    decoded, bits, errors = [], 0, []
    for copy in range(layer.copies):
        weight = source[copy].float().contiguous()
        gram = grams.get(f"{layer.inputs}#{copy}")
        used, values = encode_layer(recipe, weight, codec, gram, encoder)
        bits += used
        decoded.append(values)
        if gram is not None:
            error, energy = (float(((m @ gram.matrix) * m).double().sum()) for m in (weight - values, weight))
            if energy > 0:
                errors.append(error / energy)
    oriented(parameter, layer).copy_(torch.stack(decoded))
    return bits, errors


def encode_layer(
    recipe: Recipe, weight: Tensor, codec: Codec, gram: Gram | None, encoder: Encoder
) -> tuple[int, Tensor]:
    """Bits, and decoded values ``(out, in)`` of ``weight (out, in)`` float32, by a recipe."""
    shape = (weight.shape[0], weight.shape[1])
    if recipe.refine is not None:
        finer = recipe.refine(weight, codec)
        if finer.bits(shape) > codec.bits(shape):
            raise NothingFits(f"Recipe {recipe.name} refined {codec} into {finer}, which takes more bits.")
        codec = finer
    if recipe.prepare is not None and gram is not None:
        prepared = recipe.prepare(weight, gram, codec)
        tensors, values = encoder(prepared.weight, codec, prepared.gram)
        values = prepared.restore(values)
    else:
        tensors, values = encoder(weight, codec, gram if recipe.calibrated else None)
    stored = 8 * sum(tensor.nbytes for tensor in tensors.values())
    if stored != codec.bits(shape):
        raise NothingFits(f"Codec {codec} says {codec.bits(shape):,} bits for {shape} and stored {stored:,}.")
    return recipe.bits(codec, shape), values


def _compare(bench: Bench, stream: BlockStream, states: Tensor) -> DivergenceAccumulator:
    reference = bench.work.load_tensors("end.safetensors")["states"][:, :-1]
    ids = bench.texts.evaluation.ids
    accumulator = DivergenceAccumulator()
    both = Pair(stream, stream)
    with stream.head_module():
        for row in range(len(ids)):
            first, second = (hidden[row : row + 1] for hidden in (reference, states[:, :-1]))
            accumulator.add(compare_sequence(both, first, second, ids[row, 1:], bench.context.workers))
    return accumulator


def _forget_peak() -> None:
    """Let the system count this process's peak memory anew, where it can."""
    path = Path("/proc/self/clear_refs")
    if sys.platform == "linux" and path.exists():
        try:
            path.write_text("5")
        except OSError:
            return  # not allowed here: peaks are then those of the process so far


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_resident_bytes()


__all__ = ["SIDE", "Bench", "blank", "encode_layer", "measure_shared", "open_bench", "run_recipe", "shared_measured"]
