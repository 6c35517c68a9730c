"""Calls of functions that a model has not written as its template says: text, as it stands, and no failure.

transformers raises where a call is no JSON, has no name or ends too early, which small models and short answers see to.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import wraps
from typing import Any

from transformers.cli.serving.utils import response_events_to_chunks

_MISUSE = (TypeError, ValueError, LookupError, AttributeError, RuntimeError)
"""What reading an answer raises where it is not as expected."""


def _is_call(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and "arguments" in function


def be_lenient(tokenizer: Any) -> None:
    """An answer that cannot be read as a whole is given as it was written."""
    plain = tokenizer.parse_response

    @wraps(plain)
    def parse(response: Any, *args: Any, **options: Any) -> Any:
        try:
            parsed = plain(response, *args, **options)
            fine = all(map(_is_call, parsed.get("tool_calls") or ()))
        except _MISUSE:
            fine = False
        return parsed if fine else {"content": tokenizer.decode(response, skip_special_tokens=True)}

    tokenizer.parse_response = parse


class Lenient:
    """A parser of transformers for a stream. From where it fails on, all that it is fed is content.

    ``unseen``: special tokens, which are left out of that.
    """

    def __init__(self, parser: Any, unseen: Collection[str]) -> None:
        self.initial_events: list[dict[str, Any]] = parser.initial_events
        self._parser, self._unseen = parser, frozenset(unseen)
        self._held = ""
        self._plain = False

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Events of one more piece; what has come since the last that showed anything, where it cannot be read."""
        self._held += "" if text in self._unseen else text
        if self._plain:
            return self._as_it_stands()
        try:
            events: list[dict[str, Any]] = self._parser.feed(text)
            shown = response_events_to_chunks(events)
            fine = all(_is_call(event.get("value")) for event in events if _is_end(event))
        except _MISUSE:
            fine = False
        if not fine:
            self._plain = True
            return self._as_it_stands()
        if shown:
            self._held = ""
        return events

    def finalize(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """As the parser's own; a call without an end is content."""
        if self._plain:
            return {}, []
        try:
            message, events = self._parser.finalize()
            response_events_to_chunks(events)
        except _MISUSE:
            return {}, self._as_it_stands()
        return message, events

    def _as_it_stands(self) -> list[dict[str, Any]]:
        text, self._held = self._held, ""
        return [{"type": "region_chunk", "field": "content", "text": text}]


def _is_end(event: dict[str, Any]) -> bool:
    return event.get("type") == "region_close" and event.get("field") == "tool_calls"
