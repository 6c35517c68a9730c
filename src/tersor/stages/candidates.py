"""Stage: which codecs there are to choose from for each layer, and what the user should know of that."""

from __future__ import annotations

from collections.abc import Iterable

from tersor.codecs.inner import streamed
from tersor.contracts import Codec, Layer, Rounding
from tersor.engines.table import find_engine
from tersor.errors import BadInput, ShapeMismatch
from tersor.stages.context import Context, parsed
from tersor.stages.options import default_candidates, searches, usable
from tersor.stages.rules import fitting, rule_notes


def layer_candidates(context: Context, layer: Layer) -> dict[str, Codec]:
    """Codecs to choose from for a layer, by text. Raises ShapeMismatch when none of those asked for can take it."""
    texts = context.options.candidates or default_candidates(layer.shape[1], context.options.effort)
    found = fitting(context.options, context.anatomy, layer, parsed(texts))
    if not found:
        raise ShapeMismatch(
            f"None of the candidates {', '.join(texts)} can take {layer.name} with {layer.shape[1]} inputs; add one "
            f"whose group divides {layer.shape[1]}, or a per-row one such as int4:row."
        )
    return found


def engine_roundings(context: Context, layers: Iterable[Layer]) -> dict[str, dict[str, Rounding]]:
    """By ``layer.inputs`` and candidate how the engine rounds inputs; nothing for an engine that does not."""
    engine = find_engine(context.options.engine)
    found: dict[str, dict[str, Rounding]] = {}
    if engine is None:
        return found
    for layer in layers:
        for text, codec in layer_candidates(context, layer).items():
            rounding = engine.rounds(codec)
            if rounding is not None:
                found.setdefault(layer.inputs, {})[text] = rounding
    return found


def candidate_notes(context: Context) -> tuple[str, ...]:
    """What the user should know of candidates that were asked for and cannot take every layer.

    Raises BadInput for one that what is asked for rules out.
    """
    layers = context.anatomy.layers
    notes = []
    if context.options.candidates is None and context.options.effort == "normal" and not searches("normal"):
        notes.append(
            "The trellis search was not compiled when tersor was installed, so only scalar codecs were tried: install "
            "again with a C++ compiler, or give --effort best and a lot of time."
        )
    given = parsed(context.options.candidates or ())
    notes += rule_notes(context.options, context.anatomy, given)
    refused: dict[tuple[str, ...], list[str]] = {}
    budget = context.options.budget
    for text, codec in given.items():
        able = [layer for layer in layers if usable({text: codec}, layer)]
        if budget and budget.kind == "memory" and any(streamed(codec, layer.stored_shape) for layer in able):
            raise BadInput(f"{text} is small in files only, as it runs decoded: give --size instead of --memory.")
        names = tuple(layer.name for layer in layers if layer not in able)
        if names:
            refused.setdefault(names, []).append(text)
    widths = {layer.name: layer.shape[1] for layer in layers}
    notes += [
        f"{', '.join(texts)} cannot take {len(names)} of {len(layers)} layers (first {names[0]}, with "
        f"{widths[names[0]]} inputs); the other candidates were used there."
        for names, texts in refused.items()
    ]
    return tuple(notes)


def middle(candidates: dict[str, Codec], layer: Layer) -> str:
    """The candidate nearest to 3.5 bits: where calibration matters and is not yet lost."""
    return min(candidates, key=lambda text: abs(candidates[text].bits(layer.stored_shape) / layer.parameters - 3.5))
