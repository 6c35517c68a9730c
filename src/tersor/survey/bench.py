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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.codecs import BitStack, parse
from tersor.codecs.sign_magnitude import MOST_STAGES
from tersor.contracts import Codec, Gram, Layer
from tersor.errors import TersorError
from tersor.evaluation.divergence import DivergenceAccumulator
from tersor.recipes import NothingFits, Recipe
from tersor.recovery import BlockTuning
from tersor.runtime.stream import BlockStream
from tersor.solvers import Encoder
from tersor.stages.context import Context, block_weights
from tersor.stages.finish import peak_resident_bytes
from tersor.stages.memory import give_back
from tersor.stages.sensitivity import load_moments, measure_sensitivity, text_weights
from tersor.stages.text import Texts
from tersor.stages.tune import BlockTuner, Piece
from tersor.stages.verify import Pair, advance_states, compare_sequence
from tersor.stages.weight_gradients import load_weight_gradients, measure_weight_gradients
from tersor.stages.work import Work
from tersor.statistics.collect import Grams, OutputMoments, collect_grams
from tersor.survey.blocks import (
    encode_copies,
    encode_layer,
    expected_loss,
    expected_losses,
    put_values,
    relative_errors,
)
from tersor.survey.records import Outcome
from tersor.version import __version__

SIDE = 16 / 64
"""Bits per weight that layers may take beyond those asked: a float16 scale for every 64 weights."""
_DONE = "shared.json"
_GUIDED = "guided.json"
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
    """A model and its texts. ``key``: digest of all that results depend on. ``energies``: of outputs, once known."""

    context: Context
    texts: Texts
    key: str
    energies: dict[str, float] = field(default_factory=dict)

    @property
    def work(self) -> Work:
        """The folder with what recipes share."""
        return self.context.work

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
    work = Work(folder / f"{context.source.fingerprint()[:16]}-{key}")
    return Bench(replace(context, work=work), texts, key)


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
                with stream.block(block) as module:
                    sums, fit = _block_sums(context, stream, module, block, fit)
                    held = advance_states(stream, module, block, held, context.workers)
                tokens.update({f"{name}#{copy}": count for (name, copy), count in sums.tokens.items()})
                _save_grams(work, _file(block), sums)
                give_back()
                context.progress(_STAGE, block + 1, blocks)
        work.save_tensors("end.safetensors", {"states": torch.cat(held)})
        work.save(_DONE, {"tokens": tokens})
    finally:
        stream.close()


def measure_gradients(bench: Bench, recipes: Sequence[Recipe]) -> None:
    """What ``recipes`` ask of the loss's gradients, unless it is there already: by weight, by output, or by token."""
    if any(recipe.gradients for recipe in recipes):
        measure_weight_gradients(bench.context, bench.texts.calibration.ids)
    if any(recipe.plan is not None and recipe.plan_loss is None for recipe in recipes):
        measure_sensitivity(bench.context, bench.texts.calibration.ids)
    if any(recipe.guided for recipe in recipes):
        _measure_guided(bench)


def _measure_guided(bench: Bench) -> None:
    """Gram matrices in which tokens count by the gradients at the outputs of what reads them."""
    context, work = bench.context, bench.work
    if work.has(_GUIDED):
        return
    ids = bench.texts.calibration.ids
    measure_sensitivity(context, ids)
    blocks = len(context.anatomy.blocks)
    stream = context.stream()
    try:
        with torch.no_grad():
            fit = _embedded(stream, ids, context.chunk)
            for block in range(blocks):
                with stream.block(block) as module:
                    layers = block_weights(context, module, block)
                    weights = text_weights(context, block, layers, ids.shape[0], ids.shape[1])
                    sums, fit = _block_sums(context, stream, module, block, fit, weights)
                _save_grams(work, _file(block, guided=True), sums)
                give_back()
                context.progress(_STAGE, block + 1, blocks)
    finally:
        stream.close()
    work.save(_GUIDED, {})


def _block_sums(
    context: Context,
    stream: BlockStream,
    module: nn.Module,
    block: int,
    states: list[Tensor],
    weights: Sequence[Mapping[str, Tensor]] | None = None,
) -> tuple[Grams, list[Tensor]]:
    """Gram matrices of a block's inputs, and its outputs. ``weights``: by chunk and input, of tokens; default alike."""
    after: list[Tensor] = []
    sums = collect_grams(
        partial(_step, stream, module, block, states),
        len(states),
        block_weights(context, module, block),
        workers=context.workers,
        keep=lambda _, output: after.append(output),
        energies=weights,
    )
    return sums, after


def _file(block: int, *, guided: bool = False) -> str:
    return f"{'guided' if guided else 'gram'}-{block}.safetensors"


def _save_grams(work: Work, name: str, sums: Grams) -> None:
    work.save_tensors(name, {f"{inputs}#{copy}": matrix for (inputs, copy), matrix in sums.matrices.items()})


def block_grams(bench: Bench, block: int, *, guided: bool = False) -> dict[str, Gram]:
    """The Gram matrices of a block's inputs, by ``<inputs>#<copy>``; ``guided``: those weighted by gradients."""
    tokens = bench.work.load(_DONE)["tokens"]
    matrices = bench.work.load_tensors(_file(block, guided=guided))
    return {name: Gram(matrix, tokens[name]) for name, matrix in matrices.items()}


