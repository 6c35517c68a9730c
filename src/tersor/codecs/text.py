"""The text form of codecs: what the command line, a plan file and the artifact use.

>>> str(parse("int4:g64"))
'int4:g64'
>>> parse("int4:g32:s8:asym") == parse("int4:g32:asym:s8")     # one form is printed, any order is read
True
"""

from __future__ import annotations

import difflib
import re

from tersor.codecs.dense import Dense
from tersor.codecs.integer import Integer
from tersor.codecs.lookup import LookupTable
from tersor.codecs.rows import RowStretches
from tersor.codecs.scales import ScaleFormat
from tersor.codecs.small_float import SmallFloat
from tersor.contracts import Codec
from tersor.errors import BadInput

_FORMS = (
    "int{1-8}:{g<n>|row}[:asym][:bf16|:s8]",
    "fp{4,6,8}:e<E>m<M>:{g<n>|row}[:bf16|:s8]",
    "lut{2-4}:row",
    "rows(<stop>:<codec>,…)",
    "bf16",
    "fp16",
)


def parse(text: str) -> Codec:
    """The codec that a text stands for. Raises BadInput with what is wrong and what can be written."""
    text = text.strip()
    if text.startswith("rows("):
        return _stretches(text)
    head, *options = text.split(":")
    if head in ("bf16", "fp16") and not options:
        return Dense(head)
    match = re.fullmatch(r"(int|fp|lut)(\d{1,2})", head)
    if not match:
        names = [f"int{b}" for b in range(1, 9)] + ["fp4", "fp6", "fp8", "lut2", "lut3", "lut4", "bf16", "fp16"]
        near = difflib.get_close_matches(head, names, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise BadInput(f"Unknown codec {text!r}.{hint} Codecs are written {', '.join(_FORMS)}.")
    kind, bits = match[1], int(match[2])
    if kind == "lut":
        if options != ["row"]:
            raise BadInput(f"Codec {text!r} cannot be read: lookup tables are per row, written lut{bits}:row.")
        return LookupTable(bits)
    group, scales, rest = _common(text, options)
    if kind == "int":
        asymmetric = rest == ["asym"]
        if rest and not asymmetric:
            raise BadInput(f"Codec {text!r} cannot be read: unknown option {rest[0]!r}; write {_FORMS[0]}.")
        return Integer(bits, group, scales, asymmetric)
    layout = re.fullmatch(r"e(\d)m(\d)", rest[0]) if len(rest) == 1 else None
    if not layout:
        raise BadInput(f"Codec {text!r} cannot be read: say exponent and mantissa bits once; write {_FORMS[1]}.")
    codec = SmallFloat(bits, group, scales, int(layout[1]))
    if codec.mantissa != int(layout[2]):
        raise BadInput(f"Codec {text!r} cannot be read: 1 + {layout[1]} + {layout[2]} bits are not {bits}.")
    return codec


def _stretches(text: str) -> RowStretches:
    inner = text[len("rows(") : -1].split(",") if text.endswith(")") else []
    pairs = [piece.strip().split(":", 1) for piece in inner]
    if not pairs or any(len(pair) != 2 or not re.fullmatch(r"\d{1,9}", pair[0]) for pair in pairs):
        raise BadInput(
            f"Codec {text!r} cannot be read: write rows(<stop>:<codec>,…), such as rows(100:int4:g64,900:int2:g64)."
        )
    if any(codec.lstrip().startswith("rows(") for _, codec in pairs):
        raise BadInput(f"Codec {text!r:.200} nests rows(...) in rows(...); write its stretches side by side.")
    return RowStretches(tuple(int(stop) for stop, _ in pairs), tuple(parse(codec) for _, codec in pairs))


def _common(text: str, options: list[str]) -> tuple[int | None, ScaleFormat, list[str]]:
    """Group and scale format out of the options, and what is left."""
    groups = [o for o in options if o == "row" or re.fullmatch(r"g\d{1,6}", o)]
    formats: list[ScaleFormat] = [o for o in options if o in ("bf16", "s8")]  # type: ignore[misc]
    if len(groups) != 1 or len(formats) > 1 or groups[0] == "g0":
        raise BadInput(f"Codec {text!r} cannot be read: say the group once, as g64 or row; codecs are {_FORMS[0]}.")
    group = None if groups[0] == "row" else int(groups[0][1:])
    rest = [o for o in options if o not in groups and o not in formats]
    return group, (formats[0] if formats else "fp16"), rest
