"""``plan.json``: which codec each layer gets, as a file that a person reads, edits and feeds back.

One line a layer, codecs in a column. Only ``codec`` is meant to be edited: sizes and distortions are there to be
read, and whoever runs an edited plan computes them anew. A line may also be shortened to ``"layer": "int4:g64"``.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection
from typing import Any

from tersor.contracts import Choice, Codec, Plan
from tersor.errors import BadInput, NotFinite, TersorError

PLAN_FORMAT = 1


def plan_to_json(plan: Plan) -> str:
    """The text of ``plan.json``. Raises :class:`~tersor.errors.NotFinite` for an infinite distortion."""
    head = {key: value for key, value in plan_to_dict(plan).items() if key != "layers"}
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}," for key, value in head.items()]
    names = [json.dumps(name, ensure_ascii=False) for name in plan.layers]
    codecs = [json.dumps(choice.codec, ensure_ascii=False) for choice in plan.layers.values()]
    wide_name = max((len(name) for name in names), default=0)
    wide_codec = max((len(codec) for codec in codecs), default=0)
    rows = [
        f'    {name + ":":<{wide_name + 1}} {{"codec": {codec + ",":<{wide_codec + 1}} '
        f'"nbytes": {choice.nbytes}, "distortion": {json.dumps(to_number("distortion", choice.distortion))}}}'
        for name, codec, choice in zip(names, codecs, plan.layers.values(), strict=True)
    ]
    return "{\n" + "\n".join(lines) + '\n  "layers": {\n' + ",\n".join(rows) + "\n  }\n}\n"


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The same as JSON data, for embedding in another file."""
    return {
        "tersor_plan": PLAN_FORMAT,
        "budget": plan.budget,
        "file_bytes": plan.file_bytes,
        "predicted": to_number("predicted", plan.predicted),
        "options": dict(plan.options),
        "layers": {
            name: {
                "codec": choice.codec,
                "nbytes": choice.nbytes,
                "distortion": to_number(f"distortion of {name}", choice.distortion),
            }
            for name, choice in plan.layers.items()
        },
    }


def plan_from_json(text: str, *, where: str = "plan.json") -> Plan:
    """Parse the text of a plan file. ``where`` names the file in errors.

    Sizes and distortions that are missing become 0. Raises :class:`~tersor.errors.BadInput`.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise BadInput(f"{where}: '{key}' is there twice; keep one of the two lines")
            result[key] = value
        return result

    try:
        data = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{where}: line {error.lineno}, column {error.colno} is not JSON ({error.msg}); "
            "look for a missing or extra comma or quote near there"
        ) from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: is not usable JSON ({error})") from error
    return plan_from_dict(data, where=where)


def plan_from_dict(data: Any, *, where: str = "plan.json") -> Plan:
    """The inverse of :func:`plan_to_dict`. Raises :class:`~tersor.errors.BadInput`."""
    if not isinstance(data, dict) or "layers" not in data:
        raise BadInput(f"{where}: expected a plan, that is a JSON object with 'layers'; write one with `tersor plan`")
    version = data.get("tersor_plan", PLAN_FORMAT)
    if version != PLAN_FORMAT:
        raise BadInput(f"{where}: plan format {version!r} is not known, expected {PLAN_FORMAT}; upgrade tersor")
    layers = data["layers"]
    if not isinstance(layers, dict):
        raise BadInput(f"{where}: expected 'layers' to map layer names to codecs, found {layers!r:.80}")
    options = data.get("options", {})
    if not isinstance(options, dict):
        raise BadInput(f"{where}: expected 'options' to be a JSON object, found {options!r:.80}")
    return Plan(
        layers={name: _choice(where, name, value) for name, value in layers.items()},
        budget=_count(where, "budget", data.get("budget", 0)),
        file_bytes=_count(where, "file_bytes", data.get("file_bytes", 0)),
        predicted=_number(where, "predicted", data.get("predicted", 0.0)),
        options=options,
    )


def validate_plan(
    plan: Plan, layers: Collection[str], parse: Callable[[str], Codec], *, where: str = "plan.json"
) -> dict[str, Codec]:
    """Check a plan against the model's ``layers``; returns the codec of each layer, in the model's order.

    Raises :class:`~tersor.errors.BadInput` for the first layer that the model does not have, that the plan leaves
    out, or whose codec text ``parse`` refuses.
    """
    for name in plan.layers:
        if name not in layers:
            near = difflib.get_close_matches(name, layers, n=1)
            hint = f"did you mean '{near[0]}'" if near else "remove the line"
            raise BadInput(f"{where}: the model has no layer '{name}'; {hint}{'?' if near else ''}")
    codecs: dict[str, Codec] = {}
    for name in layers:
        choice = plan.layers.get(name)
        if choice is None:
            raise BadInput(f"{where}: layer '{name}' has no codec; add a line for it (\"bf16\" keeps it as it is)")
        try:
            codecs[name] = parse(choice.codec)
        except TersorError as error:
            raise BadInput(f"{where}: layer '{name}': {error}") from error
    return codecs


def to_number(what: str, value: float) -> float | None:
    """A float for JSON, which has no NaN: unknown becomes null.

    Raises :class:`~tersor.errors.NotFinite` for infinity.
    """
    if math.isinf(value):
        raise NotFinite(f"{what} is {value} and cannot be recorded; a measurement went wrong before this")
    return None if math.isnan(value) else float(value)


def from_number(value: Any) -> float | None:
    """The inverse of :func:`to_number`; None when ``value`` is not a finite number or null."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _choice(where: str, name: str, value: Any) -> Choice:
    if isinstance(value, str):
        return Choice(codec=value, nbytes=0, distortion=0.0)
    if not isinstance(value, dict) or not isinstance(value.get("codec"), str):
        raise BadInput(f"{where}: layer '{name}' needs a codec such as 'int4:g64', found {value!r:.80}")
    unknown = sorted(set(value) - {"codec", "nbytes", "distortion"})
    if unknown:
        raise BadInput(
            f"{where}: layer '{name}' has the unknown field '{unknown[0]}', expected codec, nbytes and distortion"
        )
    nbytes = _count(where, f"nbytes of '{name}'", value.get("nbytes", 0))
    distortion = _number(where, f"distortion of '{name}'", value.get("distortion", 0.0))
    return Choice(value["codec"], nbytes, distortion)


def _count(where: str, what: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise BadInput(f"{where}: expected {what} to be a whole number of bytes, found {value!r:.80}")
    return value


def _number(where: str, what: str, value: Any) -> float:
    number = from_number(value)
    if number is None:
        raise BadInput(f"{where}: expected {what} to be a finite number or null, found {value!r:.80}")
    return number