def chosen_codecs(
    bench: Bench, recipe: Recipe, bits: float, codecs: Mapping[tuple[int, int], Codec]
) -> dict[Layer, Codec]:
    """The codec for every layer: that for its shape, or what the recipe's plan says.

    Raises :class:`NothingFits` for a plan that takes more than ``bits`` per weight, side information as for others.
    """
    if recipe.plan is None:
        return {layer: codecs[layer.shape] for layer in bench.layers}
    layers = {layer.name: layer for layer in bench.layers}
    at: list[tuple[int | None, dict[str, Gram], Encoder, OutputMoments]] = []
    stacks: dict[tuple[str, BitStack], tuple[Iterator[float], list[float]]] = {}

    def loss(name: str, text: str) -> float:
        layer = layers[name]
        if recipe.plan_loss is not None:
            return math.fsum(recipe.plan_loss(copy.float(), parse(text)) for copy in bench.context.weight(layer))
        if not at or at[0][0] != layer.block:
            assert layer.block is not None
            grams = block_grams(bench, layer.block, guided=recipe.guided)
            moments = load_moments(bench.context, layer.block)
            at[:] = [(layer.block, grams, Encoder((recipe.plan_solver or recipe.solver)()), moments)]
        codec = parse(text)
        if not isinstance(codec, BitStack):
            return expected_loss(bench.context, recipe, layer, codec, *at[0][1:])
        # The first stages of a stack are those of a shorter one.
        whole = replace(codec, stages=MOST_STAGES)
        if (name, whole) not in stacks:
            stacks.clear()
            stacks[name, whole] = expected_losses(bench.context, recipe, layer, whole, *at[0][1:]), []
        coming, known = stacks[name, whole]
        while len(known) < codec.stages:
            known.append(next(coming))
        return known[codec.stages - 1]

    texts = recipe.plan(bits + SIDE, {name: layer.stored_shape for name, layer in layers.items()}, loss)
    found = {layer: parse(texts[name]) for name, layer in layers.items()}
    used = sum(layer.copies * recipe.bits(codec, layer.shape) for layer, codec in found.items())
    if used > (bits + SIDE) * bench.weights:
        raise NothingFits(
            f"Recipe {recipe.name} planned {used:,} bits, more than the {int((bits + SIDE) * bench.weights):,} it has."
        )
    return found


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
        "steps": [step.__qualname__ for step in (recipe.refine, recipe.prepare, recipe.plan) if step is not None],
        **({"tune": repr(recipe.tune)} if recipe.tune is not None else {}),
        **({"guided": True} if recipe.guided else {}),
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
    began = time.process_time()
    _forget_peak()
    outcome, codecs = blank(bench, recipe, bits)
    if outcome.status != "measured":
        return outcome
    found: dict[str, Any]
    try:
        found = _measure(bench, recipe, chosen_codecs(bench, recipe, bits, codecs), progress)
    except _OF_RECIPES as error:
        found = {"status": "failed", "error": _told(error)}
    return Outcome(
        **{
            **outcome.plain(),
            **found,
            "seconds": time.process_time() - began,
            "memory": _peak(),
            "created": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
    )


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, TersorError) else f"{type(error).__name__}: {error}"


def _measure(
    bench: Bench, recipe: Recipe, codecs: Mapping[Layer, Codec], progress: Callable[[int], None]
) -> dict[str, Any]:
    context = bench.context
    stream = context.stream()
    total, errors = 0, []
    notes: dict[str, None] = {}
    try:
        with torch.no_grad():
            states = _pieces(bench.work.load_tensors("begin.safetensors")["states"], context.chunk)
            tuner = None if recipe.tune is None else _tuner(bench, stream, recipe.tune)
            reached = None if tuner is None else torch.cat(tuner.reference)
            for block in range(len(context.anatomy.blocks)):
                plain = block_grams(bench, block)
                ready = block_grams(bench, block, guided=True) if recipe.guided else plain
                steep = load_weight_gradients(context, block) if recipe.gradients else {}
                with stream.block(block) as module:
                    weights = block_weights(context, module, block)
                    pieces: list[Piece] = []
                    encoder: tuple[str, Encoder] | None = None
                    for layer in sorted(weights, key=lambda layer: layer.inputs):
                        if encoder is None or encoder[0] != layer.inputs:
                            # One encoder for all that read the same input: its Gram matrix is factored once.
                            encoder = (layer.inputs, Encoder(recipe.solver(), workers=context.workers))
                        used, found = encode_copies(context, recipe, layer, codecs[layer], ready, encoder[1], steep)
                        # Output errors are told of the same inputs for all.
                        found = [
                            replace(piece, gram=plain.get(f"{layer.inputs}#{at}")) for at, piece in enumerate(found)
                        ]
                        total += used
                        if tuner is None:
                            put_values(weights[layer], layer, found)
                            errors += relative_errors(found, bench.energies)
                        else:
                            pieces += found
                        notes.update({f"{layer.name}: {note}": None for note in encoder[1].notes})
                    if tuner is not None and reached is not None:
                        pieces, tuned = tuner.tune(module, block, pieces, reached)
                        reached = tuned.outputs
                        for layer in weights:
                            put_values(weights[layer], layer, [piece for piece in pieces if piece.layer == layer])
                        errors += relative_errors(pieces, bench.energies)
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


def _tuner(bench: Bench, stream: BlockStream, tuning: BlockTuning) -> BlockTuner:
    ids = bench.texts.calibration.ids
    states = stream.embed(ids[: tuning.rows(ids.shape[1])])
    return BlockTuner(bench.context, stream, tuning, list(states.split(1)))  # type: ignore[no-untyped-call]


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
