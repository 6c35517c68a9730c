"""The text form of codecs: what the command line, a plan file and the artifact use.

``head:option:option`` or ``head(argument,argument):option``, where arguments may be codecs themselves. Each codec's
file says how its text is read (:func:`reads`); codecs from outside register in the same way.

>>> str(parse("int4:g64"))
'int4:g64'
>>> parse("int4:g32:s8:asym") == parse("int4:g32:asym:s8")     # one form is printed, any order is read
True
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from tersor.codecs.scales import ScaleFormat
from tersor.contracts import Codec
from tersor.errors import BadInput


@dataclass(frozen=True)
class Words:
    """A codec's text, taken apart. ``head``: the match of its name; ``arguments``: what stood in parentheses."""

    text: str
    head: re.Match[str]
    arguments: tuple[str, ...]
    options: tuple[str, ...]

    def refuse(self, why: str) -> BadInput:
        """The error for a text that cannot be read; ``why`` ends the sentence."""
        return BadInput(f"Codec {self.text!r:.200} cannot be read: {why}")


@dataclass(frozen=True)
class Reader:
    """How texts whose head matches ``pattern`` are read. ``form``: how to write them. ``heads``: names to suggest."""

    pattern: re.Pattern[str]
    form: str
    heads: tuple[str, ...]
    read: Callable[[Words], Codec]


_READERS: list[Reader] = []


def reads(
    pattern: str, *, form: str, heads: tuple[str, ...]
) -> Callable[[Callable[[Words], Codec]], Callable[[Words], Codec]]:
    """Register a function as the reader of all codec texts whose head matches ``pattern`` in full.

    ``form``: how such texts are written, for messages. ``heads``: complete names, to suggest after a typing error.
    """

    def register(read: Callable[[Words], Codec]) -> Callable[[Words], Codec]:
        _READERS.append(Reader(re.compile(pattern), form, heads, read))
        return read

    return register


def parse(text: str) -> Codec:
    """The codec that a text stands for. Raises BadInput with what is wrong and what can be written."""
    text = text.strip()
    head, *options = split(text, ":")
    arguments: tuple[str, ...] = ()
    head, bracket, inner = head.partition("(")
    if inner.endswith(")"):
        arguments = tuple(split(inner[:-1], ","))
    elif bracket:
        options = ["(" + inner, *options]  # no codec has such an option, so its reader says what to write
    for reader in _READERS:
        match = reader.pattern.fullmatch(head)
        if match:
            return reader.read(Words(text, match, arguments, tuple(options)))
    near = difflib.get_close_matches(head, [name for reader in _READERS for name in reader.heads], 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    forms = ", ".join(reader.form for reader in _READERS)
    raise BadInput(f"Unknown codec {text!r:.200}.{hint} Codecs are written {forms}.")


def split(text: str, separator: str) -> list[str]:
    """``text`` cut at every ``separator`` that is not inside parentheses; pieces without outer spaces."""
    pieces = [""]
    depth = 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces]


def grouping(words: Words, form: str) -> tuple[int | None, ScaleFormat, list[str]]:
    """Group and scale format out of the options, and what is left."""
    groups = [o for o in words.options if o == "row" or re.fullmatch(r"g\d{1,6}", o)]
    formats: list[ScaleFormat] = [o for o in words.options if o in ("bf16", "s8")]  # type: ignore[misc]
    if len(groups) != 1 or len(formats) > 1 or groups[0] == "g0":
        raise words.refuse(f"say the group once, as g64 or row; codecs are {form}.")
    group = None if groups[0] == "row" else int(groups[0][1:])
    rest = [o for o in words.options if o not in groups and o not in formats]
    return group, (formats[0] if formats else "fp16"), rest
