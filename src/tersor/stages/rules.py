"""What an engine's rules leave of the candidates, layer by layer, and what the user is told of it."""

from __future__ import annotations

from collections.abc import Mapping

from tersor.codecs import parse
from tersor.contracts import Anatomy, Codec, Layer
from tersor.engines.contract import Engine
from tersor.engines.table import find_engine
from tersor.errors import BadInput
from tersor.stages.options import Options, usable


def fitting(options: Options, anatomy: Anatomy, layer: Layer, codecs: Mapping[str, Codec]) -> dict[str, Codec]:
    """The candidates that can take a layer, and all layers that the engine fuses with it; perhaps none."""
    engine = find_engine(options.engine)
    if engine is None:
        return {text: codecs[text] for text in usable(dict(codecs), layer)}
    left = list(codecs)
    for member in _members(engine, anatomy, layer):
        shaped = usable(dict(codecs), member)
        left = [
            text
            for text in left
            if text in shaped and engine.refuses(anatomy, member, codecs[text], options.tensor_parallel) is None
        ]
    wanted = [text for text in left if not engine.shuns(layer, codecs[text])]
    left = wanted or left
    if not left and engine.fallback:
        return {engine.fallback: parse(engine.fallback)}
    return {text: codecs[text] for text in left}


def _members(engine: Engine, anatomy: Anatomy, layer: Layer) -> list[Layer]:
    key = engine.together(layer)
    if key is None:
        return [layer]
    return [other for other in anatomy.layers if engine.together(other) == key]


def rule_notes(options: Options, anatomy: Anatomy, codecs: Mapping[str, Codec]) -> tuple[str, ...]:
    """What rules forbid: one sentence for each reason, with the candidates and layers that it concerns.

    Raises BadInput, with the reason of most layers, when no layer is left any of the candidates but the fallback.
    """
    engine = find_engine(options.engine)
    if engine is None:
        return ()
    names: dict[tuple[str, str], list[str]] = {}
    possible = set(codecs) == {engine.fallback}
    for layer in anatomy.layers:
        shaped = usable(dict(codecs), layer)  # what shapes forbid is said elsewhere
        refused: dict[str, list[str]] = {}
        for text in shaped:
            why = engine.refuses(anatomy, layer, codecs[text], options.tensor_parallel)
            if why is not None:
                refused.setdefault(why, []).append(text)
            else:
                possible |= text != engine.fallback
        for why, texts in refused.items():
            everything = {*texts, engine.fallback} >= set(shaped) and engine.fallback
            what = f"anything but {engine.fallback}" if everything else ", ".join(texts)
            names.setdefault((why, what), []).append(layer.name)
    notes = []
    for (why, what), found in sorted(names.items(), key=lambda item: -len(item[1])):
        more = f" and {len(found) - 1} other layers" if len(found) > 1 else ""
        notes.append(f"{engine.name} cannot run {found[0]}{more} in {what}: {why}.")
    if not possible:
        why = notes[0] if notes else f"{', '.join(codecs)} cannot take any layer of this model."
        raise BadInput(f"{why} No candidate is left for any layer; choose others with --candidates.")
    return tuple(notes)
