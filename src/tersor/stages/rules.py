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
    if not left and engine.fallback:
        return {engine.fallback: parse(engine.fallback)}
    return {text: codecs[text] for text in left}


def _members(engine: Engine, anatomy: Anatomy, layer: Layer) -> list[Layer]:
    key = engine.together(layer)
    if key is None:
        return [layer]
    return [other for other in anatomy.layers_of(layer.block) if engine.together(other) == key]


def rule_notes(options: Options, anatomy: Anatomy, codecs: Mapping[str, Codec]) -> tuple[str, ...]:
    """What rules forbid: one sentence for each reason, with the layers and candidates that it concerns.

    Raises BadInput, with the reason of most layers, when the rules leave no layer any of the candidates but the fallback.
    """
    engine = find_engine(options.engine)
    if engine is None:
        return ()
    layers: dict[str, list[str]] = {}
    texts: dict[str, list[str]] = {}
    possible = set(codecs) == {engine.fallback}
    for text, codec in codecs.items():
        for layer in anatomy.layers:
            why = engine.refuses(anatomy, layer, codec, options.tensor_parallel)
            if why is None:
                possible |= text != engine.fallback and bool(usable({text: codec}, layer))
                continue
            for found, what in ((layers, layer.name), (texts, text)):
                if what not in found.setdefault(why, []):
                    found[why].append(what)
    notes = []
    for why, names in sorted(layers.items(), key=lambda item: -len(item[1])):
        more = f" and {len(names) - 1} other layers" if len(names) > 1 else ""
        kept = f"anything but {engine.fallback}" if set(texts[why]) | {engine.fallback} >= set(codecs) else ""
        notes.append(f"{engine.name} cannot run {names[0]}{more} in {kept or ', '.join(texts[why])}: {why}.")
    if not possible and notes:
        raise BadInput(f"{notes[0]} No candidate is left for any layer; choose others with --candidates.")
    return tuple(notes)
